"""Memory of a training step (Tables III and IV, section IV.B): bytes by kind, counted without running it.

    python bench.py memory                 both tables, the paper's figures beside ours; a row for each mode
    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block

    parameters     every weight
    gradients      as large as the weights that learn
    optimizer      AdamW's two moments (and a 32-bit copy of the weights, where they have 16 bits)
    activations    what autograd keeps of the forward pass until the backward pass: Table IV
    transient      what exists for a moment beside these: the working set of a block, of the loss

The first three follow from the shapes. The last two are read off a run on fake tensors, which have a shape, a
dtype and a storage but no memory: torch's hooks on saved tensors see each tensor that autograd keeps, and a
dispatch mode sees each tensor that comes and goes. Blocks of the same shapes keep the same, so one of each
kind is run, forward and backward: Llama2-70B takes a second.

Each storage is counted once, however many views of it are kept, and parameters never: they are there anyway.
"""
import copy
import weakref
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benches.common import PAPER, own_columns, shown, table
from checkpoint import build
from common.device import find_device
from common.loss import head_loss
from model import Attention, config_for
from recompute import MODES, use_recompute

KINDS = ("parameter", "gradient", "optimizer", "activation", "transient")
LENGTH = 4096  # of the paper's tables
DEFAULTS = dict(model="llama2-7b", batch=1, seq=LENGTH, recompute="all")


class Watch(TorchDispatchMode):
    """Adds up the bytes of the storages that were made inside and are alive; `peak` is the most there was.

    fake: for fake tensors. They have no numbers: code that reads one, to branch on it, gets True.
    """

    def __init__(self, fake=False):
        super().__init__()
        self.alive, self.peak, self.fake = 0, 0, fake

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.fake and function is torch.ops.aten._local_scalar_dense.default:
            return True
        for storage in storages((args, kwargs)):
            storage.watched = True  # not made in here, if not seen before
        out = function(*args, **(kwargs or {}))
        for storage in storages(out):
            if not hasattr(storage, "watched"):
                storage.watched, size = True, storage.nbytes()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size):
        self.alive -= size


def storages(things):
    return [t.untyped_storage() for t in tree_iter(things) if isinstance(t, torch.Tensor)]


# The paper's names of what a module of this name reads and writes.
READS = {"": "x^e", "o": "heads", "norm2": "x^o", "down": "input of W^D", "norm": "x^d"}
WRITES = {"norm1": "x~^e", "qkv": "q, k, v", "norm2": "x~^o", "gate": "x^g", "up": "x^u"}
# What else is kept inside it.
INSIDE = {"attend": "inside attention", "attention": "inside attention", "mlp": "silu(x^g)",
          "norm1": "inside norms", "norm2": "inside norms", "norm": "inside norms", "": "embedding and loss"}


class Kept:
    """The storages that autograd keeps, and their names: from the modules that read or write them, else from
    the module inside which they were kept."""

    def __init__(self, module, parameters, gradients=()):
        """gradients: parameters whose gradients head_loss makes early; they count as gradients."""
        self.storages, self.inside = {}, {}
        self.path = [""]  # of the modules that compute now
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.gradients = [p.shape for p in gradients]
        for name, m in module.named_modules():
            self.watch(name.rsplit(".", 1)[-1], m)

    def watch(self, name, module):
        def enter(module, inputs):
            self.path.append(name)
            self.label(inputs[0], READS.get(name))

        def leave(module, inputs, y):
            self.path.pop()
            self.label(y, WRITES.get(name))
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        if isinstance(module, Attention):
            module.__dict__["attend"] = partial(self.attend, module.attend)

    def attend(self, attend, q, k, v, *rest):
        for tensor, name in zip((q, k, v), "qkv"):
            self.label(tensor, name)
        self.path.append("attend")
        y = attend(q, k, v, *rest)
        self.path.pop()
        self.label(y, "heads")
        return y

    def label(self, tensor, label):
        storage = tensor.untyped_storage()
        if label and not hasattr(storage, "label"):  # the first name stays
            storage.label = label

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    def pack(self, t):
        storage, name = t.untyped_storage(), self.path[-1]
        early = len(self.path) == 1 and t.shape in self.gradients
        if storage._cdata not in self.parameters and not early:
            self.storages[storage._cdata] = storage
            is_s = name == "attend" and t.dim() > 2 and t.shape[-1] == t.shape[-2]
            self.inside[storage._cdata] = "s" if is_s else INSIDE.get(name, f"inside {name}")
        return t

    def totals(self):
        """name -> bytes."""
        sizes = Counter()
        for key, storage in self.storages.items():
            sizes[getattr(storage, "label", self.inside[key])] += storage.nbytes()
        return sizes


