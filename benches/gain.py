"""Where finetuning's gain comes from (Table VIII): what learns, from which weights; and baselines without it.

    python bench.py gain          hours on two cores; a stopped run goes on, a finished one is not repeated

Each run is finetune.py, then eval.py over all test rows; a sentiment is the likeliest label. From random
weights the same network learns without what pretraining gave it. Beside them, learned from the same rows: an
SVM over TF-IDF of words and pairs of words; a probe, linear in what the untuned head reads at the prompt's
end; and the untuned model without its bias towards a label (linear in its three log-likelihoods). `as full?`
is McNemar's p that a row and full finetuning are right equally often.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benches.common import DATA_DIR, run_once, table
from checkpoint import load_model, replace_model
from common.cli import write_atomic
from common.device import find_device
from common.run import read_metrics
from tasks import score, sets

# task, what learns, rank, bits, from random weights; the first two with three seeds
RUNS = [("fpb", "lora", 8, 8, False), ("fpb", "full", 0, 16, False), ("fpb", "last-block", 0, 16, False),
        ("fpb", "head", 0, 16, False), ("fpb", "lora", 8, 16, True), ("fpb", "full", 0, 16, True),
        ("fpb", "lora", 1, 8, False), ("fpb", "lora", 2, 8, False), ("fpb", "lora", 32, 8, False),
        ("fpb", "lora", 8, 4, False), ("fpb", "lora", 8, 16, False), ("fiqa", "lora", 8, 8, False),
        ("fiqa", "full", 0, 16, False), ("tfns", "lora", 8, 8, False), ("tfns", "full", 0, 16, False)]
PAPER = {"fpb": "0.518 -> 0.850", "fiqa": "0.686 -> 0.860", "tfns": "0.809 -> 0.894"}  # Llama2-7B, 8-bit LoRA
FEW, PROBED = 600, 2000  # rows that the untuned model's bias is taken from, and the probe
DEFAULTS = dict(base="smollm2-135m", max_iters=150, hours=24.0, out_dir="out/gain")

def row(task, method, examples, predictions, **more):
    """A line of the results; labels and predictions as strings of digits."""
    labels = [e.label for e in examples]
    counts = score.confusion(labels, predictions, 3)
    given, right, hits = counts.sum((0, 1)), counts.sum((0, 2)), np.diagonal(counts.sum(0))
    return dict(task=task, method=method, f1=float(score.weighted_f1(counts.sum(0))),
                macro_f1=float(np.mean(2 * hits / np.maximum(given + right, 1))),
                interval=score.bootstrap(counts, score.weighted_f1),
                labels="".join(map(str, labels)), predictions="".join(map(str, predictions))) | more

def finetuned(args, task, method, rank, bits, is_random, seed, examples):
    """The row of a run. None: it is late."""
    folder = Path(args.out_dir) / f"{task}-{method}-r{rank}-{bits}bit{'-random' if is_random else ''}-{seed}"
    base = Path(args.out_dir) / "random" if is_random else args.base
    rank_flag = ["--rank", rank] if rank else []
    if time.time() > args.deadline and not (folder / "scores" / "summary.json").exists():
        return None
    if is_random and not base.exists():
        model, tokenizer = load_model(args.base)
        torch.manual_seed(1)
        model.init_weights()
        replace_model(base, model, tokenizer)
    s = run_once("finetune.py", folder, "--base", base, "--task", task, "--method", method, "--bits", bits,
                 *rank_flag, "--seed", seed, "--max-iters", args.max_iters, "--eval-limit", 0)
    model = ["--model", base, "--adapter", folder] if rank else ["--model", folder]
    run_once("eval.py", folder / "scores", "--tasks", task, *model, "--bits", bits)
    written = read_metrics(folder / "scores" / "predictions" / f"{task}.jsonl")
    likeliest = {r["index"]: r["likeliest"] for r in written}
    return row(task, method, examples, [likeliest[e.index] for e in examples], rank=rank, bits=bits,
               random=is_random, seed=seed, learned=s["trainable_parameters"], seconds=s["seconds"])

@torch.inference_mode()
def baselines(task, model, tokenizer, device):
    """The rows of a task for which nothing is finetuned."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC
    train, test = (sets.load(task, DATA_DIR, part) for part in ("train", "test"))

    def texts(examples):  # the sentences alone, without the instruction
        return [e.prompt.split("\nInput: ", 1)[1].rsplit("\nAnswer: ", 1)[0] for e in examples]

    def likelihoods(examples):  # of each label after each prompt: (n, 3)
        batches = score.score_in_batches(model, tokenizer, examples, device)
        found = {id(example): scores for batch in batches for example, scores, *_ in batch}
        return np.array([found[id(e)] for e in examples])

    def states(examples):  # what the head reads at the last token of each prompt: (n, C)
        prompts = [score.encode_pair(tokenizer, e.prompt, e.answer)[0] for e in examples]
        hidden = [model.hidden(torch.tensor([ids], device=device.torch_device))[0, -1] for ids in prompts]
        return torch.stack(hidden).float().cpu().numpy()

    def learned(method, examples, features, *machine):
        fitted = make_pipeline(*machine).fit(features(examples), [e.label for e in examples])
        return row(task, method, test, fitted.predict(features(test)))
    linear = StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    commonest = statistics.mode(e.label for e in train)
    return [row(task, "always the commonest label", test, [commonest] * len(test)),
            learned("TF-IDF, linear SVM", train, texts,
                    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC()),
            row(task, "untuned", test, likelihoods(test).argmax(1)),
            learned("untuned, calibrated", sets.draw(train, FEW), likelihoods, *linear),
            learned("linear probe", sets.draw(train, PROBED), states, *linear)]

def bench(args):
    args.deadline, device, rows = time.time() + 3600 * args.hours, find_device("float32"), []
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.base, device.torch_device)
    for task in PAPER:
        file = Path(args.out_dir) / f"baselines-{task}.json"
        if not file.exists():
            write_atomic(file, json.dumps(baselines(task, model, tokenizer, device)))
        rows += json.loads(file.read_text())
    for run in [(*run, seed) for seed in (1, 2, 3) for run in (RUNS if seed == 1 else RUNS[:2])]:
        rows.append(finetuned(args, *run, sets.load(run[0], DATA_DIR)))
    return device, [line for line in rows if line]

def report(rows):
    """A table for each task; its last column compares with full finetuning of the same seed."""
    full = {(r["task"], r["seed"]): r for r in rows if r["method"] == "full" and not r["random"]}

    def as_full(line):
        other = full.get((line["task"], line.get("seed", 1)), line)
        hits = [np.array([*r["labels"]]) == np.array([*r["predictions"]]) for r in (line, other)]
        p = score.mcnemar(*hits)
        return None if other is line else f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    columns = {"learns": "method", "r": lambda r: r.get("rank") or None, "bits": "bits",
               "weights": lambda r: "random" if r.get("random") else None, "seed": "seed",
               "learned": ("learned", "{:.2f}M", 1e6), "weighted F1": ("f1", "{:.3f}"),
               "95%": lambda r: "{:.3f} to {:.3f}".format(*r["interval"]), "macro F1": ("macro_f1", "{:.3f}"),
               "as full?": as_full}
    texts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        texts.append(f"{task}, {len(mine[0]['labels']):,} test rows (the paper, Llama2-7B, 8-bit LoRA: "
                     f"{PAPER[task]})\n\n{table(mine, columns)}")
    return "\n\n".join(texts)
