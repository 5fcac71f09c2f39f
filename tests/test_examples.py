"""The examples, each run by the command in its opening, made short."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import load_model
from quant import QuantLowRank

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SHORT = ("--max-iters", "2", "--seq-len", "32", "--log-interval", "1", "--dtype", "float32", "--out-dir", "run")

@pytest.fixture
def example(tmp_path):
    def run_it(name, *more, **replaced):
        line = (EXAMPLES / name).read_text().split("\n")[2]
        words = [replaced.get(word, word) for word in shlex.split(line)]
        words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        done = subprocess.run([*words, *map(str, more)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path
    return run_it

def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

def test_another_architecture(example, text_file):
    folder = example("primer.py", "--data", text_file, *SHORT) / "run"
    config = json.loads((folder / "config.json").read_text())
    assert len(losses(folder)) == 2 and "128" in json.dumps(config)

def test_another_quantization_format(example, text_file, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--model", "tiny", "--rank", "64", "--data", text_file, *SHORT[:-1], tmp_path / "trained"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = example("ternary.py", **{"out/train": str(tmp_path / "trained"), "out/ternary": "ternary"}) / "ternary"
    model, _ = load_model(folder)
    layer = model.blocks[0].mlp.up
    assert isinstance(layer, QuantLowRank)
    dense, group = layer.A.dense(), layer.A.group
    assert (dense.unflatten(1, (-1, group)).abs() / layer.A.scale.float()[..., None]).round(decimals=3).unique().tolist() == [0, 1]

def test_another_schedule(example, text_file):
    folder = example("fifo.py", "--data", text_file, *SHORT) / "run"
    ours, head = folder.with_name("gpipe"), [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*head, "train.py", "--model", "tiny", "--rank", "16", "--pipeline", "2", "--schedule", "gpipe", "--data", text_file, *SHORT[:-1],
                           ours], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(losses(ours), abs=1e-5)