def measure(piece, x, kept):
    """Run piece(x) and its backward pass: (name -> bytes kept, the most that exists beside them, result)."""
    with Watch(fake=True) as watch:
        x = torch.empty_like(x).requires_grad_(x.requires_grad)
        with kept.hooks():
            y = piece(x)
        sizes = kept.totals()
        kept.storages.clear()  # so that the backward pass can free them
        if y.requires_grad:
            y.backward(y.detach())  # any gradient would do; this one takes no memory beside y
    return sizes, watch.peak - sum(sizes.values()), y.detach().requires_grad_(y.requires_grad)


def activations(model, batch, length, dtype=None, recompute=None):
    """Of a step on `batch` sequences of `length` tokens: name -> bytes kept; working sets of a block, of the
    ends."""
    with FakeTensorMode():  # a copy with fake tensors in place of the model's own
        memo = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), p.requires_grad)
        model = copy.deepcopy(model, memo).train()
        if recompute:
            use_recompute(model, recompute)
        tokens, parameters = torch.empty(batch, length, dtype=torch.int64), list(model.parameters())
        _, rope, _ = model.begin(tokens)
        kept, ends, x = measure(lambda tokens: model.begin(tokens)[0], tokens, Kept(nn.Module(), parameters))
        largest, seen = 0, {}
        for block in model.blocks:
            tensors = [*block.parameters(), *block.buffers()]
            kind = x.requires_grad, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
            if kind not in seen:
                seen[kind] = measure(lambda x, block=block: block(x, rope), x, Kept(block, parameters))
            more, working, x = seen[kind]
            kept, largest = kept + more, max(largest, working)
        outside = Kept(nn.ModuleDict({"norm": model.norm}), parameters, model.head.parameters())
        more, working, _ = measure(lambda x: head_loss(model.head, model.norm(x), tokens), x, outside)
    return kept + more, largest, max(ends, working)


def account(model, batch, length, dtype=None, recompute=None, optimizer_bytes=None):
    """Rows {name, kind, bytes} of a training step. Parameters are in `dtype`, or as they are.

    recompute: a mode of recompute.py, or as it is. optimizer_bytes: for each number that learns; None: two
    moments in its dtype.
    """
    def size(tensors):
        return sum(t.numel() * (dtype if dtype and isinstance(t, nn.Parameter) else t.dtype).itemsize
                   for t in tensors)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = 2 * size(learn)
    if optimizer_bytes is not None:
        optimizer = optimizer_bytes * sum(p.numel() for p in learn)
    kept, block, ends = activations(model, batch, length, dtype, recompute)
    rows = [("parameters", "parameter", size([*model.parameters(), *model.buffers()])),
            ("gradients", "gradient", size(learn)), ("AdamW", "optimizer", optimizer),
            *((name, "activation", n) for name, n in kept.items()),
            ("working set of a block", "transient", block), ("working set of the loss", "transient", ends)]
    return [dict(name=name, kind=kind, bytes=n) for name, kind, n in rows]


def by_kind(rows):
    """kind -> bytes. What is transient is not there at the same time: the largest counts."""
    sizes = {kind: [row["bytes"] for row in rows if row["kind"] == kind] for kind in KINDS}
    return {kind: max(n) if kind == "transient" else sum(n) for kind, n in sizes.items()}


def meta_model(name):
    return build(config_for(name), {})


