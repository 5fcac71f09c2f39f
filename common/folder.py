"""The folder of a run.

    OUT/metrics.jsonl    a line for each logged step: {"step": 10, "loss": 7.1, ...}
    OUT/summary.json     one object at the end: parameters, losses, tokens/s, memory, seconds, device, arguments
    OUT/loss.png         the plot
"""
import json
import os
from pathlib import Path

from common.cli import write_atomic
from common.processes import rank


class RunFolder:
    """metrics.jsonl, summary.json and the plot. Only the first process writes."""

    def __init__(self, path, resume_step=None):
        self.path = Path(path)
        self.file = None
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            metrics = self.path / "metrics.jsonl"
            kept = [] if resume_step is None else [r for r in read_metrics(metrics) if r["step"] <= resume_step]
            write_atomic(metrics, "".join(json.dumps(r) + "\n" for r in kept))
            self.file = open(metrics, "a")

    def log(self, **row):
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def rows(self):
        return read_metrics(self.path / "metrics.jsonl")

    def last(self, key):
        """The last value that was logged under this name, by an earlier process of the run too; None if there is none."""
        return next((r[key] for r in reversed(self.rows()) if key in r), None)

    def finish(self, **summary):
        if self.file:
            self.file.close()
            write_atomic(self.path / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is dropped."""
    rows = []
    for line in (Path(path).read_text().splitlines() if Path(path).exists() else ()):
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
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for key, style in (("loss", dict(lw=1.2)), ("val_loss", dict(marker="o", ms=4, lw=1.5))):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[key], **style)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    if ax.get_lines():
        ax.legend()
    partial = Path(folder) / "loss.partial.png"
    fig.savefig(partial)
    plt.close(fig)
    os.replace(partial, Path(folder) / "loss.png")
