"""What rounding costs a pretrained model: perplexity after each way to round its weights to 8 and 4 bits.

    python bench.py quant --text wikitext2-valid.txt --calibration tinyshakespeare.txt --calibration fiction/

Embedding and head, one matrix, stay at 8 bits. The weights of smollm2-135m were published in 4 bits, in
groups of 32: other groups have to round them again as any model's, but groups of 32 would prove nothing.
"""
import time
from pathlib import Path

from tqdm import tqdm

from benches.common import table
from beyond.rounding import clip_rows, quantize_calibrated
from checkpoint import load_model
from common.data import calibration_batches
from common.device import find_device
from eval import WINDOW, text_windows, window_result, window_rows
from quant import quantize, quantize_rows, stored_bytes

MODEL, MINMAX, SWEPT = "smollm2-135m", "to the nearest, min-max", "error feedback, sweeps"
PLAIN = [(16, None, ""), (8, 0, MINMAX), (8, 64, MINMAX), (4, 64, MINMAX), (4, 64, "clipped"), (4, 0, MINMAX)]
CALIBRATED = [(4, 64, "error feedback"), (4, 64, SWEPT), (4, 0, SWEPT)]


def rounded(device, bits, group, how, text):
    """The model with its weights rounded so, and its tokenizer."""
    model, tokenizer = load_model(MODEL, device)
    if text:
        batches = [b.to(device) for b in calibration_batches(text, tokenizer, model.config.context)]
        quantize_calibrated(model, bits, batches, group, sweeps=3 if how == SWEPT else 0)
    elif bits < 16:
        quantize(model, bits, group, rounding=clip_rows if how == "clipped" else quantize_rows)
    return model, tokenizer


def bench(args):
    device, rows = find_device("float32"), []
    ways = [(*way, None) for way in PLAIN]
    ways += [(*way, text) for text in args.calibration or ["builtin"] for way in CALIBRATED]
    for bits, group, how, text in tqdm(ways, desc="ways", disable=None, leave=False):
        start = time.perf_counter()
        model, tokenizer = rounded(device.torch_device, bits, group, how, text)
        seconds = time.perf_counter() - start
        windows = text_windows(args.text, tokenizer, args.limit, WINDOW)
        losses = [row for batch in window_rows(model, tokenizer, device, windows) for row in batch]
        value = window_result("perplexity", losses)["perplexity"]
        first = rows[0]["perplexity"] if rows else value
        rows.append(dict(model=MODEL, bits=bits, group=group, rounding=how, perplexity=value,
                         calibration=Path(text).name if text else None, over_16_bit=value / first - 1,
                         seconds=seconds, model_bytes=stored_bytes(model)))
    print(f"{MODEL}: perplexity of {args.limit:,} tokens of {Path(args.text).name}")
    return device, rows


def report(rows):
    def scale_of(row):
        return "" if row["group"] is None else f"{row['group']} weights" if row["group"] else "a row"

    return table(rows, {"bits": lambda r: r["bits"], "a scale for": scale_of,
                        "rounding": lambda r: r["rounding"], "calibration": lambda r: r["calibration"] or "",
                        "perplexity": lambda r: f"{r['perplexity']:.2f}",
                        "over 16 bit": lambda r: "" if r["bits"] == 16 else f"{r['over_16_bit']:+.2%}",
                        "s": lambda r: f"{r['seconds']:.0f}",
                        "MB": lambda r: f"{r['model_bytes'] / 1e6:.0f}"})


def arguments(p):
    p.add_argument("--text", default="builtin", help="of perplexity: a file, a folder or builtin")
    p.add_argument("--limit", type=int, default=16384, help="tokens of it (default: %(default)s)")
    p.add_argument("--calibration", action="append", metavar="TEXT",
                   help="text for error feedback; may be given several times (default: builtin)")
