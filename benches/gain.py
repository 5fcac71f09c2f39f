"""Where finetuning's gain comes from (Table VIII): what learns, from which weights; and baselines without it.

    python bench.py gain          hours on two cores; a stopped run goes on, a finished one is not repeated

Each run is finetune.py, then eval.py over all test rows; a sentiment is the likeliest label. From random
weights the same network learns without what pretraining gave it. Beside them, learned from the same rows: an
SVM over TF-IDF of words and pairs of words; a probe, linear in what the untuned head reads at the prompt's
end; and the untuned model without its bias towards a label (linear in its three log-likelihoods). `as full?`
is McNemar's p that a row and full finetuning are right equally often.
"""
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benches.common import DATA_DIR, run_once, table
from checkpoint import load_model, replace_model
from common.device import find_device
from common.generate import padded
from common.run import read_metrics
from tasks import score, sets

# task, what learns, rank, bits, from random weights; the first two also with seeds 2 and 3
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
    total = counts.sum(0)
    macro = np.mean(2 * np.diagonal(total) / np.maximum(total.sum(0) + total.sum(1), 1))
    return dict(task=task, method=method, f1=float(score.weighted_f1(total)), macro_f1=float(macro),
                interval=score.bootstrap(counts, score.weighted_f1), rows=len(examples),
                labels="".join(map(str, labels)), predictions="".join(map(str, predictions))) | more


def finetuned(args, task, method, rank, bits, is_random, seed, examples):
    """The row of a run. None: it is late."""
    folder = Path(args.out_dir) / f"{task}-{method}-r{rank}-{bits}bit{'-random' if is_random else ''}-{seed}"
    base, of_rank = Path(args.out_dir) / "random" if is_random else args.base, ["--rank", rank] if rank else []
    if time.time() > args.deadline and not (folder / "scores" / "summary.json").exists():
        return None
    if is_random and not base.exists():
        model, tokenizer = load_model(args.base)
        torch.manual_seed(1)
        model.init_weights()
        replace_model(base, model, tokenizer)
    s = run_once("finetune.py", folder, "--base", base, "--task", task, "--method", method, "--bits", bits,
                 *of_rank, "--seed", seed, "--max-iters", args.max_iters, "--eval-limit", 0)
    model = ["--model", base, "--adapter", folder] if rank else ["--model", folder]
    run_once("eval.py", folder / "scores", "--tasks", task, *model, "--bits", bits)
    written = read_metrics(folder / "scores" / "predictions" / f"{task}.jsonl")
    likeliest = {r["index"]: r["likeliest"] for r in written}
    return row(task, method, examples, [likeliest[e.index] for e in examples], rank=rank, bits=bits,
               random=is_random, seed=seed, learned=s["trainable_parameters"], seconds=s["seconds"])


@torch.inference_mode()
def states(model, tokenizer, examples):
    """What the head reads at the last token of each prompt: (n, C)."""
    prompts = [score.encode_pair(tokenizer, e.prompt, e.answer)[0] for e in examples]
    found, order = torch.empty(len(prompts), model.config.width), np.argsort([len(ids) for ids in prompts])
    for part in np.array_split(order, -(-len(order) // 32)):  # of nearly one length, padded at the right
        h = model.hidden(padded([prompts[i] for i in part], 0, model.norm.weight.device))
        found[part] = h[torch.arange(len(part)), [len(prompts[i]) - 1 for i in part]].float().cpu()
    return found.numpy()


def likelihoods(model, tokenizer, device, examples):
    """The log-likelihood of each label after each prompt: (n, 3)."""
    found = {}
    for batch in score.score_in_batches(model, tokenizer, examples, device):
        found |= {id(example): scores for example, scores, *_ in batch}
    return np.array([found[id(e)] for e in examples])


def baselines(task, train, test, model, tokenizer, device):
    """The rows of a task for which nothing is finetuned."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    def learned(method, examples, features, *machine):
        fitted = make_pipeline(*machine).fit(features(examples), [e.label for e in examples])
        return row(task, method, test, fitted.predict(features(test)))

    def texts(examples):  # the sentences alone, without the instruction
        return [e.prompt.split("\nInput: ", 1)[1].rsplit("\nAnswer: ", 1)[0] for e in examples]

    def of_labels(examples):
        return likelihoods(model, tokenizer, device, examples)

    def of_states(examples):
        return states(model, tokenizer, examples)
    commonest = statistics.mode(e.label for e in train)
    scaled = StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC()
    return [row(task, "always the commonest label", test, [commonest] * len(test)),
            learned("TF-IDF, linear SVM", train, texts, *words),
            row(task, "untuned", test, of_labels(test).argmax(1)),
            learned("untuned, calibrated", sets.draw(train, FEW), of_labels, *scaled),
            learned("linear probe", sets.draw(train, PROBED), of_states, *scaled)]


def bench(args):
    args.deadline, device, rows = time.time() + 3600 * args.hours, find_device("float32"), []
    parts = {task: [sets.load(task, DATA_DIR, part) for part in ("train", "test")] for task in PAPER}
    model, tokenizer = load_model(args.base, device.torch_device)
    for task in PAPER:
        rows += baselines(task, *parts[task], model, tokenizer, device)
    runs = [(*run, seed) for seed in (1, 2, 3) for run in (RUNS if seed == 1 else RUNS[:2])]
    rows += [finetuned(args, *run, parts[run[0]][1]) for run in runs]
    return device, [line for line in rows if line]


def report(rows):
    """A table for each task: means over the seeds, the first seed's interval, and McNemar's p."""
    def right(line):
        return np.array([label == given for label, given in zip(line["labels"], line["predictions"])])
    tables = []
    for task in dict.fromkeys(r["task"] for r in rows):
        lines, shown = {}, []
        for r in (r for r in rows if r["task"] == task):
            name = r["method"] + (f" r = {r['rank']}" if r.get("rank") else "")
            lines.setdefault((name + ", random weights" * r.get("random", False), r.get("bits")), []).append(r)
        full = lines.get(("full", 16))
        for (name, bits), runs in lines.items():
            first, f1 = runs[0], [r["f1"] for r in runs]
            spread = f" ({min(f1):.3f} to {max(f1):.3f})" if len(f1) > 1 else ""
            p = score.mcnemar(right(first), right(full[0])) if full and runs is not full else None
            shown.append({
                f"{task}, {first['rows']:,} rows": name, "bits": bits,
                "learned": f"{first['learned'] / 1e6:.2f}M" if "learned" in first else None,
                "weighted F1": f"{statistics.fmean(f1):.3f}{spread}",
                "95%": "{:.3f} to {:.3f}".format(*first["interval"]),
                "macro F1": f"{statistics.fmean(r['macro_f1'] for r in runs):.3f}",
                "as full?": None if p is None else f"p = {p:.3f}"})
        tables.append(f"{table(shown)}\n\nThe paper, Llama2-7B, 8-bit LoRA: {PAPER[task]}")
    return "\n\n".join(tables)
