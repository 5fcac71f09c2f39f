"""A training run: how it begins, or goes on, and its folder. train.py and finetune.py have it in common.

    OUT/metrics.jsonl    a line for each logged step: {"step": 10, "loss": 7.1, ...}
    OUT/summary.json     one object at the end: parameters, losses, tokens/s, memory, seconds, device, ...
    OUT/loss.png         the plot
    OUT/state/           what --resume goes on from (storage.py)
"""
import argparse
import json
import math
import os
import signal
import statistics
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from common.cli import InputError, alone_in, interrupt, move_aside, refuse, say, write_atomic
from common.device import find_device, peak_memory
from common.processes import all_reduce, any_process, barrier, is_first, process_group, world_size
from common.storage import read_state, replace_state

def start(run, parser, argv, settings, changes):
    """run(arguments, names of those given), alone in its folder, in each of torchrun's processes.
    settings: values without a flag; changes: other ones."""
    unknown = changes.keys() - settings.keys()
    if unknown:
        raise TypeError(f"no setting is called {', '.join(sorted(unknown))}: there are {', '.join(settings)}")
    args = parser.parse_args(argv)
    not_given = argparse.Namespace(**dict.fromkeys(vars(args)))  # a parser leaves what has a value already
    given = {name for name, value in vars(parser.parse_args(argv, not_given)).items() if value is not None}
    vars(args).update(settings | changes)
    with alone_in(args.out_dir), process_group():
        return run(args, given | changes.keys())

def has_state(folder):
    return any((Path(folder) / name).exists() for name in ("state", "state.previous"))

