"""Decomposition (section IV.B): time and error against a loop of torch.linalg.svd.

    python bench.py decompose        all matrices of smollm2-135m and random ones of GPT-2's shapes (--models)

At a third of the ranks. The loop takes W, or W C where inputs count (H = C C^T their second moments), and is
given C; ours has to compute it. Gathering H is not timed. error_over_optimum is the largest over all
matrices, of the Frobenius norm of (W - B A) C over that of the best possible, in float64. What a model loses
is measured by bench.py compress.
"""
import torch

from benches.common import interleaved, table
from beyond.activations import Moments, walk
from checkpoint import load_model
from common.data import calibration_batches
from common.device import find_device
from lowrank import svd_factors
from model import config_for

REAL = "smollm2-135m"
DEFAULTS = dict(models=[REAL, "gpt2"])

@torch.no_grad()
def smollm2(device):
    """Matrices that share inputs, and H of these, from 4,096 tokens of Python's own text: [(matrices, H)]."""
    (model, tokenizer), groups = load_model(REAL, device), []

    def look(layers, H):
        groups.append(([layer.weight.detach() for layer in layers.values()], H))
        return {}

    walk(model, calibration_batches("builtin", tokenizer, model.config.context, 4096), look, "moments")
    return groups

def random_matrices(name, device):
    """The same of a GPT-2's shapes: random matrices (flat spectra), inputs of deviations 1/sqrt(i)."""
    config, groups = config_for(name), []
    n, m = config.width, config.ffn
    torch.manual_seed(0)
    for shape in [(3 * n, n), (n, n), (m, n), (n, m)] * config.blocks:
        deviations = torch.arange(1, shape[1] + 1, device=device) ** -0.5
        X = torch.randn(4096, shape[1], device=device) * deviations  # (tokens, in)
        groups.append(([0.02 * torch.randn(shape, device=device)], X.T @ X))
    return groups

def compare(matrices, H, method):
    """Seconds of ours and of the loop, in turn, and the largest error over the optimum."""
    plain = method == "plain"
    C = torch.eye(len(H), dtype=torch.float64, device=H.device) if plain else Moments(H).C
    targets, worst = [(W.double() @ C).float() for W in matrices], 0.0

    def run_ours():
        if plain:
            return [svd_factors(W, min(W.shape) // 3) for W in matrices]
        moments = Moments(H)
        return [moments.factors(W, min(W.shape) // 3)[0] for W in matrices]

    def run_loop():
        return [torch.linalg.svd(M, full_matrices=False)[1] for M in targets]
    (ours, factors), (loop, spectra) = interleaved({"ours": run_ours, "loop": run_loop}, 1).values()
    for W, (B, A), S in zip(matrices, factors, spectra):
        error = ((W.double() - B.double() @ A.double()) @ C).norm() / S[len(A):].double().norm()
        worst = max(worst, error.item())
    return ours, loop, worst

def bench(args):
    device, rows = find_device("float32"), []
    torch.set_float32_matmul_precision("highest")
    for model in args.models:
        where = device.torch_device
        groups = smollm2(where) if model == REAL else random_matrices(model, where)
        for method in ("plain", "activations"):
            seconds, loop, errors = zip(*(compare(matrices, H, method) for matrices, H in groups))
            rows.append(dict(model=model, method=method, seconds=sum(seconds), seconds_loop=sum(loop),
                             matrices=sum(len(matrices) for matrices, _ in groups),
                             speedup=sum(loop) / sum(seconds), error_over_optimum=max(errors)))
    return device, rows

def report(rows):
    return table(rows, {
        "matrices of": lambda r: "random, as GPT-2" if r["model"] == "gpt2" else r["model"],
        "method": "method", "seconds": ("seconds", "{:.1f}"), "loop of svd": ("seconds_loop", "{:.1f}"),
        "speedup": ("speedup", "{:.1f}x"), "error over optimum": ("error_over_optimum", "{:.5f}")})
