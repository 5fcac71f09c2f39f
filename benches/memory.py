"""Memory of a training step (Tables III and IV): bytes by kind, counted without running it, the paper's figures beside ours.

    python bench.py memory --model llama2-7b --batch 1 --seq 4096 --recompute block
    python bench.py memory --bits 8 --lora 8          Table IX: finetuning on a quantized base
    python bench.py memory --recompute all            what each mode keeps, beside the paper's totals
"""
import torch

from benches.account import by_kind, memory_rows, meta_model, print_memory_tables
from benches.common import table
from common.cli import check_positive
from common.device import find_device
from lowrank import attach_lora, replace_linears
from quant import quantize
from recompute import MODES

SHOWN = {  # mode: what is kept, and the paper's total of Table IV
    "none": ("everything, the probabilities s too", 81), "sdpa": ("all but s: torch's fused attention", None),
    "attention": ("q, k, v: q k^T and the softmax again, by hand", 12.2), "block": ("the inputs of blocks", 2.5)}


def bench(args):
    """Bytes of a training step by kind, counted without running it, and the paper's Tables III and IV beside ours."""
    check_positive(args, "batch", "seq", "limit_gb")
    model = meta_model(args.model)
    if args.rank:
        print(replace_linears(model, args.rank))
    if args.bits < 16:
        print(quantize(model.to(getattr(torch, args.dtype)), args.bits))
    if args.lora:
        print(attach_lora(model, args.lora, targets=args.targets.split(",")))
    if args.recompute == "all":
        return find_device("float32"), [dict(mode=mode, **kept_bytes(args, model, mode)) for mode in SHOWN]
    rows = memory_rows(args.model, model, args.batch, args.seq, getattr(torch, args.dtype), args.recompute)
    print_memory_tables(args.model, rows, args.batch, args.seq, args.limit_gb)
    return find_device("float32"), rows


def kept_bytes(args, model, mode):
    kinds = by_kind(memory_rows(args.model, model, args.batch, args.seq, getattr(torch, args.dtype), mode))
    return dict(bytes=kinds["activation"], working_set=kinds["transient"])


def report(rows):
    if "mode" in rows[0]:
        return table(rows, {"--recompute": lambda r: r["mode"], "keeps": lambda r: SHOWN[r["mode"]][0], "kept GB": lambda r: f"{r['bytes'] / 1e9:.1f}",
                            "working set GB": lambda r: f"{r['working_set'] / 1e9:.1f}", "paper GB": lambda r: SHOWN[r["mode"]][1] or ""})
    return table(rows, {"what": lambda r: r["name"], "kind": lambda r: r["kind"], "GB": lambda r: f"{r['bytes'] / 1e9:.2f}",
                        "paper GB": lambda r: r.get("paper_gb", "")})


def arguments(p):
    p.add_argument("--model", default="llama2-7b", help="a known name (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    p.add_argument("--seq", type=int, default=4096, help="tokens of each (default: %(default)s)")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"],
                   help="of parameters and gradients (default: %(default)s)")
    p.add_argument("--rank", type=int, default=0,
                   help="of every linear layer; 0 is full rank (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16, choices=[4, 8, 16],
                   help="of the weights; quantized ones do not learn (default: %(default)s)")
    p.add_argument("--lora", type=int, default=0, metavar="R",
                   help="freeze the model and put adapters of this rank beside it; 0: none (default: 0)")
    p.add_argument("--targets", default="q,v",
                   help="the layers that get adapters (default: %(default)s, the paper's for Llama2-7B)")
    p.add_argument("--recompute", default="sdpa", choices=[*MODES, "all"],
                   help="as in train.py, or all to compare (default: %(default)s)")
    p.add_argument("--limit-gb", type=float, default=24,
                   help="does it fit in this much? (default: %(default)s)")
