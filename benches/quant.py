"""What rounding costs a pretrained model: perplexity after each way to round its weights to 8 and 4 bits.

    python bench.py quant --text wikitext2-valid.txt --calibration tinyshakespeare.txt

Embedding and head, one matrix, stay at 8 bits. Groups of 64, since those of 32, in which smollm2-135m was
published at 4 bits, would lose nothing and prove nothing.
"""
import time
from pathlib import Path

from benches.common import table
from beyond.rounding import clip_rows, quantize_calibrated
from checkpoint import load_model
from common.data import calibration_batches
from common.device import find_device, stored_bytes
from eval import WINDOW, score_task, text_windows
from quant import quantize, quantize_rows

MODEL, TOKENS, MINMAX, CLIPPED = "smollm2-135m", 8192, "to the nearest, min-max", "clipped"
FEEDBACK, SWEPT = "error feedback", "error feedback, sweeps"  # they learn from the calibration's text
WAYS = [(16, None, ""), (8, 0, MINMAX), (8, 64, MINMAX), (4, 64, MINMAX), (4, 64, CLIPPED), (4, 0, MINMAX),
        (4, 64, FEEDBACK), (4, 64, SWEPT), (4, 0, SWEPT)]  # bits, numbers with a scale (0: a row), rounding
DEFAULTS = dict(text="builtin", calibration="builtin")

def bench(args):
    device, rows = find_device("float32"), []
    for bits, group, how in WAYS:
        start = time.perf_counter()
        model, tokenizer = load_model(MODEL, device.torch_device)
        learns = how in (FEEDBACK, SWEPT)
        if learns:
            batches = calibration_batches(args.calibration, tokenizer, model.config.context)
            quantize_calibrated(model, bits, batches, group, sweeps=3 if how == SWEPT else 0)
        elif bits < 16:
            quantize(model, bits, group, rounding=clip_rows if how == CLIPPED else quantize_rows)
        seconds = time.perf_counter() - start
        windows = text_windows(args.text, tokenizer, TOKENS, WINDOW)
        value = score_task(model, tokenizer, device, "perplexity", windows)["perplexity"]
        rows.append(dict(model=MODEL, bits=bits, group=group, rounding=how, perplexity=value,
                         calibration=Path(args.calibration).name if learns else None,
                         seconds=seconds, model_bytes=stored_bytes(model)))
    return device, rows

def report(rows):
    scales = {None: "", 0: "a row", 64: "64 weights"}
    return table(rows, {
        "bits": "bits", "a scale for": lambda r: scales[r["group"]], "rounding": "rounding",
        "calibration": "calibration", "perplexity": ("perplexity", "{:.2f}"),
        "over 16 bit": (lambda r: r["perplexity"] / rows[0]["perplexity"] - 1, "{:+.2%}"),
        "s": ("seconds", "{:.0f}"), "MB": ("model_bytes", "{:.0f}", 1e6)})
