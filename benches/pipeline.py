"""Utilization of GPipe and 1F1B (Fig. 3), beside M / (N + M - 1) and torch.distributed.pipelining.

    python bench.py pipeline

A stage is a process whose work is a wait of 50 ms, so that stages wait for each other, not for a processor.
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from benches.common import shown, table
from common.device import find_device
from pipeline import SCHEDULES, Grid, Wires, execute, schedule, utilization

DEFAULTS = dict(stages=4)


class TimedStage(nn.Module):
    """Waits in each direction, and notes in `rows` when: (stage, kind, microbatch, start, end)."""

    def __init__(self, stage, seconds):
        super().__init__()
        self.stage, self.seconds, self.rows = stage, seconds, []
        self.weight = nn.Parameter(torch.ones(()))

    def wait(self, kind):
        start = time.time()
        time.sleep(self.seconds)
        self.rows.append((self.stage, kind, sum(row[1] == kind for row in self.rows), start, time.time()))

    def forward(self, x):
        self.wait("F")
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda dy: self.wait("B"))
        return y


def engines(grid, module, kind, microbatches):
    """name -> function that runs one step over the timed stages: ours, and torch's where it can."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    device = torch.device("cpu")
    steps, wires = schedule(kind, grid.stages, microbatches)[grid.stage], Wires(grid, device)
    batch = torch.ones(microbatches, 64, 64)
    inputs = batch.split(1)

    def forward(m, x):
        y = module(inputs[m] if x is None else x)
        return F.mse_loss(y, inputs[m]) if grid.last else y

    def ours():
        wires.begin(steps, inputs[0].shape, inputs[0].dtype)
        execute(steps, forward, wires)
    if kind == "1f1b" and microbatches < grid.stages:  # torch's 1F1B refuses these
        return {"ours": ours}
    stage = PipelineStage(module, grid.stage, grid.stages, device, group=grid.pipe)
    torchs = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, microbatches, loss_fn=F.mse_loss)
    arguments, target = [batch] if grid.first else [], dict(target=batch) if grid.last else {}
    return {"ours": ours, "torch": lambda: torchs.step(*arguments, **target)}


def member(rank, folder, stages, cases, seconds, rounds):
    """One process: every engine in turn, a warm-up and `rounds` rounds. Its rows are left in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=stages)
    grid, results = Grid(stages), []
    for kind, microbatches in cases:
        module = TimedStage(grid.stage, seconds)
        steps = engines(grid, module, kind, microbatches)
        times = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                dist.barrier()
                module.rows = []
                step()
                times[name].append(module.rows)
        results.append({name: rows[1:] for name, rows in times.items()})
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(stages=4, counts=(1, 4, 8, 16), seconds=0.05, rounds=3):
    """A row for each schedule and number of microbatches: the median utilization over the rounds."""
    cases, rows = [(kind, M) for kind in SCHEDULES for M in counts], []
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(member, (folder, stages, cases, seconds, rounds), nprocs=stages)
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(stages)]
    for (kind, M), parts in zip(cases, zip(*results)):  # parts: of one case, what each process measured
        median = {}
        for name in parts[0]:
            whole = [sum(stages_rows, []) for stages_rows in zip(*(part[name] for part in parts))]
            median[name] = statistics.median(map(utilization, whole))
        rows.append(dict(schedule=kind, stages=stages, microbatches=M, utilization=median["ours"],
                         theory=M / (stages + M - 1), torch_utilization=median.get("torch")))
    return rows


def bench(args):
    return find_device("float32"), measure(args.stages)


def report(rows):
    def torchs(r):
        return f"{r['torch_utilization']:.3f}" if r["torch_utilization"] else "refuses"
    return table(shown(rows, torch=torchs), {
        "schedule": "schedule", "stages": "stages", "microbatches": "microbatches",
        "utilization": ("utilization", "{:.3f}"), "M/(N+M-1)": ("theory", "{:.3f}"), "torch": "torch"})
