"""Memory of a training step (Tables III and IV): bytes by kind, counted without running it.

    python bench.py memory                 both tables, the paper's figures beside ours; a row for each mode
    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block
"""
import torch

from benches.account import KINDS, account, by_kind, meta_model
from benches.common import PAPER, own_columns, shown, table
from common.device import find_device
from recompute import MODES

LENGTH = 4096  # of the paper's tables
DEFAULTS = dict(model="llama2-7b", batch=1, seq=LENGTH, recompute="all")
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
