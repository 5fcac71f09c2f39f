"""RoPE (the paper's [32]): the pairs of coordinates (x_i, x_{i+d/2}) of q and k turn by position x f_i, with
f_i = base^(-2i/d). A context that is longer than the one trained on asks for slower turns:

    linear    all of them, by rope_factor
    llama3    those of pairs that turn less than rope_high times in the context before, rope_original; below
              rope_low by the whole factor, in between by a part of it
    yarn      as llama3, but the part falls along i, and cos and sin are rope_attention times as long
    dynamic   none up to the model's context; of a longer text the base grows with its length. So the turns
              of all tokens change with every token, which keys in a cache don't follow: not with a cache
"""
import math

import torch

from common.cli import refuse

HAS_ORIGINAL = {"linear": False, "dynamic": False, "llama3": True, "yarn": True}

def check_rope(c):
    """Refuse a model.Config that has no such frequencies."""
    refuse(c.head_size % 2, f"RoPE turns pairs: the head size must be even, got {c.head_size}")
    fits = HAS_ORIGINAL.get(c.rope_scaling) == (c.rope_original > 0)
    refuse(not fits or c.rope_factor <= 0 or c.rope_low >= c.rope_high, "RoPE's scaling must be linear or "
           "dynamic, or llama3 or yarn with rope_original above 0, its factor above 0, low below high: got "
           f"{c.rope_scaling}, {c.rope_original}, {c.rope_factor}, {c.rope_low}, {c.rope_high}")

def rope_frequencies(config, device=None, length=0):
    """By how much a token turns each pair: (d/2,), float32. length: of the text, for dynamic scaling."""
    c, d, base = config, config.head_size, config.rope_base
    pairs, dynamic = torch.arange(d // 2, device=device, dtype=torch.float32), c.rope_scaling == "dynamic"
    if dynamic and length > c.context:
        base *= (c.rope_factor * length / c.context - c.rope_factor + 1) ** (d / (d - 2))
    f = base ** (-2 * pairs / d)
    if dynamic or c.rope_factor == 1:
        return f
    if c.rope_scaling == "yarn":
        first, last = (d / 2 * math.log(c.rope_original / (2 * math.pi * turns)) / math.log(base)
                       for turns in (c.rope_high, c.rope_low))  # pairs that turn so often
        first, last = max(math.floor(first), 0), min(math.ceil(last), d - 1)
        kept = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    else:
        turns = c.rope_original * f / (2 * math.pi)
        kept = ((turns - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
    return f * (kept + (1 - kept) / c.rope_factor)

def rope_tables(positions, config, length=0):
    """RoPE's cos and sin: positions (..., T) -> two of (..., T, d/2), float32."""
    angle = positions[..., None].float() * rope_frequencies(config, positions.device, length)
    return config.rope_attention * angle.cos(), config.rope_attention * angle.sin()

def apply_rope(x, cos, sin):
    """Turn the pairs of x (B, heads, T, d) by the angles of their positions."""
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in (cos, sin))  # (1 or B, 1, T, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
