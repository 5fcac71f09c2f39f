"""What rounding costs a pretrained model: perplexity after each way to round its weights to 8 and 4 bits.

    python bench.py quant --text wikitext2-valid.txt --calibration tinyshakespeare.txt --calibration fiction/

Where embedding and head are one matrix it stays at 8 bits. The weights of smollm2-135m were in 4 bits, in
groups of 32, when they were published: another choice of groups has to round them again as it would any
model, but groups of 32 would find them unchanged and prove nothing.
"""
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benches.common import table
from beyond.rounding import clip_rows, quantize_calibrated
from checkpoint import load_model
from common.data import calibration_batches
from common.device import find_device
from common.loss import head_loss
from eval import WINDOW, text_windows
from quant import quantize, quantize_rows, stored_bytes

MINMAX = "to the nearest, min-max"
PLAIN = [(8, 0, MINMAX), (8, 64, MINMAX), (4, 64, MINMAX), (4, 64, "clipped"), (4, 0, MINMAX)]
CALIBRATED = [(4, 64, "error feedback"), (4, 64, "error feedback, sweeps"), (4, 0, "error feedback, sweeps")]


@torch.inference_mode()
def perplexity(model, items, device):
    total = count = 0
    for w in items:
        tokens = torch.tensor([w.ids], device=device.torch_device)
        with device.autocast():
            total += head_loss(model.head, model.hidden(tokens[:, :-1]),
                               tokens[:, 1:]).item() * (len(w.ids) - 1)
        count += len(w.ids) - 1
    return math.exp(total / count)


def rounded(args, device, bits, group, how, text):
    """The model with its weights rounded so."""
    model, tokenizer = load_model(args.model, device.torch_device)
    if text:
        batches = [b.to(device.torch_device)
                   for b in calibration_batches(text, tokenizer, model.config.context,
                                                args.calibration_tokens)]
        quantize_calibrated(model, bits, batches, group, sweeps=3 if "sweeps" in how else 0)
    elif bits < 16:
        quantize(model, bits, group, rounding=clip_rows if how == "clipped" else quantize_rows)
    return model


def bench(args):
    """A row for each way."""
    device, rows = find_device(args.dtype), []
    ways = [(16, None, "", None), *((*way, None) for way in PLAIN),
            *((*way, text) for text in args.calibration or ["builtin"] for way in CALIBRATED)]
    model, tokenizer = load_model(args.model)
    items = [w for w in text_windows(args.text, tokenizer, args.limit, min(WINDOW, model.config.context))
             if len(w.ids) > 1]
    for bits, group, how, text in tqdm(ways, desc="ways", disable=None, leave=False):
        start = time.perf_counter()
        model = rounded(args, device, bits, group, how, text)
        seconds, size = time.perf_counter() - start, stored_bytes(model)
        p = perplexity(model, items, device)
        rows.append(dict(model=args.model, bits=bits, group=group, rounding=how, calibration=Path(text).name
                         if text else None, perplexity=p,
                         over_16_bit=p / (rows[0]["perplexity"] if rows else p) - 1, seconds=seconds,
                         model_bytes=size))
    count = sum(len(w.ids) for w in items)
    print(f"{args.model}: perplexity of {count:,} tokens of {Path(args.text).name}; calibration with "
          f"{args.calibration_tokens:,} tokens")
    return device, rows


def report(rows):
    return table(rows,
                 {"bits": lambda r: r["bits"], "a scale for": lambda r: "" if r["group"] is None
                  else f"{r['group']} weights" if r["group"] else "a row",
                        "rounding": lambda r: r["rounding"], "calibration": lambda r: r["calibration"] or "",
                  "perplexity": lambda r: f"{r['perplexity']:.2f}",
                        "over 16 bit": lambda r: f"{r['over_16_bit']:+.2%}" if r["group"] is not None else "",
                        "s": lambda r: f"{r['seconds']:.0f}",
                  "MB": lambda r: f"{r['model_bytes'] / 1e6:.0f}"})


def arguments(p):
    p.add_argument("--model", default="smollm2-135m", help="a pretrained model (default: %(default)s)")
    p.add_argument("--text", default="builtin",
                   help="what perplexity is measured on: a file, a folder or builtin (default: %(default)s)")
    p.add_argument("--limit", type=int, default=16384, help="tokens of it (default: %(default)s)")
    p.add_argument("--calibration", action="append", metavar="TEXT",
                   help="text for error feedback; may be given several times (default: builtin)")
    p.add_argument("--calibration-tokens", type=int, default=16384,
                   help="tokens of that text (default: %(default)s)")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default: %(default)s)")
