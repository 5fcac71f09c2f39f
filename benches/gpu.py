"""Twenty-five minutes of one GPU: what only a GPU can show, in stages, those of most worth first.

    python bench.py gpu                 leaves results/gpu/STAGE.json and STAGE.log of each stage
    python bench.py gpu --minutes 9     as far as that goes; again, and it goes on
    python bench.py gpu --dry-run       every stage at its smallest size, kernels.cu through its emulation

A stage whose JSON is there is not repeated; one that failed or was stopped is. It begins only if its limit
fits in the minutes that are left; the last one takes them all. Without a GPU it is a dry run.
"""
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benches.common import table
from common.cli import refuse, say, write_atomic
from common.device import find_device

CHECK = "python -m pytest -q -n0 tests/test_kernels.py"
SANITIZED = ("'tests/test_kernels.py::test_products_on_a_gpu[int4-bfloat16-2]' "
             "'tests/test_kernels.py::test_one_launch_on_a_gpu[int4-bfloat16-1]'")
BENCH = "python bench.py"
LOWRANK = f"{BENCH} train --compile --dtypes bfloat16"
STAGES = [  # name, seconds at most, the command, the command of a dry run
    # the first stage also compiles kernels.cu, for the stages after it too
    ("check", 300, f"{CHECK} -k 'on_a_gpu or boundary'", f"{CHECK} -k begins_anywhere"),
    ("sanitizer", 150, f"compute-sanitizer --error-exitcode 9 python -m pytest -q -n0 {SANITIZED}",
     f"python -m pytest -q -n0 --collect-only {SANITIZED}"),
    ("kernels", 240, f"{BENCH} kernels", f"{BENCH} kernels --dry-run"),
    ("decode_gpt2_xl", 240, f"{BENCH} decode --models gpt2-xl --ranks 384 --bits 16,8,4 --eager",
     f"{BENCH} decode --models gpt2 --ranks 192 --bits 4 --new-tokens 3 --rounds 1 --eager"),
    ("decode_llama2_7b", 150, f"{BENCH} decode --models llama2-7b --ranks 0 --bits 4 --eager",
     f"{BENCH} decode --models tiny --ranks 0 --bits 4 --new-tokens 3 --rounds 1"),
    ("train_gpt2", 200, f"{LOWRANK} --ranks 0,192 --batch-size 16 --seq-len 1024",
     f"{LOWRANK} --model tiny --ranks 0,16 --batch-size 1 --seq-len 32 --rounds 1"),
    ("train_gpt2_xl", 300, f"{LOWRANK} --model gpt2-xl --ranks 0,384 --batch-size 4 --seq-len 1024", None),
    ("finetuning_memory", 200, f"{BENCH} paper", f"{BENCH} paper"),
    ("recompute", 90, f"{BENCH} recompute --dtype bfloat16 --batch-size 16",
     f"{BENCH} recompute --seq-len 64 --rounds 1"),
    ("decompose", 180, f"{BENCH} decompose --models gpt2", f"{BENCH} decompose --models tiny"),
    ("scaling", None, f"{BENCH} scaling --hours {{hours}}",
     f"{BENCH} scaling --hours 0.0001 --sizes 64x4 --seeds 1"),
]

DEFAULTS = dict(minutes=25.0, out_dir=None, dry_run=False)

def stage(name, seconds, command, folder):
    """Run a stage, which leaves NAME.json if it ends well: its own rows, or what it said. Returns a line. The
    processes that it began end with it."""
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    if "bench.py" in command:
        command += f" --json {shlex.quote(str(file))}"
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command.replace("python ", f"{sys.executable} ", 1), shell=True,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {seconds:.0f} s: see {log}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text(errors="replace").strip().splitlines()[-20:]
    if code:
        return f"failed with {code}: {said[-1][:200] if said else ''} (see {log})"
    if "bench.py" not in command:
        write_atomic(file, json.dumps(dict(command=command, said=said), indent=1) + "\n")
    return "done"

def bench(args):
    """A row for each stage. A dry run in which a stage failed is refused."""
    dry = args.dry_run or not torch.cuda.is_available()
    folder = Path(args.out_dir or ("out/gpu-dry-run" if dry else "results/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    end, rows, device = time.time() + 60 * args.minutes, [], find_device("float32")
    for name, limit, command, dry_command in STAGES:
        began, left = time.time(), end - time.time()
        if dry:
            became = stage(name, left, dry_command, folder) if dry_command else "left out of a dry run"
        elif (folder / f"{name}.json").exists():
            became = "was done before"
        elif (limit or 0) > left:
            became = f"not begun: it may take {limit} s, and {left:.0f} s are left"
        else:
            became = stage(name, limit or left, command.format(hours=max(left - 60, 1) / 3600), folder)
        rows.append(dict(stage=name, seconds=round(time.time() - began), became=became))
        say(f"{name}: {became}, {rows[-1]['seconds']} s")
    refuse(dry and any(r["became"].startswith(("failed", "stopped")) for r in rows),
           f"{device.name}: a stage of the dry run failed, see above")
    return device, rows

report = table
