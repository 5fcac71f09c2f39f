"""Decompose a pretrained model in parallel: W -> B A for every linear layer of the blocks (sections IV.A, method 2, and IV.B).

    python decompose.py --model smollm2-135m --rank 128 --out-dir out/r128                        the truncated SVD of every matrix
    python decompose.py --model smollm2-135m --ratio 0.6 --calibration my_books/ --out-dir out/60   60% of the blocks' parameters stay
    torchrun --nproc_per_node 4 decompose.py --model llama2-7b --ratio 0.5 --out-dir out/llama    the work divided among 4 processes or GPUs
    python train.py --method 2 --init-from out/60                                                 recover what was lost

OUT is a model folder (eval.py, sample.py and train.py --init-from read it) with spectra.png and summary.json. Run a killed command again:
it goes on from the parts that were finished.

Plain.  Every matrix is replaced by the nearest one of its rank (factorize.py). The same kind of matrix of all layers is one batch; kinds go to
different processes, which need nothing from each other, read only what they decompose, and each write their own shards.

With activations (--calibration).  Every matrix is replaced by the one of its rank whose outputs for some text are nearest. A layer's inputs
must be those that the layers before it give now that they are decomposed: so it makes good what it can of their errors. Hence an order, in
each block:

    q, k, v   ->   o   ->   gate, up   ->   down            an arrow: run the text through what has just been decomposed

The text is what there is most to compute with, and it divides: each process takes its share of the windows, and the moments X X^T are added
up. Kinds within one step go to different processes; between the steps there is nothing to do in parallel, so processes beyond three help
with the text alone. A block is read when its turn comes and written when it is done: one block has to fit in memory, not the model.

Ranks (--ratio).  One budget of parameters for all matrices, spent where a parameter saves most. But errors in the y of different layers can't
be compared: some y are large because a few tokens are (and a norm follows), some are small and matter much. What counts is the model's
loss. An error d in y changes it by about (g d)^2 / 2, g = d loss / d y: so eigenvalues are weighted with the mean square of g, from a
backward pass over a few windows of the text (`sensitivities`). Without a text, each matrix counts the same: its eigenvalues are taken
relative to their sum.
"""
import argparse
import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from common.watchdog import Watchdog
from tqdm import tqdm

from beyond.factorize import (
    check_ratio,
    choose_ranks,
    dense_from,
    eigenvalues,
    factorize,
    prepare,
    same_ranks,
    size,
    uniform_ranks,
)
from checkpoint import build, locate, open_dense, place, write_config
from common.cli import InputError, check_folder, command, say, write_atomic
from common.data import calibration_batches, open_corpus
from common.device import find_device, peak_memory
from common.loss import head_loss
from common.processes import rank, world_size
from common.storage import read_tensors, write_tensors
from lowrank import LowRankLinear
from model import Transformer, count_parameters

BATCH_BYTES = 1 << 30    # matrices that are decomposed at once
SENSITIVITY_WINDOWS = 8  # of the calibration text


# ----------------------------------------------------------------------------- what is finished

class Parts:
    """OUT/work: the parts of a run that are done. A part is a shard of the model (or none) and a JSON file, written last."""

    def __init__(self, out, plan):
        self.out, self.work, self.plan = Path(out), Path(out) / "work", plan
        problem = self.begin() if rank() == 0 else None
        if problem := from_first(problem):
            raise InputError(problem)
        self.done = set(from_first(sorted(p.stem for p in self.work.glob("*.json")) if rank() == 0 else None))

    def begin(self):
        """Make the folder or find the same run in it; returns what is wrong."""
        file = self.out / "work" / "plan"
        if file.exists():
            old = json.loads(file.read_text())
            if changed := [k for k in self.plan if old.get(k) != self.plan[k]]:
                k = changed[0]
                return (f"{self.out} holds an unfinished run with {k} {old.get(k)}, not {self.plan[k]}: finish it with the same arguments, "
                        "remove the folder, or choose another --out-dir")
            say(f"{self.out} holds an unfinished run: going on with it")
        elif self.out.exists() and any(self.out.iterdir()):
            return f"{self.out} is not empty: choose a new folder"
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(self.plan) + "\n")

    def shard(self, part):
        return self.out / f"model-{part}.safetensors"

    def save(self, part, rows, tensors=None):
        if tensors:
            write_tensors(self.shard(part), tensors)
        write_atomic(self.work / f"{part}.json", json.dumps(rows) + "\n")

    def rows(self, part):
        return json.loads((self.work / f"{part}.json").read_text())


