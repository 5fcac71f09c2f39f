"""bench.py kernels and bench.py gpu without a GPU: every call is made, on small matrices, emulated."""
import json
import shutil
import time
from argparse import Namespace

import pytest
import torch

from benches import gpu, kernels
from common.cli import InputError

def test_rows_of_every_kernel(monkeypatch, capsys):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels.cu with")
    monkeypatch.setattr(kernels, "ROWS", (1, 17))
    rows = kernels.bench(Namespace(dry_run=True))[1]
    assert {r["kernel"] for r in rows} == {"copy", "read", "empty launch", "matvec", "matmul", "back", "lowrank", "lora", "dequantize"}
    assert {(r["bits"], r["group"]) for r in rows} == {(16, 0), *kernels.FORMS}
    one = next(r for r in rows if (r["kernel"], r["bits"], r["group"], r["rows"]) == ("matvec", 4, 64, 1))
    assert one["gb_s"] == pytest.approx(48 * (128 / 2 + 2 * 4) / one["us"] / 1e3), "scales and offsets count"
    assert len(kernels.report(rows).splitlines()) == 2 + len(rows)
    assert capsys.readouterr().out.count('{"kernel"') == len(rows), "each was printed as it came"

def test_a_kernel_that_is_wrong_is_not_timed():
    m = kernels.Measurement(None, kernels.cpu_seconds, torch.device("cpu"), 1000)
    x, W = torch.ones(1, 4), torch.eye(4)
    with pytest.raises(InputError, match="back.*off by 1 of"):
        m.add("back", "ours", (4, 4), (16, 0), x, lambda x, W: 2 * x @ W, [W], x)
    assert {r["kernel"] for r in m.rows} == {"copy", "read", "empty launch"}

def test_without_a_gpu_it_says_so_in_one_line(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("bench.py", "kernels")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs a GPU" in done.stderr
    assert not done.stdout

def test_the_quickest_stages_of_a_gpus_minutes_run_here(tmp_path, monkeypatch):
    names = "sanitizer", "recompute"
    monkeypatch.setattr(gpu, "STAGES", [stage for stage in gpu.STAGES if stage[0] in names])
    rows = gpu.bench(Namespace(dry_run=True, minutes=5.0, out_dir=str(tmp_path)))[1]
    assert [(r["stage"], r["became"]) for r in rows] == [(name, "done") for name in names]
    assert "2 tests collected" in json.loads((tmp_path / "sanitizer.json").read_text())["said"][-1]
    assert {r["mode"] for r in json.loads((tmp_path / "recompute.json").read_text())["rows"]} >= {"none", "block"}
    assert len(gpu.report(rows).splitlines()) == 2 + len(rows)

def test_stages_end_at_their_limits_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    stages = [("good", 60, "python -c 'print(12)'", ""), ("bad", 60, "python -c 'raise SystemExit(\"no such flag\")'", ""),
              ("slow", 1, "python -c 'import time; time.sleep(50)'", ""), ("long", 900, "python -c 1", ""),
              ("absent", 60, "no-such-program", ""), ("last", None, "python -c 'print({hours})'", "")]
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "find_device", lambda dtype: Namespace(name="a GPU"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, start = Namespace(dry_run=False, minutes=10.0, out_dir=str(tmp_path)), time.time()
    became = {r["stage"]: r["became"] for r in gpu.bench(args)[1]}
    assert time.time() - start < 30
    assert became["good"] == became["last"] == "done" and "failed with 1: no such flag" in became["bad"]
    assert "limit of 1 s" in became["slow"] and "may take 900 s" in became["long"] and "failed with 127: " in became["absent"]
    assert 0.1 < float(json.loads((tmp_path / "last.json").read_text())["said"][0]) < 0.2, "hours that are left"
    assert {r["stage"]: r["became"] for r in gpu.bench(args)[1]}["good"] == "was done before"
    args.dry_run = True
    monkeypatch.setattr(gpu, "STAGES", [("bad", 60, "", stages[1][2])])
    with pytest.raises(InputError, match="a stage of the dry run failed"):
        gpu.bench(args)
