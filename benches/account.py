"""An account of a training step's memory without running anything large (Tables III and IV, section IV.B of the paper).

    parameters     every weight
    gradients      as large as the weights that learn
    optimizer      AdamW's two moments (and a 32-bit copy of the weights, where they have 16 bits)
    activations    what autograd keeps of the forward pass until the backward pass: Table IV
    transient      what exists for a moment beside these: the working set of one block's backward pass, of the loss

The first three follow from the shapes. The last two are read off a run on fake tensors, which have a shape, a dtype and a storage but
no memory: torch's hooks on saved tensors see each tensor that autograd keeps, and a dispatch mode sees each tensor that comes and goes.
Blocks of the same shapes keep the same, so one of each kind is run, forward and backward: Llama2-70B takes a second.

Each storage is counted once, however many views of it are kept, and parameters never: they are there anyway.

    rows = account(model, batch=1, length=4096)
    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block
"""
import copy
import weakref
from collections import Counter

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from common.loss import head_loss
from model import Attention, Transformer, config_for, is_linear
from recompute import use_recompute

# ----------------------------------------------------------------------------- watching tensors come and go


class Watch(TorchDispatchMode):
    """Adds up the bytes of the storages that were made inside and are alive; `peak` is the most there ever was."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs)):
            if isinstance(t, torch.Tensor):
                t.untyped_storage().watched = True  # not made in here, if not seen before
        out = function(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.see(t.untyped_storage())
        return out

    def see(self, storage):
        if not hasattr(storage, "watched"):
            storage.watched, size = True, storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.gone, size)

    def gone(self, size):
        self.alive -= size


class FakeWatch(Watch):
    """For fake tensors. They have no numbers: whoever asks for one is told yes, the answer of a step in which nothing unusual happens."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True
        return super().__torch_dispatch__(function, types, args, kwargs)


# ----------------------------------------------------------------------------- what is kept, by the paper's names

INPUTS = {"": "x^e", "norm1": "x^e", "qkv": "x~^e", "q": "x~^e", "k": "x~^e", "v": "x~^e", "o": "heads",
          "norm2": "x^o", "gate": "x~^o", "up": "x~^o", "norm": "x^d"}
OUTPUTS = {"qkv": "q, k, v", "q": "q", "k": "k", "v": "v", "gate": "x^g", "up": "x^u", "norm1": "x~^e", "norm2": "x~^o"}


