"""Measure a model. Perplexity of a text so far, as in the tables on compression.

    python eval.py --model smollm2-135m --tasks perplexity --data wikitext2-valid.txt --limit 16384

Perplexity is exp of the mean loss over windows of 1,024 tokens without overlap (or the model's context, if that is shorter): the first
token of a window is given, the others are predicted. Bits per byte divide the same loss by the bytes of the predicted text, so that models
with different tokenizers can be compared.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model
from data import open_corpus
from model import count_parameters
from recompute import head_loss
from runtime import InputError, command, find_device, peak_memory, write_atomic

WINDOW = 1024


def read_tokens(path, tokenizer, limit):
    """Ids of a text, at most `limit` of them; only as much of the text is tokenized as that needs."""
    if tokenizer is None:
        raise InputError("the model has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")
    ids, text = [], "".join(open_corpus(path, "data").documents())
    piece = len(text) if limit is None else 16 * limit  # characters; no vocabulary here has longer tokens on average
    ids = tokenizer.encode(text[:piece])[:limit]
    if len(ids) < 2:
        raise InputError(f"{path} has {len(ids)} tokens: perplexity needs at least 2")
    return ids


def interval(values, weights, seed=0, draws=2000):
    """95% bootstrap interval of exp of the weighted mean."""
    pick = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = (values[pick] * weights[pick]).sum(1) / weights[pick].sum(1)
    return [math.exp(q) for q in np.quantile(means, (0.025, 0.975))]


@torch.inference_mode()
def perplexity(model, tokenizer, device, args):
    start = time.perf_counter()
    ids = torch.tensor(read_tokens(args.data, tokenizer, args.limit))
    window = min(WINDOW, model.config.context)
    losses, counts = [], []
    for row in tqdm(ids.split(window), desc="perplexity", unit=" windows", disable=None, leave=False):
        if len(row) < 2:  # a last token alone has nothing to be predicted from
            continue
        row = row.to(device.torch_device)[None]
        with device.autocast():
            losses.append(head_loss(model.head, model.hidden(row[:, :-1]), row[:, 1:]).item())
        counts.append(row.shape[1] - 1)
    losses, counts = np.array(losses), np.array(counts)
    loss = float((losses * counts).sum() / counts.sum())
    size = len(tokenizer.decode(ids.tolist()).encode())
    return dict(perplexity=math.exp(loss), loss=loss, bits_per_byte=loss * int(counts.sum()) / math.log(2) / size, interval=interval(losses, counts),
                tokens=len(ids), window=window, rows=len(losses), seconds=time.perf_counter() - start)


TASKS = {"perplexity": perplexity}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/train", help="a model folder, a file, or a known name (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights while loading (default: %(default)s)")
    p.add_argument("--tasks", default="perplexity", help=f"separated by commas: {', '.join(TASKS)} (default: %(default)s)")
    p.add_argument("--data", default="builtin", help="text for perplexity: a file, a folder, or builtin (default: %(default)s)")
    p.add_argument("--limit", type=int, help="tokens of that text, from its start (default: all)")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--out-dir", default="out/eval", help="where summary.json goes (default: %(default)s)")
    args = p.parse_args(argv)
    tasks = args.tasks.split(",")
    if unknown := [t for t in tasks if t not in TASKS]:
        raise InputError(f"no task is called {unknown[0]!r}: the tasks are {', '.join(TASKS)}")
    if args.limit is not None and args.limit < 2:
        raise InputError(f"--limit must be at least 2 tokens, got {args.limit}")
    device = find_device(args.dtype)
    model, tokenizer = load_model(args.model, device.torch_device, bits=args.bits)
    results = {task: TASKS[task](model, tokenizer, device, args) for task in tasks}
    for task, r in results.items():
        print(f"{task}: {r['perplexity']:.3f} (95% {r['interval'][0]:.2f} to {r['interval'][1]:.2f}), {r['bits_per_byte']:.3f} bits a byte, "
              f"{r['rows']} windows of {r['window']} tokens, {r['seconds']:.1f} s")
    summary = dict(**results, model=str(args.model), parameters=count_parameters(model), peak_memory_bytes=peak_memory(device.torch_device),
                   device=device.name, arguments=vars(args))
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(args.out_dir) / "summary.json", json.dumps(summary, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
