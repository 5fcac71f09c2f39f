"""Decompose a pretrained model in parallel: W -> B A for every linear layer of the blocks (section IV).

    python decompose.py --model smollm2-135m --rank 128                      the truncated SVD of every matrix
    python decompose.py --model smollm2-135m --ratio 0.6 --calibration TEXT  keep 60%, fitted to a text
    torchrun --nproc_per_node 4 decompose.py --model llama2-7b --ratio 0.5   divided among processes or GPUs
    python train.py --method 2 --init-from out/decomposed                    recover what was lost

The output is a model folder (eval.py, sample.py and train.py --init-from read it) with summary.json. `python
serve.py --model OUT --teach` shows the spectra on its page.

Plain: every matrix is replaced by the nearest one of its rank (lowrank.svd_factors). Processes need nothing
from each other: each has a share of the matrices, and leaves in OUT.work what it is done with.
With --calibration: by the one whose outputs for a text are nearest, block by block (beyond/activations.py).

Ranks (--ratio): one budget of parameters for all matrices, spent where a parameter saves most. Without a text
each matrix counts the same: its eigenvalues are taken relative to their sum.
"""
import json
import math
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import build, open_dense, write_config
from common import cli
from common.cli import InputError, Parser, at_least_1, check_folder, command, say, share, write_atomic
from common.data import calibration_batches
from common.device import find_device, peak_memory
from common.processes import barrier, in_turn, is_first, process_group, rank, world_size
from common.storage import read_tensors, write_tensors
from lowrank import gram, millions, svd_factors
from model import count_parameters

# ----------------------------------------------------------------------------- what is done, and by whom

class Work:
    """OUT.work, where processes leave what they are done with: a layer's eigenvalues, its factors."""

    def __init__(self, source, out, shapes):
        self.source, self.out, self.shapes = source, Path(out), shapes
        self.folder, self.started = self.out.with_name(f"{self.out.name}.work"), time.perf_counter()
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
            self.folder.mkdir(parents=True)
        barrier()

    def save_factors(self, name, B, A):
        """In the dtype of the layer's weight."""
        dtype = self.source.get(f"{name}.weight").dtype
        write_tensors(self.folder / f"{name}.safetensors", dict(B=B.to(dtype).cpu(), A=A.to(dtype).cpu()))

    def factors(self, name):
        """{"A": (r, in), "B": (out, r)} of a layer that is done."""
        return dict(read_tensors(self.folder / f"{name}.safetensors"))

    def save_eigenvalues(self, name, values):
        write_atomic(self.folder / f"{name}.json", json.dumps(values.tolist()))

    def eigenvalues(self):
        """Of all layers: name -> (m,)."""
        barrier()
        saved = {name: json.loads((self.folder / f"{name}.json").read_text()) for name in self.shapes}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in saved.items()}

    def read_tensor(self, name):
        tensor = self.source.get(name)
        if not tensor.isfinite().all():
            raise InputError(f"{self.source.path}: {name} has numbers that are not finite: get it again")
        return tensor

    def mine(self, names):
        """This process's share of some layers. They are dealt out, the most expensive first."""
        def cost(name):
            return min(self.shapes[name]) ** 2 * max(self.shapes[name])
        return sorted(names, key=cost, reverse=True)[rank()::world_size()]

    def bar(self, items, doing):
        return tqdm(items, desc=doing, disable=None if is_first() else True, leave=False, dynamic_ncols=True)


class Plain:
    """Decompose the weights as they are."""

    def __init__(self, work):
        self.work = work

    def weights(self, names, doing, device):
        for name in self.work.bar(self.work.mine(names), doing):
            yield name, self.work.read_tensor(f"{name}.weight").to(device).float()

    def losses(self, device):
        """What it costs to cut off each eigenvalue of each matrix: name -> (m,), largest first."""
        for name, W in self.weights(self.work.shapes, "eigenvalues", device):
            values = torch.linalg.eigvalsh(gram(W.double())).flip(-1).clamp_min(0)
            self.work.save_eigenvalues(name, values)
        return {name: v / v.sum().clamp_min(1e-300) for name, v in self.work.eigenvalues().items()}

    def decompose(self, ranks, device):
        for name, W in self.weights([name for name, r in ranks.items() if r], "decomposing", device):
            self.work.save_factors(name, *svd_factors(W, ranks[name])[0])


# ----------------------------------------------------------------------------- ranks under one budget

def dense_from(shape):
    """The rank from which on a factorization is not smaller than the matrix."""
    return -(-shape[0] * shape[1] // sum(shape))


def size(shape, r):
    """Parameters of a matrix kept at rank r; rank 0 means that it stays dense."""
    return r * sum(shape) if r else shape[0] * shape[1]


def same_ranks(shapes, r):
    """One rank for all, where that makes a matrix smaller; 0 elsewhere."""
    ranks = {name: r if r < dense_from(shape) else 0 for name, shape in shapes.items()}
    if not any(ranks.values()):
        largest = max(map(dense_from, shapes.values())) - 1
        raise InputError(f"--rank {r} would make no matrix smaller: the largest rank that does is {largest}")
    return ranks


def choose_ranks(losses, shapes, ratio):
    """The ranks (0: dense) within ratio x all parameters that lose least. losses: as of Plain.losses.

    A rank is worth buying if what it saves exceeds the price of its parameters. At any price each matrix has
    a best rank of its own; the price at which the purchases just fit the budget is found by bisection. A
    matrix whose rank would come near the point where B A is no smaller than W does better to stay dense."""
    budget = ratio * sum(a * b for a, b in shapes.values())
    everything = sum(v.double().sum() for v in losses.values()).clamp_min(1e-300)
    curves = {}  # name -> what is lost and what is paid at rank 1, 2, ... and, last, dense
    for name, (a, b) in shapes.items():
        loss = losses[name].double() / everything
        lost = (loss.sum() - loss.cumsum(0))[:dense_from((a, b)) - 1].clamp_min(0)
        paid = (a + b) * torch.arange(1, len(lost) + 1, dtype=torch.float64)
        curves[name] = F.pad(lost, (0, 1)), F.pad(paid, (0, 1), value=a * b)

    def buy(log_price):
        price = math.exp(log_price)
        chosen = {name: int((lost + price * paid).argmin()) for name, (lost, paid) in curves.items()}
        return chosen, sum(curves[name][1][i].item() for name, i in chosen.items())

    low, high = -80.0, 20.0  # logarithms of prices at which everything is bought, and rank 1 alone
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if buy(middle)[1] > budget else (low, middle)
    chosen, spent = buy(high)
    while True:  # a matrix that becomes dense at once leaves some of the budget: single ranks for it
        gains = {}
        for name, i in chosen.items():
            lost = curves[name][0]
            if i + 2 < len(lost) and sum(shapes[name]) <= budget - spent:
                gains[name] = (lost[i] - lost[i + 1]).item() / sum(shapes[name])
        if not gains:
            return {name: 0 if i == len(curves[name][0]) - 1 else i + 1 for name, i in chosen.items()}
        best = max(gains, key=gains.get)
        chosen[best] += 1
        spent += sum(shapes[best])


# ----------------------------------------------------------------------------- the result

def finish(work, ranks, args, device):
    """From what is done: the shards of the model, config.json and summary.json."""
    source, out = work.source, work.folder / "model"
    layers = {name: dict(kind="lowrank", rank=r) for name, r in ranks.items() if r}
    out.mkdir()
    files = write_shards(work, layers, out)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save(out)
    path = Path(args.model)
    model = str(path.resolve()) if path.exists() else args.model  # train.py finds it wherever it is started
    write_config(out, source.config, layers, files, decomposed_from=model)
    before, after = (count_parameters(build(source.config, swapped)) for swapped in ({}, layers))
    whole = sum(size(shape, 0) for shape in work.shapes.values())
    kept = sum(size(shape, ranks[name]) for name, shape in work.shapes.items()) / whole
    say(f"{len(layers)} of {len(ranks)} matrices low-rank, {millions(before)} -> {millions(after)} "
        f"parameters ({before / after:.2f}x), {kept:.1%} of the blocks' matrices: {work.out}")
    summary = dict(parameters=after, parameters_full_rank=before, compression=before / after,
                   block_share=kept, ranks=ranks, seconds=time.perf_counter() - work.started,
                   peak_memory_bytes=peak_memory(device), processes=world_size(), device=str(device),
                   arguments=vars(args))
    write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    os.replace(out, work.out)


def write_shards(work, layers, out):
    """One for each block, and one for the rest: factors where there are any, else what there was."""
    shards = defaultdict(list)
    for name in work.source.shapes:
        shards["-".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"].append(name)
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in layers:
                tensors |= {f"{layer}.{key}": t for key, t in work.factors(layer).items()}
            else:
                tensors[name] = work.source.get(name)
        write_tensors(out / f"model-{shard}.safetensors", tensors)
    return [f"model-{shard}.safetensors" for shard in shards]


# ----------------------------------------------------------------------------- the command

def parse(argv):
    p = Parser(__doc__)
    p.add_argument("--model", required=True, help="a known name, a folder or a file; dense")
    kept = p.add_mutually_exclusive_group(required=True)
    kept.add_argument("--rank", type=at_least_1, help="of every linear layer of the blocks; what this would "
                      "not make smaller stays dense")
    kept.add_argument("--ratio", type=share, help="or: the share of the blocks' matrices to keep, with ranks "
                      "chosen under this budget")
    p.add_argument("--calibration", metavar="TEXT", help="keep the outputs for this text, not the weights: a "
                   "file, a folder or builtin (default: none, plain SVD)")
    p.add_argument("--out-dir", default="out/decomposed", help="the new model folder (default: %(default)s)")
    args = p.parse_args(argv)
    check_folder(args.out_dir, new=True)
    return args


def decompose(args, source, device):
    shapes = {n[:-7]: s for n, s in source.shapes.items() if n.startswith("blocks.") and len(s) == 2}
    least = sum(map(sum, shapes.values())) / sum(a * b for a, b in shapes.values())
    if args.ratio and args.ratio < least:
        raise InputError(f"--ratio {args.ratio} is less than rank 1 everywhere, which is {least:.4f}")
    ranks = same_ranks(shapes, args.rank) if args.rank else None
    if args.calibration:
        from beyond.activations import Calibrated
        windows = calibration_batches(args.calibration, source.tokenizer(), source.config.context)
    work = Work(source, args.out_dir, shapes)
    try:
        method = Calibrated(work, windows) if args.calibration else Plain(work)
        ranks = ranks or choose_ranks(method.losses(device), shapes, args.ratio)
        method.decompose(ranks, device)
        barrier()
        if is_first():
            finish(work, ranks, args, device)
        barrier()
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    device = find_device("float32")
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the small eigenvalues
    say(f"device {device.name}, processes: {world_size()}")
    with cli.alone_in(args.out_dir), process_group():
        decompose(args, in_turn(open_dense, args.model), device.torch_device)
    return 0


if __name__ == "__main__":
    command(main)
