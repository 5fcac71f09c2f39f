"""Better rounding than to the nearest step, for few bits (the paper's [31], GPTQ; quant.py has the format).

What counts is not the error of W but that of y = W x. Over the inputs X of some text, an error
E = W - (s q + o) changes y by E X, of size sum(E H E^T) with the second moments H = X X^T: one matrix for all
rows of W, and all that rounding needs to know.

    clipping        a smaller range has smaller steps: shrink it as long as the squared error falls
    error feedback  (GPTQ) round one column of W after the other; what was lost is made good, as far as H
                    allows, by the columns still to come
    sweeps          then go over s, o and the integers again, each best now that all others are known

H is gathered along a text (activations.walk), as the layers before, already rounded, pass it on.

    quantize_calibrated(model, 4, batches)              # batches: tokens (B, T) of text like the use
    quantize(model, 4, rounding=clip_rows)              # without a text
    python checkpoint.py quantize smollm2-135m out/int4 --bits 4 --calibration TEXT
"""
import math
from functools import partial

import torch

import quant
from beyond.activations import walk
from common.cli import refuse
from lowrank import LowRankLinear
from quant import QuantMatrix, decode, encode, nearest, scale_and_offset

def choose_range(w, bits, group):
    """s and o (..., in / group) of w (..., in), ranges shrunk as far as a vector's squared error falls."""
    vectors = w.unflatten(-1, (-1, group))
    low, high = vectors.amin(-1), vectors.amax(-1)
    best, best_error = scale_and_offset(low, high, bits), torch.full_like(low, math.inf)
    for shrink in torch.linspace(1, 0.5, 26).tolist():
        tried = scale_and_offset(low * shrink, high * shrink, bits)
        error = (decode(encode(w, *tried, bits), *tried) - w).square_().unflatten(-1, (-1, group)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = [torch.where(better, new, old) for new, old in zip(tried, best)]
    return best

def clip_rows(weight, bits, group):
    """quantize_rows with clipped ranges."""
    w = weight.detach().float()
    scale, offset = choose_range(w, bits, group)
    return encode(w, scale, offset, bits), scale, offset

def feedback_rows(weight, bits, group, moments, damping=0.03, sweeps=3):
    """quantize_rows with error feedback and sweeps, for inputs of the second moments H (in, in)."""
    W, mean = weight.detach().float(), moments.diagonal().mean()
    refuse(not moments.isfinite().all() or not mean.isfinite(), "the second moments of a layer's inputs are "
           "not finite: round without a calibration text, or is the model damaged?")
    H = moments.float() / mean.clamp_min(1e-30)
    H = H + damping * torch.eye(len(H), device=H.device)  # inputs that the text never showed count a little
    scale, offset = choose_range(W, bits, group)
    q = round_with_feedback(W, scale, offset, bits, group, H)
    for _ in range(sweeps):
        sweep(W, q, scale, offset, bits, group, H)
    return q.to(torch.int8), scale, offset

def round_with_feedback(W, scale, offset, bits, group, H, block=128):
    """Integers (out, in), as float, of W with given s and o. Columns of the largest inputs come first."""
    order = H.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order].double()))
    U = torch.linalg.cholesky(inverse, upper=True).float()
    W, q = W[:, order].clone(), torch.empty_like(W)
    s, o = (t.float().repeat_interleave(group, 1)[:, order] for t in (scale, offset))  # (out, in)
    for start in range(0, W.shape[1], block):  # a block's own columns are fed at once
        end = min(start + block, W.shape[1])
        lost = torch.empty(len(W), end - start, device=W.device)
        for j in range(start, end):
            integer = nearest(W[:, j], s[:, j], o[:, j], bits)
            lost[:, j - start] = (W[:, j] - (integer * s[:, j] + o[:, j])) / U[j, j]
            W[:, j + 1:end] -= lost[:, j - start, None] * U[j, j + 1:end]
            q[:, order[j]] = integer
        W[:, end:] -= lost @ U[start:end, end:]
    return q

def sweep(W, q, scale, offset, bits, group, H):
    """Lower sum(E H E^T), in place: for each group s and o by least squares, then its integers."""
    rounded = decode(q, scale, offset)
    G = (W - rounded) @ H  # (out, in): half the downhill direction
    for i in range(scale.shape[1]):
        columns = slice(i * group, (i + 1) * group)
        h, qg, before = H[columns, columns], q[:, columns], rounded[:, columns].clone()
        scale[:, i], offset[:, i] = fit_scale(qg, G[:, columns] + before @ h, h, scale[:, i], offset[:, i])
        s, o = scale[:, i].float(), offset[:, i].float()
        now = qg * s[:, None] + o[:, None]
        g = G[:, columns] - (now - before) @ h
        for j in range(group):
            best = now[:, j] + g[:, j] / h[j, j]
            qg[:, j] = nearest(best, s, o, bits)
            change = qg[:, j] * s + o - now[:, j]
            now[:, j] += change
            g -= change[:, None] * h[j]
        G -= (now - before) @ H[columns]

def fit_scale(q, target, h, scale, offset):
    """s and o that minimize e h e^T, e = t - s q - o, for target = t h; the old ones where q is constant."""
    qh = q @ h
    a, b, c = (qh * q).sum(1), qh.sum(1), h.sum()  # q h q, q h 1, 1 h 1
    u, v = (target * q).sum(1), target.sum(1)
    determinant = a * c - b * b
    s, o = (u * c - v * b) / determinant, (a * v - b * u) / determinant
    good = (determinant > 1e-6 * a * c) & (s >= quant.SMALLEST_HALF) & (s.maximum(o.abs()) < 6e4)
    return torch.where(good, s, scale.float()).half(), torch.where(good, o, offset.float()).half()

@torch.no_grad()
def quantize_calibrated(model, bits, batches, group=None, sweeps=3):
    """quant.quantize with error feedback in the blocks. Embedding and head are rounded to the nearest."""
    def change(layers, H):
        return {n: round_layer(n, layer, bits, group, H.float(), sweeps) for n, layer in layers.items()}

    walk(model, batches, change, "rounding")
    quant.quantize(model, bits, group)

def round_layer(name, layer, bits, group, moments, sweeps):
    """quantize_layer with error feedback. The inputs of B are A x, A already rounded: of moments A H A^T."""
    rounding = partial(feedback_rows, moments=moments, sweeps=sweeps)
    if not isinstance(layer, LowRankLinear):
        return quant.quantize_layer(layer, bits, group, rounding, name)
    A = QuantMatrix.of(layer.A, bits, group, rounding, f"{name}.A")
    dense = A.dense()
    rounding = partial(rounding, moments=dense @ moments @ dense.T)
    B = QuantMatrix.of(layer.B, bits, group, rounding, f"{name}.B")
    return quant.QuantLowRank(A, B, layer.bias)