class Kept:
    """The storages that autograd keeps, and their names: from the modules that read or write them, else from where they were kept."""

    def __init__(self, module=None, parameters=(), gradients=()):
        self.storages, self.guesses, self.path = {}, {}, []
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.gradients = [p.shape for p in gradients]  # head_loss makes these parameters' gradients early: they count as gradients
        for name, m in (module.named_modules() if module is not None else ()):
            last = name.rsplit(".", 1)[-1]
            m.register_forward_pre_hook(lambda m, args, last=last: self.enter(m, last, args[0]))
            m.register_forward_hook(lambda m, args, y, last=last: self.leave(last, y))
            if isinstance(m, Attention):
                self.watch_attend(m)

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    def name(self, tensor, label):
        storage = tensor.untyped_storage()
        storage.label = getattr(storage, "label", label)  # the first name stays

    def enter(self, module, last, x):
        self.path.append((last, module))
        label = self.product() if last == "down" else INPUTS.get(last)
        if label:
            self.name(x, label)

    def leave(self, last, y):
        self.path.pop()
        if last in OUTPUTS:
            self.name(y, OUTPUTS[last])

    def product(self):
        """The name of what W^D reads."""
        return next("x^u silu(x^g)" if m.gate is not None else "gelu(x^u)" for name, m in reversed(self.path) if name == "mlp")

    def watch_attend(self, attention):
        attend = attention.attend

        def watched(q, k, v, *rest):
            for t, label in ((q, "q"), (k, "k"), (v, "v")):
                self.name(t, label)
            self.path.append(("attend", q.shape[2]))
            y = attend(q, k, v, *rest)
            self.path.pop()
            self.name(y, "heads")
            return y
        attention.__dict__["attend"] = watched

    def pack(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.parameters and (self.path or t.shape not in self.gradients):
            self.storages[storage._cdata] = storage
            self.guesses[storage._cdata] = self.guess(t)
        return t

    def guess(self, t):
        """A name for a tensor that no module reads or writes, from the place where it was kept."""
        inside = dict(self.path)
        if not t.dim():
            return "scalars"
        if t.dtype == torch.bool or "dropout" in inside:
            return "dropout masks"
        if "attend" in inside:
            return "s" if t.shape[-1] == inside["attend"] and t.shape[-2] % inside["attend"] == 0 else "row sums of attention"
        if inside.keys() & {"norm1", "norm2", "norm"}:
            return "inside the norms"
        for last, module in self.path:
            if is_linear(module):
                return self.guess_linear(t, last, module)
        return "silu(x^g)" if "mlp" in inside else "angles of RoPE" if "attention" in inside else "loss"

    def guess_linear(self, t, last, module):
        if any(t.shape in (p.shape, p.shape[::-1]) for p in module.parameters()):
            return "weights in 16 bit"
        if t.shape[-1] == module.in_features:
            return self.product() if last == "down" else INPUTS.get(last, "x of other layers")
        return "A x"

    def totals(self):
        """name -> bytes."""
        sizes = Counter()
        for key, storage in self.storages.items():
            sizes[getattr(storage, "label", self.guesses[key])] += storage.nbytes()
        return sizes


# ----------------------------------------------------------------------------- the account

def fake_copy(model, dtype=None):
    """The model with fake tensors in place of its own, its parameters in `dtype` if given. To be called inside a FakeTensorMode."""
    def fake(t):
        return torch.empty(t.shape, dtype=dtype if dtype and isinstance(t, nn.Parameter) else t.dtype)
    memo = {id(p): nn.Parameter(fake(p), requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(b): fake(b) for b in model.buffers()}
    return copy.deepcopy(model, memo)


def measure(piece, x, autocast, kept):
    """Run piece(x) and its backward pass on fake tensors: (name -> bytes kept, the most that exists beside them, the result)."""
    with FakeWatch() as watch:
        x = torch.empty_like(x).requires_grad_(x.requires_grad)
        with kept.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = piece(x)
        sizes = kept.totals()
        kept.storages.clear()  # so that the backward pass can free them
        if y.requires_grad:
            y.backward(y.detach())  # any gradient would do; this one takes no memory beside y, which a next layer would have freed
    return sizes, watch.peak - sum(sizes.values()), y.detach().requires_grad_(y.requires_grad)


def shapes_of(block):
    """Blocks with the same shapes keep the same."""
    return tuple((name, t.shape, t.dtype, t.requires_grad) for named in (block.named_parameters(), block.named_buffers()) for name, t in named)


def activations(model, batch, length, dtype=None, autocast=False, recompute=None):
    """Of a training step on `batch` sequences of `length` tokens: name -> bytes kept; working sets of the largest block, and of the ends."""
    with FakeTensorMode():
        model = fake_copy(model, dtype).train()
        if recompute:
            use_recompute(model, recompute)
        tokens, parameters = torch.empty(batch, length, dtype=torch.int64), list(model.parameters())
        _, rope, _ = model.begin(tokens)

        def begin(tokens):
            return model.begin(tokens)[0]

        def end(x):
            return head_loss(model.head, model.norm(x), tokens)

        total, ends, x = measure(begin, tokens, autocast, Kept(None, parameters))
        largest, seen = 0, {}
        for block in model.blocks:
            kind = (shapes_of(block), x.requires_grad)
            if kind not in seen:
                seen[kind] = measure(lambda x, block=block: block(x, rope), x, autocast, Kept(block, parameters))
            kept, working, x = seen[kind]
            total, largest = total + kept, max(largest, working)
        kept, working, _ = measure(end, x, autocast, Kept(nn.ModuleDict({"norm": model.norm}), parameters, model.head.parameters()))
    return total + kept, largest, max(ends, working)


KINDS = {"parameter": "parameters", "gradient": "gradients", "optimizer": "optimizer", "activation": "activations", "transient": "working set"}
NAMES = ("tokens", "x^e", "dropout masks", "inside the norms", "x~^e", "q, k, v", "k", "q", "v", "angles of RoPE", "s",
         "row sums of attention", "heads", "x^o", "x~^o", "x^u", "x^g", "silu(x^g)", "x^u silu(x^g)", "gelu(x^u)", "A x",
         "weights in 16 bit", "x of other layers", "scalars", "x^d", "loss")


def account(model, batch, length, dtype=None, autocast=False, recompute=None, optimizer_bytes=None):
    """Rows {name, kind, bytes} of a training step. Parameters are in `dtype`, or as they are; `recompute` is a mode, or as it is.

    optimizer_bytes: for each number that learns; AdamW's two moments are in the parameters' dtype if not given.
    """
    def size(tensors):
        return sum(t.numel() * (dtype.itemsize if dtype and isinstance(t, nn.Parameter) else t.element_size()) for t in tensors)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer = 2 * size(learn) if optimizer_bytes is None else optimizer_bytes * sum(p.numel() for p in learn)
    kept, block, ends = activations(model, batch, length, dtype, autocast, recompute)
    rows = [("parameters", "parameter", size([*model.parameters(), *model.buffers()])), ("gradients", "gradient", size(learn)),
            ("AdamW", "optimizer", optimizer), *((name, "activation", kept[name]) for name in NAMES if kept[name]),
            ("working set of a block", "transient", block), ("working set of W^E and the loss", "transient", ends)]
    return [dict(name=name, kind=kind, bytes=n) for name, kind, n in rows]


def by_kind(rows):
    """kind -> bytes. What is transient is not there at the same time: the largest counts."""
    return {kind: (max if kind == "transient" else sum)(r["bytes"] for r in rows if r["kind"] == kind) for kind in KINDS}


def gb(n):
    return f"{n / 1e9:,.1f}" if n >= 5e7 else f"{n / 1e9:.3f}"


# ----------------------------------------------------------------------------- for the scripts

def expected_memory(model, batch, length, autocast=False, recompute=None, optimizer_bytes=None):
    """kind -> bytes that a training step of train.py or finetune.py is expected to take, and "total". `batch` is of one forward pass."""
    kinds = by_kind(account(model, batch, length, autocast=autocast, recompute=recompute, optimizer_bytes=optimizer_bytes))
    return kinds | {"total": sum(kinds.values())}


def statement(expected):
    """The line with which a script says what it is going to take."""
    return f"expects {gb(expected['total'])} GB: " + ", ".join(f"{KINDS[kind]} {gb(n)}" for kind, n in expected.items() if kind in KINDS and n)


def advice(model, batch, length, autocast=False, recompute=None, optimizer_bytes=None, grad_accum=1):
    """After running out of memory: what was expected, and the flags that would have taken less, the least first."""
    def total(*args):
        return expected_memory(model, *args, optimizer_bytes)["total"]
    now, options = total(batch, length, autocast, recompute), {}
    if recompute != "block":
        options["--recompute block"] = total(batch, length, autocast, "block")
    if batch > 1:
        options[f"--batch-size {batch // 2} --grad-accum {2 * grad_accum}"] = total(batch // 2, length, autocast, recompute)
    if length > 128:
        options[f"--seq-len {length // 2}"] = total(batch, length // 2, autocast, recompute)
    smaller = [f"{flags} ({gb(n)} GB)" for flags, n in sorted(options.items(), key=lambda item: item[1]) if n < 0.98 * now]
    hint = " or ".join(smaller) or "a smaller --model, or --rank"
    return f"out of memory: a step on {batch} x {length} tokens was expected to take {gb(now)} GB; try {hint}"


# ----------------------------------------------------------------------------- the paper's tables

PAPER_III = {("llama2-7b", 1): (14, 14, 84, 81), ("llama2-7b", 4): (14, 14, 84, 388), ("llama2-7b", 16): (14, 14, 84, 1552),
             ("llama2-70b", 1): (140, 140, 840, 442.5), ("llama2-70b", 4): (140, 140, 840, 1770), ("llama2-70b", 16): (140, 140, 840, 7080)}
PAPER_IV = {"x^e": 0.03, "x~^e": 1.1, "k": 1.1, "q": 1.1, "v": 1.1, "q k^T": 34.4, "s": 34.4, "x^o": 1.1, "x~^o": 1.1, "x^u": 2.8, "x^g": 2.8,
            "x^d": 0.03}  # Llama2-7B, batch 1, 4,096 tokens
WHY = {
    "x^e": "the input of every block, not of the first alone",
    "q k^T": "the softmax's gradient is made from its result s; q k^T is not needed",
    "heads": "s v, which W^O reads; torch's fused attention keeps its own copy",
    "silu(x^g)": "a factor of the next",
    "x^u silu(x^g)": "W^D reads it",
    "inside the norms": "LayerNorm's mean and deviation of each token",
    "row sums of attention": "from which the fused attention computes s again",
    "loss": "the gradient of what W^H reads: the loss is differentiated in chunks on the way forward",
}
COLUMNS = ("none", "sdpa", "attention", "block")


def memory_rows(name, model, batch, length, dtype=torch.bfloat16, recompute="sdpa"):
    """account() of `model`, called `name`, as the paper counts: parameters and gradients in dtype, 12 bytes of optimizer where that has 16 bits.

    Rows get paper_gb where the paper has a number.
    """
    rows = account(model, batch, length, dtype, recompute=recompute, optimizer_bytes=12 if dtype.itemsize == 2 else 8)
    plain = all(p.requires_grad for p in model.parameters()) and all(type(m) is nn.Linear for m in model.modules() if is_linear(m))
    as_in_paper = plain and dtype.itemsize == 2 and length == 4096
    if as_in_paper and (name, batch) in PAPER_III:
        for row, figure in zip(rows, PAPER_III[name, batch][:3]):
            row["paper_gb"] = figure
    if as_in_paper and (name, batch, recompute) == ("llama2-7b", 1, "none"):
        names = {r["name"] for r in rows}
        rows += [dict(name=n, kind="activation", bytes=0) for n in PAPER_IV if n not in names]
        for row in rows:
            if row["name"] in PAPER_IV:
                row["paper_gb"] = PAPER_IV[row["name"]]
    return rows


def meta_model(name):
    with torch.device("meta"):
        return Transformer(config_for(name))


def print_table_iii():
    """Llama2-7B and 70B at length 4,096, beside the paper's figures."""
    print("\nTable III. GB of a training step, 16 bit, length 4,096: this project's / the paper's")
    print(f"{'':12}{'batch':>6}{'parameters':>18}{'gradients':>18}{'optimizer':>18}{'activations':>22}{'with --recompute block':>26}")
    for (name, batch), paper in PAPER_III.items():
        model = meta_model(name)
        kinds = by_kind(memory_rows(name, model, batch, 4096, recompute="none"))
        block = by_kind(memory_rows(name, model, batch, 4096, recompute="block"))
        cells = [f"{gb(kinds[k])} / {p:,}" for k, p in zip(KINDS, paper)]
        print(f"{name:12}{batch:6}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (18, 18, 18, 22)))
              + f"{gb(block['activation']) + ' + ' + gb(block['transient']):>26}")
    print("The paper rounds the parameters up; its activations count q k^T, which is not kept, and leave out what Table IV says below.\n"
          "The last column: what is kept, and the working set of one block.")


def print_table_iv():
    """Llama2-7B, batch 1, length 4,096: what is kept by each mode of --recompute, beside the paper's figures."""
    def line(name, paper, figures, remark=""):
        print(f"{name:24}{paper:>8}" + "".join(f"{gb(n) if n else '-':>11}" for n in figures) + f"   {remark}")
    print("\nTable IV. GB kept by autograd, Llama2-7B, batch 1, length 4,096, 16 bit")
    print(f"{'':24}{'paper':>8}" + "".join(f"{mode:>11}" for mode in COLUMNS))
    model, columns, working = meta_model("llama2-7b"), [], []
    for mode in COLUMNS:
        rows = memory_rows("llama2-7b", model, 1, 4096, recompute=mode)
        columns.append({r["name"]: r["bytes"] for r in rows if r["kind"] == "activation"})
        working.append(by_kind(rows)["transient"])
    for name in [*PAPER_IV, *(n for n in NAMES if n not in PAPER_IV and any(n in c for c in columns))]:
        line(name, PAPER_IV.get(name, "-"), [c.get(name) for c in columns], WHY.get(name, ""))
    line("kept", 81, [sum(c.values()) for c in columns], "the paper: 81, 12.2 without q k^T and s, 2.5 with one block")
    line("working set", "-", working, "for a moment, beside what is kept")


def print_memory_tables(name, rows, batch, length, limit_gb=24):
    """The account of one configuration, whether it fits, and the paper's two tables."""
    kinds = by_kind(rows)
    total = sum(kinds.values())
    print(f"{name}, batch {batch} x {length} tokens: " + ", ".join(f"{KINDS[k]} {gb(n)}" for k, n in kinds.items()) + f"; {gb(total)} GB in all")
    print(f"does it fit in {limit_gb:g} GB? {'yes' if total <= limit_gb * 1e9 else 'no'}: {gb(total)} GB")
    print_table_iii()
    print_table_iv()