def from_first(value):
    """What the first process has, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def from_all(rows):
    """The lists of all processes as one."""
    if world_size() == 1:
        return rows
    boxes = [None] * world_size()
    dist.all_gather_object(boxes, rows)
    return [row for box in boxes for row in box]


def wait():
    if world_size() > 1:
        dist.barrier()


def share_out(costs):
    """Which process does what: the largest first, each to the one that has least to do."""
    load, owner = [0] * world_size(), {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += costs[name]
    return owner


def cost(shape):
    """Operations, roughly: the products and the eigenproblem."""
    m = min(shape)
    return m * m * max(shape) + 5 * m ** 3


def row_of(name, shape, r, values, seconds):
    """What is remembered of a matrix."""
    total, kept = values.sum().item(), values[:r or None].sum().item()
    return dict(name=name, kind=name.rsplit(".", 1)[1], shape=list(shape), rank=r, kept=kept / total if total else 1.0, seconds=seconds,
                spectrum=[float(f"{v:.4g}") for v in values.tolist()])


def layer_tensors(name, source, factors):
    """What a shard keeps of a layer: its factors, or its weight where it stays dense, in the dtype in which the model came; and its bias."""
    weight = source.get(f"{name}.weight")
    tensors = {f"{name}.weight": weight} if factors is None else {f"{name}.{k}": t.to(weight.dtype).cpu() for k, t in zip("BA", factors)}
    if f"{name}.bias" in source.names:
        tensors[f"{name}.bias"] = source.get(f"{name}.bias")
    return tensors


# ----------------------------------------------------------------------------- plain

def batches_of(shapes):
    """One batch for each kind, or several where one would not fit: part's name -> layers."""
    kinds = defaultdict(list)
    for name in shapes:
        kinds[name.rsplit(".", 1)[1]].append(name)
    batches = {}
    for kind, names in kinds.items():
        a, b = shapes[names[0]]
        many = max(1, BATCH_BYTES // (4 * (a * b + 6 * min(a, b) ** 2)))
        batches |= {f"{kind}-{i:03d}": names[i:i + many] for i in range(0, len(names), many)}
    return batches


def read(source, name):
    tensor = source.get(name)
    if not tensor.isfinite().all():
        raise InputError(f"{source.path}: {name} has numbers that are not finite: get the files again")
    return tensor


def read_batch(source, names, device):
    """W (L, out, in) of layers of one shape."""
    return torch.stack([read(source, f"{n}.weight").to(device).float() for n in names])


def plain(source, parts, shapes, device, ranks, choose):
    """Decompose every kind as one batch. ranks None: choose(spectra) gives them, when the eigenvalues are known."""
    batches = batches_of(shapes)
    owner = share_out({part: len(names) * cost(shapes[names[0]]) for part, names in batches.items()})
    mine = [part for part in batches if owner[part] == rank()]
    if ranks is None:
        for part in bar([p for p in mine if f"spectra-{p}" not in parts.done], "spectra", "kinds"):
            values = eigenvalues(read_batch(source, batches[part], device))
            parts.save(f"spectra-{part}", {n: v.tolist() for n, v in zip(batches[part], values)})
        wait()
        spectra = {n: torch.tensor(v, dtype=torch.float64) for part in batches for n, v in parts.rows(f"spectra-{part}").items()}
        ranks = choose({n: v / v.sum().clamp_min(1e-300) for n, v in spectra.items()})  # what is small in one matrix counts as in another
    for part in bar([p for p in mine if p not in parts.done], "decomposing", "kinds"):
        start, names = time.perf_counter(), batches[part]
        factors, values = factorize(read_batch(source, names, device), [ranks[n] or 1 for n in names])
        each, tensors = (time.perf_counter() - start) / len(names), {}
        for n, f in zip(names, factors):
            tensors |= layer_tensors(n, source, f if ranks[n] else None)
        parts.save(part, [row_of(n, shapes[n], ranks[n], v, each) for n, v in zip(names, values)], tensors)
    return list(batches)


# ----------------------------------------------------------------------------- with activations

def second_moments_of(inputs, width, device):
    """H = X X^T (in, in) over the inputs [(B, T, in)] of all processes, with the same bits however many share the text.

    Sums of floating-point numbers depend on their order. Each window's moments are rounded to a fixed point 2^40 below the largest, far
    finer than their own float32: sums of such numbers are exact in float64.
    """
    largest = torch.tensor(max([x.square().sum().item() for x in inputs], default=0.0), dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    if not 0 < largest < math.inf:
        raise InputError(f"the inputs of a layer add up to {largest.item()} on the calibration text: is the model whole, and the text of its language?")
    unit = 2.0 ** (math.floor(math.log2(largest)) - 40)
    H = torch.zeros(width, width, dtype=torch.float64, device=device)
    for x in inputs:
        flat = x.reshape(-1, width)  # (tokens, in)
        H += (flat.T @ flat).div_(unit).round_()  # a power of two: exact in float32
    if world_size() > 1:
        dist.all_reduce(H)
    return H * unit


def moments_of(inputs, shapes, device):
    return prepare(second_moments_of(inputs, shapes[0][1], device), *shapes)


class Pieces:
    """A model on the meta device. What is needed of it is read from its files, and forgotten after use."""

    def __init__(self, source, device):
        self.source, self.device = source, device
        with torch.device("meta"):
            self.model = Transformer(source.config).eval().requires_grad_(False)

    def load(self, *prefixes):
        for name in self.source.names:
            if name.startswith(prefixes):
                place(self.model, name, read(self.source, name), self.device, torch.float32)
        self.model.tie()
        return self.model

    def begin(self, windows):
        """(x, rope, mask) of each window (1, T), as they enter the first block."""
        model = self.load("embed.", "positions.")
        streams = [model.begin(tokens.to(self.device)) for tokens in windows]
        self.model.embed.to("meta")
        return streams

    def blocks(self, doing, order=1):
        """(i, block), one in memory at a time."""
        for i in bar(range(self.source.config.blocks)[::order], doing, "blocks"):
            yield i, self.load(f"blocks.{i}.").blocks[i]
            self.model.blocks[i].to("meta")


def walk(source, windows, device, visitor):
    """Run the windows [(1, T)] through the model. Before they pass through layers that share an input, visitor.visit(i, half of block,
    {name: attribute}, inputs) may change these layers; visitor.leave(i) ends block i."""
    pieces = Pieces(source, device)
    streams = pieces.begin(windows)
    for i, block in pieces.blocks(visitor.doing):
        for half, norm in (("attention", block.norm1), ("mlp", block.norm2)):
            part = getattr(block, half)
            *first, last = [name for name, m in part.named_children() if isinstance(m, nn.Linear)]
            inputs = [norm(x) for x, _, _ in streams]
            visitor.visit(i, part, {f"blocks.{i}.{half}.{name}": name for name in first}, inputs)
            taken_out = getattr(part, last)
            setattr(part, last, nn.Identity())  # without its last layer, the half returns that layer's input
            inputs = [part(h, rope, None, mask) if half == "attention" else part(h) for h, (_, rope, mask) in zip(inputs, streams)]
            setattr(part, last, taken_out)
            visitor.visit(i, part, {f"blocks.{i}.{half}.{last}": last}, inputs)
            streams = [(x + getattr(part, last)(h), rope, mask) for h, (x, rope, mask) in zip(inputs, streams)]
        visitor.leave(i)


def sensitivities(source, windows, device):
    """What an error in a layer's output costs: name -> mean square of d(loss of the text)/dy, over tokens and channels, window by window.

    A backward pass that keeps the inputs of blocks alone and computes the rest again, a block at a time, as in recompute.py.
    """
    pieces, inputs, found = Pieces(source, device), [], defaultdict(list)
    streams = pieces.begin(windows)
    for _, block in pieces.blocks("sensitivities, forward"):
        inputs.append([x for x, _, _ in streams])
        streams = [(block(x, rope, None, mask), rope, mask) for x, rope, mask in streams]
    model, gradients = pieces.load("norm.", "head.", *(["embed."] if source.config.tied else [])), []
    with torch.enable_grad():
        for (x, _, _), tokens in zip(streams, windows):
            x = x[:, :-1].requires_grad_()
            loss = head_loss(model.head, model.norm(x), tokens[:, 1:].to(device)) * (tokens.numel() - 1)
            gradients.append(nn.functional.pad(torch.autograd.grad(loss, x)[0], (0, 0, 0, 1)))  # the last token predicts nothing
    for i, block in pieces.blocks("sensitivities, backward", -1):
        hooks = [m.register_full_backward_hook(lambda m, _, g, name=f"blocks.{i}.{name}": found[name].append(g[0].square().mean().item()))
                 for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        with torch.enable_grad():
            for n, (_, rope, mask) in enumerate(streams):
                x = inputs[i][n].requires_grad_()
                gradients[n], = torch.autograd.grad(block(x, rope, None, mask), x, gradients[n])
        for hook in hooks:
            hook.remove()
        inputs.pop()
    return found


class Spectra:
    """The first walk, through the dense model: the eigenvalues that ranks are chosen by."""
    doing = "spectra"

    def __init__(self, parts, shapes, device):
        self.parts, self.shapes, self.device, self.found = parts, shapes, device, []

    def part(self, i):
        return f"spectra-{i:04d}"

    def visit(self, i, half, names, inputs):
        if self.part(i) in self.parts.done:
            return
        moments = moments_of(inputs, [self.shapes[n] for n in names], self.device)
        owner = share_out({n: cost(self.shapes[n]) for n in names})
        for name, attribute in names.items():
            if owner[name] == rank():
                self.found.append((name, eigenvalues(getattr(half, attribute).weight[None], *moments)[0].tolist()))

    def leave(self, i):
        found, self.found = from_all(self.found), []
        if found and rank() == 0:
            self.parts.save(self.part(i), dict(found))


class Factors:
    """The second walk, or the only one: each layer is decomposed for the inputs it now has, and takes its place before the text goes on."""
    doing = "decomposing"

    def __init__(self, source, parts, shapes, device, ranks):
        self.source, self.parts, self.shapes, self.device, self.ranks = source, parts, shapes, device, ranks
        self.rows, self.tensors = [], {}

    def part(self, i):
        return f"block-{i:04d}"

    def visit(self, i, half, names, inputs):
        if self.part(i) in self.parts.done:
            self.tensors = self.tensors or dict(read_tensors(self.parts.shard(self.part(i))))
        else:
            self.decompose(half, names, inputs)
        for name, attribute in names.items():
            if self.ranks[name]:
                dense = getattr(half, attribute)
                layer = LowRankLinear(dense.in_features, dense.out_features, self.ranks[name], dense.bias is not None)
                layer.load_state_dict({k: self.tensors[f"{name}.{k}"] for k in layer.state_dict()})
                setattr(half, attribute, layer.to(self.device))

    def decompose(self, half, names, inputs):
        moments = moments_of(inputs, [self.shapes[n] for n in names], self.device)
        owner = share_out({n: cost(self.shapes[n]) for n in names})
        for name, attribute in names.items():
            weight, r, factors = getattr(half, attribute).weight, self.ranks[name], None
            if owner[name] == rank():
                start = time.perf_counter()
                [factors], values = factorize(weight[None], [r or 1], moments)
                self.rows.append(row_of(name, self.shapes[name], r, values[0], time.perf_counter() - start))
            self.tensors |= layer_tensors(name, self.source, from_owner(factors, weight, r, owner[name]) if r else None)

    def leave(self, i):
        rows = sorted(from_all(self.rows), key=lambda row: list(self.shapes).index(row["name"]))
        if rows and rank() == i % world_size():
            self.parts.save(self.part(i), rows, self.tensors)
        self.rows, self.tensors = [], {}


def from_owner(factors, weight, r, owner):
    """The factors in every process."""
    if world_size() == 1:
        return factors
    factors = factors or (weight.new_empty(weight.shape[0], r), weight.new_empty(r, weight.shape[1]))
    for t in factors:
        dist.broadcast(t, owner)
    return factors


def calibrated(source, parts, shapes, windows, device, ranks, choose):
    """Decompose block after block for the inputs that the text gives. ranks None: choose(spectra) gives them, after a walk of its own."""
    mine, blocks = windows[rank()::world_size()], range(source.config.blocks)
    if ranks is None:
        spectra = Spectra(parts, shapes, device)
        if not all(spectra.part(i) in parts.done for i in blocks):
            walk(source, mine, device, spectra)
        if "sensitivities" not in parts.done:
            found = from_all([sensitivities(source, windows[:SENSITIVITY_WINDOWS][rank()::world_size()], device)])
            if rank() == 0:  # summed in one order, whoever found them
                parts.save("sensitivities", {n: sum(sorted(g for f in found for g in f.get(n, []))) for n in shapes})
        wait()
        weights = parts.rows("sensitivities")
        ranks = choose({n: weights[n] * torch.tensor(v, dtype=torch.float64) for i in blocks for n, v in parts.rows(spectra.part(i)).items()})
    factors = Factors(source, parts, shapes, device, ranks)
    walk(source, mine, device, factors)
    return [factors.part(i) for i in blocks]


# ----------------------------------------------------------------------------- the run

def bar(items, doing, unit):
    return tqdm(items, desc=doing, unit=f" {unit}", disable=None if rank() == 0 else True, leave=False, dynamic_ncols=True)


def finish(source, parts, names, args, device, seconds):
    """The tensors that no part has, config.json, the spectra's picture, and the account of it all."""
    out, rows = parts.out, [row for name in names for row in parts.rows(name)]
    linears = {f"{r['name']}.{k}" for r in rows for k in ("weight", "bias")}
    write_tensors(parts.shard("rest"), {n: source.get(n) for n in source.names if n not in linears})
    if (tokenizer := source.tokenizer()) is not None:
        tokenizer.save(out)
    layers = {r["name"]: dict(kind="lowrank", rank=r["rank"]) for r in rows if r["rank"]}
    write_config(out, source.config, layers, [parts.shard(n).name for n in [*names, "rest"]], decomposed_from=origin(args.model))
    plot_spectra(out / "spectra.png", rows, f"{args.model}: {'activations' if args.calibration else 'weights'}")
    kinds = by_kind(rows)
    print_table(kinds)
    with torch.device("meta"):
        before = count_parameters(Transformer(source.config))
    after = count_parameters(build(source.config, layers))
    block_share = sum(size(r["shape"], r["rank"]) for r in rows) / sum(size(r["shape"], 0) for r in rows)
    say(f"{len(layers)} of {len(rows)} matrices low-rank, {before / 1e6:,.1f}M -> {after / 1e6:,.1f}M parameters ({before / after:.2f}x), "
        f"{block_share:.1%} of the blocks' matrices: {out}")
    summary = dict(parameters=after, parameters_full_rank=before, compression=before / after, block_share=block_share, kinds=kinds,
                   ranks={r["name"]: r["rank"] for r in rows}, kept={r["name"]: r["kept"] for r in rows}, seconds=seconds,
                   peak_memory_bytes=peak_memory(device), processes=world_size(), device=str(device), arguments=vars(args), plan=parts.plan)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(parts.work)


def origin(model):
    """A folder's name that holds wherever train.py is started."""
    return str(Path(model).resolve() if Path(model).exists() else model)


def by_kind(rows):
    """A line of the table for each kind of matrix."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    lines = []
    for kind, group in kinds.items():
        ranks = [r["rank"] for r in group if r["rank"]]
        lines.append(dict(kind=kind, shape=group[0]["shape"], matrices=len(group), dense=len(group) - len(ranks),
                          rank_least=min(ranks, default=0), rank_mean=sum(ranks) / max(1, len(ranks)), rank_most=max(ranks, default=0),
                          kept_least=min(r["kept"] for r in group), kept_mean=sum(r["kept"] for r in group) / len(group),
                          seconds=sum(r["seconds"] for r in group)))
    return lines


def print_table(kinds):
    say(f"{'kind':6}{'matrices':>9}{'dense':>6}{'shape':>13}{'rank':>6}{'least':>6}{'most':>6}{'energy kept':>13}{'least':>8}{'seconds':>9}")
    for k in kinds:
        say(f"{k['kind']:6}{k['matrices']:9}{k['dense']:6}{'x'.join(map(str, k['shape'])):>13}{k['rank_mean']:6.0f}{k['rank_least']:6}"
            f"{k['rank_most']:6}{k['kept_mean']:13.2%}{k['kept_least']:8.2%}{k['seconds']:9.2f}")


def plot_spectra(path, rows, title):
    """For each kind the singular values of all layers, each curve relative to its first, from the first layer (dark) to the last; a dot at the rank."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    columns = min(4, len(kinds))
    fig, axes = plt.subplots(-(-len(kinds) // columns), columns, figsize=(3 * columns, 2.6 * -(-len(kinds) // columns)), dpi=110, squeeze=False,
                             sharey=True, layout="constrained")
    for ax in axes.flat[len(kinds):]:
        ax.axis("off")
    for ax, kind in zip(axes.flat, kinds):
        group = [r for r in rows if r["kind"] == kind]
        for i, r in enumerate(group):
            color = plt.cm.viridis(i / max(1, len(group) - 1))
            values = [max(v / max(r["spectrum"][0], 1e-300), 1e-12) ** 0.5 for v in r["spectrum"]]
            ax.semilogy(range(1, len(values) + 1), values, lw=0.7, color=color)
            if r["rank"]:
                ax.plot(r["rank"], values[r["rank"] - 1], "o", ms=2.5, color=color)
        ax.set_title(f"{kind} {group[0]['shape'][0]}x{group[0]['shape'][1]}", fontsize=9)
        ax.grid(alpha=0.3)
    fig.suptitle(f"singular values over the largest, {title}")
    fig.savefig(path)
    plt.close(fig)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", required=True, help="a known name, a folder or a file; dense")
    g.add_argument("--rank", type=int, help="one rank for every linear layer of the blocks; where that would make no matrix smaller, it stays dense. "
                   "Embedding and head stay dense")
    g.add_argument("--ratio", type=float, help="the share of the block matrices' parameters to keep, in 0..1, instead of --rank")
    g.add_argument("--ranks", choices=("chosen", "uniform"), default="chosen", help="with --ratio: ranks chosen from the eigenvalues under one budget, or "
                   "the same share of every matrix (default: %(default)s)")
    g = p.add_argument_group("activations")
    g.add_argument("--calibration", metavar="TEXT", help="keep the outputs for this text, not the weights, as they are: a file, a folder or builtin "
                   "(default: none, plain SVD)")
    g.add_argument("--calibration-tokens", type=int, default=16384, help="how much of it is used (default: %(default)s)")
    g = p.add_argument_group("output")
    g.add_argument("--out-dir", default="out/decomposed", help="the new model folder; a killed run in it is continued (default: %(default)s)")
    return p.parse_args(argv)


def check(args):
    if (args.rank is None) == (args.ratio is None):
        raise InputError("give either --rank R or --ratio S, S the share of parameters to keep" + (", not both" if args.rank is not None else ""))
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}")
    if args.ratio is not None and not 0 < args.ratio < 1:
        raise InputError(f"--ratio must lie between 0 and 1, got {args.ratio}")
    if args.calibration_tokens < 1:
        raise InputError(f"--calibration-tokens must be at least 1, got {args.calibration_tokens}")
    check_folder(args.out_dir)


def open_in_turn(name):
    """The first process downloads the model if that is needed, then the others find it."""
    for turn in range(2):
        if (rank() == 0) == (turn == 0):
            source = open_dense(name)
        wait()
    return source


def run(args, source, device):
    started = time.perf_counter()
    shapes = {n[:-7]: s for n, s in source.shapes.items() if n.startswith("blocks.") and len(s) == 2}
    ranks = same_ranks(shapes, args.rank) if args.rank else uniform_ranks(shapes, args.ratio) if args.ranks == "uniform" else None
    if args.rank and not any(ranks.values()):
        raise InputError(f"--rank {args.rank} would make no matrix smaller: the largest rank that does is {max(map(dense_from, shapes.values())) - 1}")
    if args.ratio:
        check_ratio(shapes, args.ratio)
    windows = calibration_batches(args.calibration, source.tokenizer(), source.config.context, args.calibration_tokens) if args.calibration else None
    plan = {k: str(getattr(args, k)) for k in ("model", "rank", "ratio", "ranks", "calibration", "calibration_tokens")}
    plan |= {"the model's files": stamp(locate(args.model)), "the text": open_corpus(args.calibration, "data").key if args.calibration else "none"}
    out = Path(args.out_dir)
    if from_first(finished(out, plan) if rank() == 0 else None):
        return
    parts = Parts(out, plan)

    def choose(losses):
        return choose_ranks(losses, shapes, args.ratio)

    names = calibrated(source, parts, shapes, windows, device, ranks, choose) if windows else plain(source, parts, shapes, device, ranks, choose)
    wait()
    if rank() == 0:
        finish(source, parts, names, args, device, time.perf_counter() - started)
    wait()


def stamp(path):
    """Of the weights in a folder or file: another one when they were written anew."""
    files = [f for f in (sorted(path.iterdir()) if path.is_dir() else [path]) if f.suffix in (".safetensors", ".bin", ".pth", ".gguf")]
    return hashlib.sha256(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:12]


def finished(out, plan):
    """Whether the same command has already done its work here."""
    file = out / "summary.json"
    if not file.exists() or (out / "work").exists() or json.loads(file.read_text()).get("plan") != plan:
        return False
    say(f"{out} is already decomposed with these arguments")
    print_table(json.loads(file.read_text())["kinds"])
    return True


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    check(args)
    device = find_device("float32")
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the small eigenvalues
    say(f"device {device.name}" + (f", {world_size()} processes" if world_size() > 1 else ""))
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with Watchdog(), open_in_turn(args.model) as source:
            run(args, source, device.torch_device)
    finally:
        if world_size() > 1:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    command(main)
