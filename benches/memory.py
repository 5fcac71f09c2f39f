"""Memory of a training step (Tables III and IV, section IV.B): bytes by kind, counted without running it.

    python bench.py memory                 Table III, the paper's figures beside ours; a row for each mode
    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block

    parameter      every weight
    gradient       as large as the weights that learn
    optimizer      AdamW's two moments and, as the paper counts, a copy of the weights, in 32 bit
    activation     what autograd keeps of the forward pass until the backward pass: Table IV
    block, loss    what exists for a moment beside these, the working sets: one, then the other

The first three follow from the shapes. The last two are read off a run on fake tensors, which have a shape, a
dtype and a storage but no memory: torch's hooks on saved tensors see each tensor that autograd keeps, and a
dispatch mode sees each tensor that comes and goes. Blocks of the same shapes keep the same, so one of each
kind is run, forward and backward: Llama2-70B takes a second. A storage counts once, with all its views.
"""
import copy
import weakref

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benches.common import PAPER, table
from benches.train import shapes_of_rank
from common.device import find_device
from common.loss import head_loss
from recompute import MODES, use_recompute

LENGTH = 4096  # of the paper's tables
DEFAULTS = dict(model="llama2-7b", batch=1, seq=LENGTH, recompute="all")

class Watch(TorchDispatchMode):
    """Adds up the bytes of the storages that were made inside and are alive; `peak` is the most there was."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True  # a fake tensor has no numbers: code that reads one, to branch on it, gets this
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

class Kept(saved_tensors_hooks):
    """Inside, what autograd keeps is noted in `storages`, parameters aside. gradients: parameters whose
    gradients head_loss makes early; they count as gradients."""

    def __init__(self, parameters, gradients=()):
        super().__init__(self.note, lambda t: t)
        self.storages = {}
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.gradients = [p.shape for p in gradients]

    def note(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.parameters and t.shape not in self.gradients:
            self.storages[storage._cdata] = storage
        return t

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())

def measure(piece, x, kept):
    """Run piece(x) and its backward pass: (bytes kept, the most that exists beside them, result)."""
    with Watch() as watch:
        x = torch.empty_like(x).requires_grad_(x.requires_grad)
        with kept:
            y = piece(x)
        size = kept.bytes()
        kept.storages.clear()  # so that the backward pass can free them
        if y.requires_grad:
            y.backward(y.detach())  # any gradient would do; this one takes no memory beside y
    return size, watch.peak - size, y.detach().requires_grad_(y.requires_grad)

def activations(model, batch, length, recompute):
    """Of a step on `batch` sequences of `length` tokens: bytes kept; the working sets of a block and of the
    ends."""
    with FakeTensorMode():  # a copy with fake tensors, of 16 bit, in place of the model's own
        memo = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16), p.requires_grad)
        model = use_recompute(copy.deepcopy(model, memo).train(), recompute)
        tokens, parameters = torch.empty(batch, length, dtype=torch.int64), list(model.parameters())
        _, rope, _ = model.begin(tokens)
        kept, ends, x = measure(lambda tokens: model.begin(tokens)[0], tokens, Kept(parameters))
        largest, seen = 0, {}
        for block in model.blocks:
            tensors = [*block.parameters(), *block.buffers()]
            kind = x.requires_grad, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
            if kind not in seen:
                seen[kind] = measure(lambda x, block=block: block(x, rope), x, Kept(parameters))
            more, working, x = seen[kind]
            kept, largest = kept + more, max(largest, working)
        outside = Kept(parameters, model.head.parameters())
        more, working, _ = measure(lambda x: head_loss(model.head, model.norm(x), tokens), x, outside)
    return kept + more, largest, max(ends, working)

def account(model, batch, length, recompute, optimizer_bytes=12):
    """The bytes of a training step with weights of 16 bit, a dict. recompute: a mode of recompute.py.
    optimizer_bytes: for each number that learns; two moments of 16 bit take 4."""
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = 2 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    kept, block, loss = activations(model, batch, length, recompute)
    return dict(parameter=stored, gradient=2 * learn, optimizer=optimizer_bytes * learn, activation=kept,
                block=block, loss=loss)

KEEPS = {  # mode: what is kept, and the paper's total
    "none": ("everything, the probabilities s too", 81),
    "sdpa": ("all but s: torch's fused attention", ""),
    "attention": ("q, k, v: q k^T and the softmax again, by hand", 12.2),
    "block": ("the inputs of blocks", 2.5)}

def table_iii():
    """Llama2-7B and 70B: GB of ours, and the paper's in brackets."""
    rows = []
    for line, paper in PAPER["III"].items():
        name, batch = line.split()
        sizes = account(shapes_of_rank(name), int(batch), LENGTH, "none")
        cells = {what: f"{sizes[what] / 1e9:,.1f} ({gb})" for what, gb in zip(sizes, paper)}
        rows.append(dict(model=name, batch=batch) | cells)
    return table(rows)

def bench(args):
    device, model, rows = find_device("float32"), shapes_of_rank(args.model), []
    if args.recompute != "all":
        sizes = account(model, args.batch, args.seq, args.recompute)
        return device, [dict(what=what, kind="transient" if what in ("block", "loss") else what, bytes=size)
                        for what, size in sizes.items()]
    print("Table III: GB of a training step, 16 bit, 4,096 tokens a sequence (the paper's in brackets: "
          f"parameters rounded up, q k^T counted)\n{table_iii()}\n")
    for mode in MODES:
        sizes = account(model, args.batch, args.seq, mode)
        working = max(sizes["block"], sizes["loss"])
        rows.append(dict(mode=mode, bytes=sizes["activation"], working_set=working))
    return device, rows

def report(rows):
    if "kind" in rows[0]:
        return table(rows, {"what": "what", "kind": "kind", "GB": ("bytes", "{:.2f}", 1e9)})
    return table(rows, {
        "--recompute": "mode", "keeps": lambda r: KEEPS[r["mode"]][0], "kept GB": ("bytes", "{:.1f}", 1e9),
        "working set GB": ("working_set", "{:.1f}", 1e9), "paper GB": lambda r: KEEPS[r["mode"]][1]})
