"""Memory of a training step (Tables III and IV): bytes by kind, counted without running it.

    python bench.py memory                 both tables, the paper's figures beside ours; a row for each mode
    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block
"""
import torch

from benches.account import KINDS, account, by_kind, meta_model
from benches.common import table
from common.cli import at_least_0, at_least_1
from common.device import find_device
from lowrank import replace_linears
from recompute import MODES

LENGTH = 4096  # of the paper's tables
PAPER_III = {("llama2-7b", 1): (14, 14, 84, 81), ("llama2-7b", 4): (14, 14, 84, 388),
             ("llama2-7b", 16): (14, 14, 84, 1552), ("llama2-70b", 1): (140, 140, 840, 442.5),
             ("llama2-70b", 4): (140, 140, 840, 1770), ("llama2-70b", 16): (140, 140, 840, 7080)}
PAPER_IV = {"x^e": 0.03, "x~^e": 1.1, "k": 1.1, "q": 1.1, "v": 1.1, "q k^T": 34.4, "s": 34.4, "x^o": 1.1,
            "x~^o": 1.1, "x^u": 2.8, "x^g": 2.8, "x^d": 0.03, "in all": 81}  # Llama2-7B, batch 1
WHY = {
    "x^e": "the input of every block, not of the first alone",
    "q k^T": "the softmax's gradient is made from its result s; q k^T is not needed",
    "heads": "s v, which W^O reads; torch's fused attention keeps its own copy",
    "inside attention": "RoPE's tables; the fused attention's sums of rows",
    "silu(x^g)": "a factor of the next",
    "input of W^D": "x^u silu(x^g)",
    "in all": "the paper: 81, 12.2 without q k^T and s, 2.5 with one block",
    "working set": "for a moment, beside what is kept"}
SHOWN = {  # mode: what is kept, and the paper's total
    "none": ("everything, the probabilities s too", 81), "sdpa": ("all but s: torch's fused attention", ""),
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
    for (name, batch), paper in PAPER_III.items():
        model, row = meta_model(name), dict(model=name, batch=batch)
        kinds, block = (by_kind(rows_of(model, batch, LENGTH, mode)) for mode in ("none", "block"))
        for kind, figure in zip(KINDS, paper):
            row[kind] = f"{gb(kinds[kind])} ({figure})"
        rows.append(row | {"with --recompute block": f"{gb(block['activation'])} + {gb(block['transient'])}"})
    return table(rows, {column: lambda r, column=column: r[column] for column in rows[0]})


def table_iv():
    """Llama2-7B, batch 1: what each mode keeps, tensor by tensor."""
    model, columns = meta_model("llama2-7b"), {}
    for mode in MODES:
        rows = rows_of(model, 1, LENGTH, mode)
        columns[mode] = {row["name"]: row["bytes"] for row in rows if row["kind"] == "activation"}
        columns[mode] |= {"in all": by_kind(rows)["activation"], "working set": by_kind(rows)["transient"]}
    names = dict.fromkeys([*(n for n in PAPER_IV if n != "in all"), *columns["sdpa"]])
    modes = {mode: lambda n, mode=mode: gb(columns[mode][n]) if n in columns[mode] else "-" for mode in MODES}
    return table(names, {"kept": str, "paper": lambda n: PAPER_IV.get(n, "-")} | modes
                 | {"": lambda n: WHY.get(n, "")})


def bench(args):
    model = meta_model(args.model)
    if args.rank:
        print(replace_linears(model, args.rank))
    if args.recompute != "all":
        return find_device("float32"), rows_of(model, args.batch, args.seq, args.recompute)
    print("Table III: GB of a training step, 16 bit, 4,096 tokens a sequence (the paper's in brackets: "
          "parameters rounded up, q k^T counted)\n" + table_iii())
    print(f"\nTable IV: GB that autograd keeps, Llama2-7B, batch 1\n{table_iv()}\n")
    rows = []
    for mode in MODES:
        kinds = by_kind(rows_of(model, args.batch, args.seq, mode))
        rows.append(dict(mode=mode, bytes=kinds["activation"], working_set=kinds["transient"]))
    return find_device("float32"), rows


def report(rows):
    if "kind" in rows[0]:
        return table(rows, {"what": lambda r: r["name"], "kind": lambda r: r["kind"],
                            "GB": lambda r: f"{r['bytes'] / 1e9:.2f}"})
    return table(rows, {
        "--recompute": lambda r: r["mode"],
        "keeps": lambda r: SHOWN[r["mode"]][0],
        "kept GB": lambda r: f"{r['bytes'] / 1e9:.1f}",
        "working set GB": lambda r: f"{r['working_set'] / 1e9:.1f}",
        "paper GB": lambda r: SHOWN[r["mode"]][1]})


def arguments(p):
    p.add_argument("--model", default="llama2-7b", help="a known name (default: %(default)s)")
    p.add_argument("--batch", type=at_least_1, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq", type=at_least_1, default=LENGTH, help="tokens of each (default: %(default)s)")
    p.add_argument("--rank", type=at_least_0, default=0, help="0 is full rank (default: %(default)s)")
    p.add_argument("--recompute", default="all", choices=[*MODES, "all"], help="default: %(default)s")
