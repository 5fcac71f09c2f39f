"""train.py --shard: the losses of one process, half of the numbers in each of two, and a state that any number of processes goes on from."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--model", "tiny", "--rank", "8", "--seq-len", "32", "--max-iters", "6", "--log-interval", "1", "--seed", "3", "--dtype", "float32")

def train(*args, processes=1):
    head = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*head, "train.py", *TINY, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout + done.stderr

def losses(folder):
    return {r["step"]: r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}

def test_two_shards_give_the_losses_of_one_process_stopped_and_resumed(tmp_path, text_file):
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    code, text = train("--data", text_file, "--batch-size", 4, "--out-dir", alone)
    assert code == 0, text
    code, text = train("--data", text_file, "--batch-size", 2, "--shard", "--stop-at", 3, "--out-dir", sharded, processes=2)
    assert code == 0, text
    code, text = train("--data", text_file, "--resume", "--shard", "--stop-at", 5, "--out-dir", sharded, processes=2)
    assert code == 0, text
    code, text = train("--data", text_file, "--resume", "--out-dir", sharded, processes=2)  # the state is whole: replicas go on with it
    assert code == 0, text
    a, b = losses(alone), losses(sharded)
    assert a.keys() == b.keys() and len(a) == 6
    assert max(abs(a[step] - b[step]) for step in a) < 1e-4
    summary = json.loads((sharded / "summary.json").read_text())
    assert summary["parameters"] == json.loads((alone / "summary.json").read_text())["parameters"]
    done = subprocess.run([sys.executable, "sample.py", "--model", sharded, "--prompt", "The", "--max-new-tokens", "3"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr

HALVES = """
import sys; sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from lowrank import replace_linears
from model import Transformer, config_for
from common.device import find_device
from common.processes import distribute, own_part
dist.init_process_group("gloo")
torch.manual_seed(0)
model = Transformer(config_for("tiny", vocab_size=512))
model.init_weights()
replace_linears(model, 8)
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
strategy = distribute(model, None, find_device("float32"), shard=True)
here = sum(p.to_local().numel() for p in model.parameters())
print(f"SHARE {{here / sum(p.numel() for p in model.parameters())}}", flush=True)
after = strategy.gather(dict(model.named_parameters()))
parts = all(torch.equal(own_part(before[name], p).to_local(), p.to_local()) for name, p in model.named_parameters())
came_back = dist.get_rank() != 0 or all(torch.equal(after[name], value) for name, value in before.items())
print(f"PARTS {{parts}} WHOLE {{came_back}}", flush=True)
dist.destroy_process_group()
"""

def test_each_process_holds_its_half_and_the_whole_comes_back(tmp_path):
    script = tmp_path / "halves.py"
    script.write_text(HALVES.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)], capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r"SHARE ([\d.]+)", done.stdout)]  # torchrun's processes share a line
    assert len(shares) == 2 and all(0.49 < share < 0.51 for share in shares)
    assert done.stdout.count("PARTS True WHOLE True") == 2

@pytest.mark.parametrize("args, words", [((), "torchrun"), (("--method", "3"), "--method 3")])
def test_what_cannot_be_sharded_is_refused(args, words, tmp_path):
    code, text = train("--shard", *args, "--out-dir", tmp_path / "out")
    assert code == 2 and words in text and "Traceback" not in text
