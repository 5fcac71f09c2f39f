"""Another number format: weights of -1, 0 and 1 times the mean size of their group (BitNet b1.58), as int4.

    python -m examples.ternary out/train out/ternary

quantize takes the function that chooses the integers; packing, products, kernels and folders follow it.
"""
import sys

from checkpoint import load_model, replace_model
from quant import quantize, quantize_rows

def ternary(weight, bits, group):
    """weight (out, in) -> q int8 (out, in), s and o float16 (out, in / group)."""
    if bits == 8:  # embedding and head
        return quantize_rows(weight, bits, group)
    w = weight.detach().float().unflatten(-1, (-1, group))  # (out, groups, group)
    scale = w.abs().mean(-1).clamp_min(1e-7)
    q = (w / scale[..., None]).round().clamp(-1, 1)
    return q.flatten(1).char(), scale.half(), scale.half() * 0

if __name__ == "__main__":
    model, tokenizer = load_model(sys.argv[1])
    quantize(model, 4, rounding=ternary)
    replace_model(sys.argv[2], model, tokenizer)