# ----------------------------------------------------------------------------- the paper's tables

WHY = {
    "x^e": "the input of every block, not of the first alone",
    "q k^T": "the softmax's gradient is made from its result s; q k^T is not needed",
    "heads": "s v, which W^O reads; torch's fused attention keeps its own copy",
    "inside attention": "RoPE's tables; the fused attention's sums of rows",
    "silu(x^g)": "a factor of the next",
    "input of W^D": "x^u silu(x^g)",
    "in all": "the paper: 81, 12.2 without q k^T and s, 2.5 with one block",
    "working set": "for a moment, beside what is kept"}
KEEPS = {  # mode: what is kept, and the paper's total
    "none": ("everything, the probabilities s too", 81),
    "sdpa": ("all but s: torch's fused attention", ""),
    "attention": ("q, k, v: q k^T and the softmax again, by hand", 12.2),
    "block": ("the inputs of blocks", 2.5)}


def rows_of(model, batch, length, mode):
    """As the paper counts: 16 bit, and for the optimizer two moments and a copy of the weights in 32 bit."""
    return account(model, batch, length, torch.bfloat16, mode, optimizer_bytes=12)


def gb(n):
    return f"{n / 1e9:,.1f}" if n >= 5e7 else f"{n / 1e9:.3f}"


def table_iii():
    """Llama2-7B and 70B: ours and the paper's, and what recomputation leaves."""
    rows = []
    for line, paper in PAPER["III"].items():
        name, batch = line.split()
        model, row = meta_model(name), dict(model=name, batch=batch)
        kinds, block = (by_kind(rows_of(model, int(batch), LENGTH, mode)) for mode in ("none", "block"))
        row |= {kind: f"{gb(kinds[kind])} ({figure})" for kind, figure in zip(KINDS, paper)}
        row["with --recompute block"] = f"{gb(block['activation'])} + {gb(block['transient'])}"
        rows.append(row)
    return own_columns(rows)


def table_iv():
    """Llama2-7B, batch 1: what each mode keeps, tensor by tensor."""
    model, found = meta_model("llama2-7b"), {}
    for mode in MODES:
        rows = rows_of(model, 1, LENGTH, mode)
        found[mode] = {row["name"]: gb(row["bytes"]) for row in rows if row["kind"] == "activation"}
        kinds = by_kind(rows)
        found[mode] |= {"in all": gb(kinds["activation"]), "working set": gb(kinds["transient"])}
    lines = []
    for name in dict.fromkeys([*(n for n in PAPER["IV"] if n != "in all"), *found["sdpa"]]):
        line = {"kept": name, "paper": PAPER["IV"].get(name, "-")}
        lines.append(line | {mode: found[mode].get(name, "-") for mode in MODES} | {"": WHY.get(name, "")})
    return own_columns(lines)


def bench(args):
    device, model, rows = find_device("float32"), meta_model(args.model), []
    if args.recompute != "all":
        return device, rows_of(model, args.batch, args.seq, args.recompute)
    print("Table III: GB of a training step, 16 bit, 4,096 tokens a sequence (the paper's in brackets: "
          "parameters rounded up, q k^T counted)\n" + table_iii())
    print(f"\nTable IV: GB that autograd keeps, Llama2-7B, batch 1\n{table_iv()}\n")
    for mode in MODES:
        kinds = by_kind(rows_of(model, args.batch, args.seq, mode))
        rows.append(dict(mode=mode, bytes=kinds["activation"], working_set=kinds["transient"]))
    return device, rows


def report(rows):
    if "kind" in rows[0]:
        return table(rows, {"what": "name", "kind": "kind", "GB": ("bytes", "{:.2f}", 1e9)})
    rows = shown(rows, keeps=lambda r: KEEPS[r["mode"]][0], paper=lambda r: KEEPS[r["mode"]][1])
    return table(rows, {"--recompute": "mode", "keeps": "keeps", "kept GB": ("bytes", "{:.1f}", 1e9),
                        "working set GB": ("working_set", "{:.1f}", 1e9), "paper GB": "paper"})
