"""What making a pretrained model smaller costs (Tables VI and VII): perplexity, after recovery and rounding.

    python bench.py compress --calibration A.txt --recovery FOLDER --texts B.txt,C.txt

The same share of the blocks' parameters for all: decompose.py's SVD of weights (plain) and of outputs
(activations); the second after train.py --method 2, without and with rounding to 4 bits in its steps. Beside
them two peers, made from their papers, without the training that may follow:

    SVD-LLM   2403.07378: B A of each matrix for the inputs of the dense model, equal shares for all; then B
              is fitted to the inputs that there are now
    MoDeGPT   2408.09632: parts of heads and hidden units, equal shares for all blocks: rows of W^Q and W^K by
              their norms under H, W^O W^V by its SVD, hidden units by ridge leverage scores

H = X X^T is of --calibration, perplexity of the first TOKENS tokens of each of --texts. 4 bits are groups of
64 (the dense model's, too, though its file has 4 bits already). A stopped run goes on in --out-dir.
"""
import json
import time
from itertools import product
from pathlib import Path

import torch

from benches.common import DATA_DIR, run_once, table
from beyond.activations import Moments, walk
from checkpoint import load_model, open_model, replace_model
from common.cli import refuse, write_atomic
from common.data import calibration_batches
from common.device import find_device
from eval import WINDOW, score_task, text_windows
from lowrank import from_factors
from tasks import sets

RATIOS, TOKENS, TASKS = (0.9, 0.8, 0.6), 8192, ("piqa", "winogrande", "boolq")
BITS = {"dense": (16, 8, 4), "plain": (16, 8, 4), "activations": (16, 8, 4), "SVD-LLM": (16,),
        "MoDeGPT": (16,), "recovered": (16, 8, 4), "recovered at 4 bit": (4,)}  # method: those measured
DEFAULTS = dict(model="smollm2-135m", texts=["builtin"], calibration="builtin", recovery="builtin",
                steps=2000, limit=200, hours=24.0, out_dir="out/compress")
SAME = ("model", "texts", "calibration", "recovery", "steps", "limit")  # in one --out-dir

def fitted(W, A, H):
    """B (out, r) whose B A X is nearest to W X: W H A^T (A H A^T)^-1."""
    return torch.linalg.solve(A @ H @ A.T, A @ H @ W.double().T).T

def svd_llm(model, windows, ratio):
    factors = {}

    def truncate(layers, H):
        for name, layer in layers.items():
            out, width = layer.weight.shape
            factors[name] = Moments(H).factors(layer.weight, int(ratio * out * width / (out + width)))[0]
        return {}

    def refit(layers, H):
        H, found = Moments(H).H, {}
        for name, layer in layers.items():
            A = factors[name][1].double()
            found[name] = from_factors(layer, fitted(layer.weight, A, H), A)
        return found
    walk(model, windows, truncate, "SVD-LLM")
    walk(model, windows, refit, "its update")