def begin(args, given, fixed):
    """(device, state folder, state.json, moments): the last three of the run that it goes on from; None, {}
    and {} for a new one. It goes on with --resume, or where torchrun --max-restarts began it again and there
    is a state. What is given now replaces saved arguments, but for those named in `fixed`."""
    folder, state, moments = None, {}, {}
    # on several machines only some may count the restart: if one does, all go on
    restarted = any_process(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if args.resume or restarted and has_state(args.out_dir):
        folder, state, moments = read_state(args.out_dir)
        saved = state["args"]
        for name in fixed:
            refuse(name in given and getattr(args, name) != saved.get(name),
                   f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {saved.get(name)} of "
                   "the run that --resume continues: leave it out, or give another --out-dir")
        how = {"resume", "stop_at", "out_dir", "shard"}  # a run is continued, not what it is
        vars(args).update({name: saved[name] for name in saved.keys() - given - how})
    device = find_device(args.dtype)
    args.dtype = str(device.dtype).removeprefix("torch.")  # a resumed run computes as it began
    say(f"device {device.name}" + (f", {world_size()} processes" if world_size() > 1 else ""))
    say(f"dtype {args.dtype} ({device.why}), {device.rate / 1e12:.2f} TFLOPS in products")
    return device, folder, state, moments

class RunFolder:
    """OUT, the lines on the terminal, and the signals that end the run. Only the first process writes.

    state: as `begin` gives it; an earlier run in a new run's folder is moved aside. rows: of a step, in all
    processes; text: a checksum of the data."""

    def __init__(self, args, state, rows, text, device):
        refuse(state.get("text", text) != text, "the data is not what the run that --resume continues began "
               "with: give that, or another --out-dir")
        refuse(state.get("rows", rows) != rows, "a step of the run that --resume continues has "
               f"{state.get('rows')} rows, and {rows} with --batch-size {args.batch_size}, --grad-accum "
               f"{args.grad_accum} and world size {world_size()}: change one of them")
        self.args, self.path, self.device = args, Path(args.out_dir), device
        self.constants = dict(rows=rows, text=text)
        self.last_step = min(args.stop_at or args.max_iters, args.max_iters)
        self.step = self.saved_at = state.get("step", 0)
        self.started = time.perf_counter() - state.get("seconds", 0)
        self.times, self.rates, self.logged = [], [], []  # of each step: seconds, tokens a second; metrics
        self.bar = tqdm(total=self.last_step, initial=self.step, unit=" steps", dynamic_ncols=True,
                        delay=1e-3, disable=None if is_first() else True)
        if is_first():
            if not state and (has_state(self.path) or (self.path / "summary.json").exists()):
                aside = move_aside(self.path)
                say(f"{self.path} held an earlier run: moved to {aside} (to go on with it: --resume "
                    f"--out-dir {aside})")
            logged = read_metrics(self.path / "metrics.jsonl")
            self.logged = [row for row in logged if row["step"] <= self.step]
            write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.logged))
            if self.step < self.last_step:
                (self.path / "summary.json").unlink(missing_ok=True)  # of an earlier end
        self.signal, self.stopped = None, False  # what this process has caught; whether any process has
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.caught)

    def caught(self, number, frame):
        """Ctrl-C or SIGTERM: the run ends after this step. A second one ends it at once."""
        if self.signal:
            interrupt(number, frame)
        self.signal = signal.Signals(number)

    def advance(self, tokens, began):
        """A step is done, of so many tokens, that began at this time."""
        self.step += 1
        self.times.append(time.perf_counter() - began)
        self.rates.append(tokens / self.times[-1])
        self.stopped = any_process(self.signal is not None)
        self.bar.update()

    def due(self, interval):
        """Whether the step is one of those in this interval, or the last one."""
        return self.step % interval == 0 or self.step == self.last_step

    def log(self, flops=None, **row):
        """A line of metrics.jsonl, and one on the terminal. row: loss, lr and more. flops: of a token, for
        MFU, useful operations over what matrix products reach."""
        if not math.isfinite(row["loss"]):
            raise self.not_finite(f"the loss is {row['loss']}")
        seconds, rate = (statistics.median(x[-self.args.log_interval:]) for x in (self.times, self.rates))
        memory = peak_memory(self.device.torch_device)
        row = dict(step=self.step, **row, tokens_per_second=rate, step_ms=seconds * 1e3,
                   peak_memory_bytes=memory)
        line = f"{rate:.0f} tok/s {seconds * 1e3:.0f} ms {memory / 1e9:.1f} GB"
        if flops:
            row["mfu"] = flops * rate / (self.device.rate * world_size())
            line += f" mfu {row['mfu']:.0%}"
        if is_first():
            self.logged.append(row)
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            left = time.strftime("%H:%M:%S", time.gmtime((self.last_step - self.step) * seconds))
            self.bar.write(f"step {self.step} loss {row['loss']:.4f} lr {row['lr']:.1e} {line} left {left}")
            if row.get("val_loss") is not None:
                self.bar.write(f"step {self.step} val_loss {row['val_loss']:.4f}")

    def not_finite(self, what):
        return InputError(f"{what} at step {self.step}: the run stops, {self.path}/state keeps step "
                          f"{self.saved_at}. A smaller --lr than {self.args.lr:g} usually helps")

    def save(self, strategy, tensors, moments, write, title, **more):
        """Replace OUT/state, and the plot. Process 0 writes, by write(folder, tensors=...), whole tensors;
        those that are not finite replace no good ones. more: what else state.json keeps."""
        tensors, moments = strategy.gather(tensors), strategy.gather(moments)
        if any_process(not all(t.isfinite().all() for t in tensors.values())):
            raise self.not_finite("some weights are not finite")
        if is_first():
            state = self.constants | more | dict(
                step=self.step, args=vars(self.args), seconds=time.perf_counter() - self.started)
            replace_state(self.path, partial(write, tensors=tensors), moments, state)
            self.plot(title)
        barrier()
        self.saved_at = self.step

    def plot(self, title):
        """OUT/loss.png: training loss of every logged step and validation loss where it was taken."""
        from matplotlib.figure import Figure
        figure = Figure((7, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            rows = [row for row in self.logged if row.get(key) is not None]
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=label)
        axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(self.path / "loss.png")

    def say_stopped(self, script):
        """The last lines of a run that was stopped; returns its exit code."""
        number = self.signal or signal.SIGTERM  # which another process has caught
        say(f"stopped by {number.name} after step {self.step}, saved; go on with")
        say(f"    python {script} --resume --out-dir {self.path}")
        return 128 + number

    def finish(self, result, **summary):
        """summary.json: what was logged last, what is given, and what the run took, over all its processes.
        And what to type next; result: for sample.py --model."""
        self.bar.close()
        memory = max([peak_memory(self.device.torch_device), *(r["peak_memory_bytes"] for r in self.logged)])
        seconds = time.perf_counter() - self.started
        summary |= dict(steps=self.step, peak_memory_bytes=int(all_reduce(memory, dist.ReduceOp.MAX)),
                        peak_memory_bytes_total=int(all_reduce(memory)), devices=world_size(),
                        device_hours=world_size() * seconds / 3600, seconds=seconds,
                        device=self.device.name, arguments=vars(self.args))
        if is_first():
            last = {key: value for row in self.logged for key, value in row.items()}
            write_atomic(self.path / "summary.json", json.dumps(last | summary, indent=2) + "\n")
        say(f"{self.path}/ has the result, metrics.jsonl, summary.json and loss.png; try")
        say(f"    python sample.py --model {result} --prompt \"The file\"")

def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is dropped."""
    rows = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows
