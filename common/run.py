"""A training run: its arguments, the state it goes on from, and its folder.

    OUT/metrics.jsonl    a line for each logged step: {"step": 10, "loss": 7.1, ...}
    OUT/summary.json     one object at the end: parameters, losses, tokens/s, memory, seconds, device, ...
    OUT/loss.png         the plot
    OUT/state/           what --resume goes on from (storage.py)
"""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from common.cli import InputError, move_aside, refuse, say, write_atomic
from common.device import peak_memory
from common.processes import all_reduce, any_process, barrier, is_first, world_size

# They say how a run is continued, not what it is.
NOT_RESTORED = ("resume", "stop_at", "out_dir", "shard")


def parse(parser, argv, settings, changes):
    """(arguments, names of those given). settings: values without a flag; changes: other ones."""
    unknown = changes.keys() - settings.keys()
    if unknown:
        raise TypeError(f"no setting is called {', '.join(sorted(unknown))}: there are {', '.join(settings)}")
    args = parser.parse_args(argv)
    not_given = argparse.Namespace(**dict.fromkeys(vars(args)))  # a parser leaves what has a value already
    given = {name for name, value in vars(parser.parse_args(argv, not_given)).items() if value is not None}
    vars(args).update(settings | changes)
    return args, given | changes.keys()


def must_resume(args):
    """Whether the run goes on: by --resume, or as torchrun --max-restarts began it again and has a state.

    On several machines only some may count the restart: if one does, all go on.
    """
    restarted = any_process(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    has_state = any((Path(args.out_dir) / name).exists() for name in ("state", "state.previous"))
    return args.resume or restarted and has_state


def restore_arguments(args, given, saved, fixed):
    """Give args the saved run's values. What was given now replaces them, but not those named in `fixed`."""
    for name in fixed:
        refuse(name in given and getattr(args, name) != saved.get(name),
               f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {saved.get(name)} of the "
               "run that --resume continues: leave it out, or start another run with another --out-dir")
    for name, value in saved.items():
        if name not in given and name not in NOT_RESTORED:
            setattr(args, name, value)


def check_rows(args, state, rows):
    """A step of a resumed run must have as many rows as before, however they are divided among processes."""
    if state and state["rows"] != rows:
        raise InputError(f"a step of the run that --resume continues has {state['rows']} rows, and {rows} "
                         f"with --batch-size {args.batch_size}, --grad-accum {args.grad_accum} and world "
                         f"size {world_size()}: change one of them")


class RunFolder:
    """OUT and the lines on the terminal. Only the first process writes.

    state: of the run that is resumed; None for a new one, and an earlier run in the folder is moved aside.
    """

    def __init__(self, args, state, last_step):
        self.path, self.last_step = Path(args.out_dir), last_step
        self.step = self.saved_at = state["step"] if state else 0
        self.seconds_before, self.started = state["seconds"] if state else 0.0, time.perf_counter()
        self.times, self.rows = [], []  # seconds of each step; rows of metrics.jsonl
        self.bar = tqdm(total=last_step, initial=self.step, unit=" steps", dynamic_ncols=True, delay=1e-3,
                        disable=None if is_first() else True)
        if is_first():
            names = ("state", "state.previous", "summary.json")
            if state is None and any((self.path / name).exists() for name in names):
                aside = move_aside(self.path)
                say(f"{self.path} held an earlier run: moved to {aside} (to go on with it: --resume "
                    f"--out-dir {aside})")
            self.path.mkdir(parents=True, exist_ok=True)
            if state is not None:
                logged = read_metrics(self.path / "metrics.jsonl")
                self.rows = [row for row in logged if row["step"] <= self.step]
            write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def last(self, key):
        """The last value that was logged under this name, by an earlier process of the run too, or None."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def is_done(self):
        """Whether a resumed run has nothing left to do and its summary is there: it is left as it is."""
        done = self.step >= self.last_step and (self.path / "summary.json").exists()
        if done:
            say(f"{self.path} has its {self.step} steps already (--max-iters or --stop-at beyond {self.step} "
                "go on)")
        return done

    def advance(self, seconds):
        self.step += 1
        self.times.append(seconds)
        self.bar.update()

    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.started

    def step_seconds(self, last=0):
        """The median time of a step, of the last ones if so many are given."""
        return statistics.median(self.times[-last:] or [self.seconds() / max(1, self.step)])

    def log(self, line, **row):
        """A line of metrics.jsonl, and one on the terminal."""
        if is_first():
            self.rows.append(dict(step=self.step, **row))
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
            left = time.strftime("%H:%M:%S", time.gmtime((self.last_step - self.step) * self.step_seconds()))
            self.bar.write(f"step {self.step} loss {row['loss']:.4f} lr {row['lr']:.1e} {line} left {left}")
            if row.get("val_loss") is not None:
                self.bar.write(f"step {self.step} val_loss {row['val_loss']:.4f}")

    def saved(self):
        """Every process has reached this place, and the state of this step is on disk."""
        barrier()
        self.saved_at = self.step

    def finish(self, device, **summary):
        """summary.json: what is given, and what the run took, over all its processes."""
        self.bar.close()
        memory, seconds = peak_memory(device.torch_device), self.seconds()
        cost = dict(
            peak_memory_bytes=int(all_reduce(memory, dist.ReduceOp.MAX)),
            peak_memory_bytes_total=int(all_reduce(memory)), seconds=seconds, devices=world_size(),
            device_hours=world_size() * seconds / 3600, device=device.name, dtype=str(device.dtype)[6:])
        if is_first():
            write_atomic(self.path / "summary.json", json.dumps(summary | cost, indent=2, default=str) + "\n")

    def not_finite(self, what, args, step):
        return InputError(f"{what} at step {step}: the run stops, {self.path}/state keeps step "
                          f"{self.saved_at}. A smaller --lr than {args.lr:g} usually helps")

    def check_finite(self, strategy, args):
        """Refuse, in all processes, to replace a good state by one with parameters that are not finite."""
        if any_process(not strategy.is_finite()):
            raise self.not_finite("some weights are not finite", args, self.step)

    def say_stopped(self, script, signal_name):
        """The last lines of a run that was stopped; returns its exit code."""
        say(f"stopped by {signal_name} after step {self.step}, saved; go on with")
        say(f"    python {script} --resume --out-dir {self.path}")
        return 130 if signal_name == "SIGINT" else 143


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is dropped."""
    rows, path = [], Path(path)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(folder, title):
    """OUT/loss.png: training loss of every logged step and validation loss where it was taken."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    logged = read_metrics(folder / "metrics.jsonl")
    for key, label, marker in (("loss", "training", ""), ("val_loss", "validation", "o")):
        rows = [row for row in logged if row.get(key) is not None]
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], label=label, marker=marker, ms=4)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(folder / "loss.partial.png")
    plt.close(fig)
    os.replace(folder / "loss.partial.png", folder / "loss.png")