def modegpt(model, windows, ratio):
    """What it takes away becomes zero."""
    c = model.config
    d, heads = c.head_size, c.heads // c.kv_heads  # that share a key

    def queries_and_keys(q, k, C):
        """Of each head, pairs of rows that are rotated together, those of the largest products of norms."""
        of_q, of_k = ((m.weight.double() @ C).square().sum(1).view(c.kv_heads, -1, 2, d // 2) for m in (q, k))
        scores = (of_q.sum(1) * of_k.sum(1)).sqrt().sum(1)  # (kv_heads, d / 2)
        kept = torch.zeros_like(scores).scatter(1, scores.topk(round(ratio * d / 2)).indices, 1)
        for m, times in ((q, heads), (k, 1)):
            m.weight.mul_(kept.repeat_interleave(times, 0).repeat(1, 2).view(-1, 1))

    def values_and_output(v, o, C):
        """The best product of a lower rank: of each head of W^V and the heads of W^O that read it."""
        r, of_o = round(ratio * d), o.weight.view(c.width, c.kv_heads, heads, d)
        for V, W in zip(v.weight.view(c.kv_heads, d, -1), of_o.unbind(1)):  # W: (width, heads, d)
            both = W.transpose(0, 1).flatten(0, 1).double() @ V.double()  # W^O W^V: (heads width, width)
            U = torch.linalg.svd(both @ C, full_matrices=False)[0][:, :r]
            V.zero_()[:r] = U.T @ both
            W.zero_()[:, :, :r] = U.view(heads, c.width, r).transpose(0, 1)

    def hidden_units(down, H):
        """Those of the largest scores; W^D makes good what it can of the others."""
        ridge = H + H.diagonal().mean() * torch.eye(len(H), device=H.device)
        kept = torch.linalg.solve(ridge, H).diagonal().topk(round(ratio * len(H))).indices
        A = torch.eye(len(H), device=H.device, dtype=H.dtype)[kept]
        down.weight.copy_(fitted(down.weight, A, H) @ A)

    def change(layers, H):
        part, last = next(iter(layers)).rsplit(".", 1)
        part, moments = model.get_submodule(part), Moments(H)
        if last == "q":
            queries_and_keys(part.q, part.k, moments.C)
            values_and_output(part.v, part.o, moments.C)
        elif last == "down":
            hidden_units(part.down, moments.H)
        return {}
    walk(model, windows, change, "MoDeGPT")

PEERS = {"SVD-LLM": svd_llm, "MoDeGPT": modegpt}

def make(args, method, ratio, folder):
    """Make a smaller model in a folder."""
    if method in ("plain", "activations"):
        text = ["--calibration", args.calibration] if method == "activations" else []
        run_once("decompose.py", folder, "--model", args.model, "--ratio", ratio, *text)
    elif method in PEERS:
        model, tokenizer = load_model(args.model, find_device("float32").torch_device)
        windows = calibration_batches(args.calibration, tokenizer, model.config.context)
        with torch.no_grad():
            PEERS[method](model, windows, ratio)
        replace_model(folder, model, tokenizer)
    else:
        run_once("train.py", folder, "--init-from", folder.with_name(f"activations-{ratio}"), "--method", 2,
                 "--bits", max(BITS[method]), "--data", args.recovery, "--max-iters", args.steps,
                 "--batch-size", 2, "--seq-len", 256)

def measured(args, method, ratio, device):
    """The rows of a method at a ratio, measured now or found where they were written before."""
    folder = Path(args.out_dir) / f"{method}-{ratio}".replace(" ", "-")
    file, rows, source = folder.with_name(f"{folder.name}.rows.json"), [], args.model
    if file.exists():
        return json.loads(file.read_text())
    if time.time() > args.deadline:
        return []
    if method != "dense":
        make(args, method, ratio, folder)
        source = folder / "int4" if method == "recovered at 4 bit" else folder
    for bits in BITS[method]:
        group = 64 if method == "dense" and bits == 4 else None  # not the file's own blocks
        (model, tokenizer), scores = load_model(source, device.torch_device, bits=bits, group=group), {}
        for text in args.texts:
            parts = text_windows(text, tokenizer, TOKENS, min(WINDOW, model.config.context))
            scores[Path(text).name] = score_task(model, tokenizer, device, "perplexity", parts)["perplexity"]
        for task in TASKS if bits == 16 and method in ("dense", "recovered") else ():
            examples = sets.draw(sets.load(task, DATA_DIR), args.limit)
            scores[task] = score_task(model, tokenizer, device, task, examples)["accuracy"]
        rows.append(dict(method=method, ratio=ratio, bits=bits, scores=scores))
    write_atomic(file, json.dumps(rows))
    return rows

def bench(args):
    args.deadline, device = time.time() + 3600 * args.hours, find_device("float32")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    file, wanted = Path(args.out_dir) / "flags.json", json.dumps({name: getattr(args, name) for name in SAME})
    made = file.read_text() if file.exists() else wanted
    refuse(made != wanted, f"{args.out_dir} holds runs of {made}, and {wanted} is asked for: remove it, or "
           "choose another --out-dir")
    refuse(open_model(args.model).config.kind != "llama", f"--model {args.model}: it must be of Llama's kind")
    refuse(len({Path(text).name for text in args.texts}) < len(args.texts), "--texts need different names")
    write_atomic(file, wanted)
    cases = [("dense", 1.0), *product([*BITS][1:], RATIOS)]
    return device, sum((measured(args, *case, device) for case in cases), [])

def report(rows):
    """A line for each model, perplexity at its bits in this order, accuracy at the first."""
    lines = {}
    for r in rows:
        bits = " / ".join(map(str, BITS[r["method"]]))
        line = lines.setdefault((r["method"], r["ratio"]),
                                {"": r["method"], "kept": f"{r['ratio']:.0%}", "bits": bits})
        for name, value in r["scores"].items():
            text = f"{value:.3f}" if name in TASKS else f"{value:,.{0 if value > 100 else 1}f}"
            line[name] = f"{line[name]} / {text}" if name in line else text
    return table(lines.values())
