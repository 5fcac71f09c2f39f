"""eval.py: perplexity against transformers, scores against scikit-learn and seqeval on the predictions written, runs that end early or are shared out."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM

import eval as evaluation
from checkpoint import load_model, save_model
from common.adapters import base_id, save_adapter
from common.cli import InputError
from common.formats import export
from common.tokenizer import train_tokenizer
from lowrank import attach_lora
from model import Config, Transformer
from tasks import sets

SEVEN = "boolq,piqa,winogrande,fpb,fiqa,tfns,ner"

@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, text_file):
    """A random model with a real tokenizer, in our format and in Hugging Face's."""
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=600, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 600)
    save_model(folder / "ours", model, tokenizer)
    export(model, tokenizer, folder / "hf")
    return folder, tokenizer

def test_perplexity_is_that_of_transformers_over_the_same_windows(model_folder, text_file, tmp_path, capsys):
    folder, tokenizer = model_folder
    assert evaluation.main(["--model", str(folder / "ours"), "--data", str(text_file), "--limit", "1000", "--out-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "summary.json").read_text())["perplexity"]
    ids = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8"))[:1000])
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for row in ids.split(64):
            losses += torch.nn.functional.cross_entropy(theirs(row[None]).logits[0, :-1], row[1:], reduction="none").tolist()
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result["rows"] == 16
    assert result["interval"][0] < result["perplexity"] < result["interval"][1]
    assert f"| perplexity | perplexity | {result['perplexity']:.3f} |" in capsys.readouterr().out

def evaluate(model, data, out, *more):
    assert evaluation.main(["--model", str(model), "--data-dir", str(data), "--out-dir", str(out), *map(str, more)]) == 0
    return json.loads((out / "summary.json").read_text())

def predictions(out, task):
    return [json.loads(line) for line in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()]

def scores_only(summary):
    """Everything of a summary that does not depend on the clock."""
    kept = {task: dict(summary[task]) for task in (*SEVEN.split(","), "perplexity") if task in summary}
    for part in kept.values():
        del part["seconds"]
        part.get("unseen", {}).pop("seconds", None)
    return kept

@pytest.fixture(scope="module")
def finished(model_folder, task_data, text_file, tmp_path_factory):
    """An undisturbed run of everything: (folder, its summary)."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, evaluate(model_folder[0] / "ours", task_data, out, "--tasks", SEVEN + ",perplexity", "--data", text_file, "--limit", 25)

def test_every_task_has_what_the_tables_need(finished):
    out, summary = finished
    for task in SEVEN.split(","):
        r = summary[task]
        assert r["rows"] == (9 if task in ("fpb", "tfns", "ner") else 25) == len(predictions(out, task))
        assert r["interval"][0] <= r.get("f1", r.get("accuracy")) <= r["interval"][1] and 0 <= r["majority"] < 1 and r["seconds"] > 0
    assert summary["perplexity"]["rows"] == 1 and summary["parameters"] > 0 and summary["peak_memory_bytes"] > 1e7

def test_scores_are_those_of_the_predictions_written(finished, task_data):
    out, summary = finished
    for task in ("boolq", "piqa", "winogrande"):
        examples, rows = {e.index: e for e in sets.load(task, task_data)}, predictions(out, task)
        assert all(r["label"] == examples[r["index"]].label and r["prediction"] == np.argmax(r["scores"]) for r in rows)
        assert summary[task]["accuracy"] == np.mean([r["label"] == np.argmax(r["scores"]) for r in rows])
        ones = np.mean([r["label"] for r in rows])
        assert summary[task]["majority"] == max(ones, 1 - ones)
    for task in ("fpb", "fiqa", "tfns"):
        rows = predictions(out, task)
        labels, read = [r["label"] for r in rows], [sets.read_sentiment(r["answer"]) for r in rows]
        given = [sets.SENTIMENTS.index(label) for label, _ in read]
        assert summary[task]["f1"] == pytest.approx(f1_score(labels, given, average="weighted", zero_division=0))
        assert summary[task]["parsed"] == np.mean([parsed for _, parsed in read])
        assert summary[task]["likeliest"]["f1"] == pytest.approx(f1_score(labels, [np.argmax(r["scores"]) for r in rows], average="weighted", zero_division=0))
    rows = predictions(out, "ner")
    assert summary["ner"]["f1"] == seqeval_f1([r["label"] for r in rows], [r["tags"] for r in rows])

def test_entity_f1_of_right_and_wrong_answers_is_that_of_seqeval(task_data, monkeypatch):
    """The random model names nobody: answers are put in its place."""
    examples = sets.load("ner", task_data, "train")[:4]
    answers = [examples[0].answer, "Acme is a person", "", examples[3].answer.split(",")[0]]
    batch = [(e, [], text, 0) for e, text in zip(examples, answers)]
    monkeypatch.setattr(evaluation.score, "score_in_batches", lambda *args: iter([batch]))
    (pairs,) = evaluation.measured_rows(None, None, None, "ner", examples)
    rows = [answer for _, answer in pairs]
    found = evaluation.score_task(None, None, None, "ner", examples)
    assert found["f1"] == pytest.approx(seqeval_f1([r["label"] for r in rows], [r["tags"] for r in rows])) and 0.3 < found["f1"] < 0.8
    assert found["parsed"] == 0.75

def test_a_killed_run_goes_on(finished, model_folder, task_data, text_file, tmp_path):
    """Half of the lines are there, the last one cut short; one of them is about another row. The rest is measured, the result is the same."""
    out, summary = finished
    shutil.copytree(out, tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    for task in (SEVEN + ",perplexity").split(","):
        file = tmp_path / "killed" / "predictions" / f"{task}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        half = len(lines) // 2
        file.write_text("".join(lines[:half]).replace(json.loads(lines[0])["row"], "0" * 12) + lines[half][:20])
    again = evaluate(model_folder[0] / "ours", task_data, tmp_path / "killed", "--tasks", SEVEN + ",perplexity", "--data", text_file, "--limit", 25)
    assert close(scores_only(again), scores_only(summary))
    kept = [row["seconds"] for row in predictions(out, "piqa")[1:12]]
    assert [row["seconds"] for row in predictions(tmp_path / "killed", "piqa")[1:12]] == kept

def close(a, b):
    """The same up to rounding: batches of other rows change the last bits of a log-likelihood."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b or a == pytest.approx(b, rel=1e-5)

def test_another_model_does_not_take_over_rows(finished, model_folder, task_data, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    evaluate(model_folder[0] / "ours", task_data, tmp_path / "run", "--tasks", "boolq", "--limit", 3, "--bits", 8)
    assert f"moved to {tmp_path / 'run-1'}" in capsys.readouterr().out
    assert len(predictions(tmp_path / "run-1", "boolq")) == 25 and len(predictions(tmp_path / "run", "boolq")) == 3

def test_scores_without_the_rows_that_training_has_too(model_folder, task_data, tmp_path, capsys):
    shutil.copytree(task_data, tmp_path / "data")
    file = tmp_path / "data" / "fpb" / sets.PHRASES
    lines = file.read_text("latin-1").split("\n")
    file.write_text("\n".join([*lines[:12], *lines[:24]]) + "\n", encoding="latin-1")
    summary = evaluate(model_folder[0] / "ours", tmp_path / "data", tmp_path / "out", "--tasks", "fpb,boolq")
    examples, rows = sets.load("fpb", tmp_path / "data"), {r["index"]: r for r in predictions(tmp_path / "out", "fpb")}
    own = [rows[e.index] for e in examples if not e.seen]
    assert 0 < len(own) < len(examples) and summary["fpb"]["seen"] == len(examples) - len(own)
    unseen, labels = summary["fpb"]["unseen"], [r["label"] for r in own]
    assert unseen["rows"] == len(own) and unseen["accuracy"] == np.mean([r["label"] == r["prediction"] for r in own])
    likeliest = f1_score(labels, [r["likeliest"] for r in own], average="weighted", zero_division=0)
    assert unseen["likeliest"]["f1"] == pytest.approx(likeliest)
    text = capsys.readouterr().out
    assert re.search(r"^\| fpb unseen +\| weighted F1, as written", text, re.M) and "unseen" not in summary["boolq"]

def test_an_adapter_counts(finished, model_folder, task_data, tmp_path):
    folder = model_folder[0] / "ours"
    model, _ = load_model(folder)
    attach_lora(model, r=2, alpha=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".A", ".B")):
                p.copy_(torch.randn(p.shape))
    save_adapter(tmp_path / "adapter", model, str(folder), base_id(folder))
    summary = evaluate(folder, task_data, tmp_path / "out", "--tasks", "piqa", "--limit", 25, "--adapter", tmp_path / "adapter")
    before, after = predictions(finished[0], "piqa"), predictions(tmp_path / "out", "piqa")
    assert all(abs(a["scores"][0] - b["scores"][0]) > 1e-3 for a, b in zip(before, after)) and summary["parameters"] > finished[1]["parameters"]

# ----------------------------------------------------------------------------- two runs

def write_run(folder, **rows):
    (folder / "predictions").mkdir(parents=True)
    for task, lines in rows.items():
        (folder / "predictions" / f"{task}.jsonl").write_text("".join(json.dumps(dict(r, row=i)) + "\n" for i, r in enumerate(lines)))
    return str(folder)

def test_compare(tmp_path, capsys):
    """B has 30 of 100 rows more right than A in PIQA, and as many gained as lost in BoolQ."""
    a = write_run(tmp_path / "a", piqa=[dict(label=1, prediction=int(i < 40)) for i in range(100)],
                  boolq=[dict(label=1, prediction=i % 2) for i in range(100)], perplexity=[dict(loss=2.0, predicted=10)] * 20)
    b = write_run(tmp_path / "b", piqa=[dict(label=1, prediction=int(i < 70)) for i in range(100)],
                  boolq=[dict(label=1, prediction=1 - i % 2) for i in range(100)], perplexity=[dict(loss=2.1, predicted=10)] * 30)
    evaluation.main(["--compare", a, b])
    printed = capsys.readouterr().out
    rows = {row[1]: row for row in ([c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|"))}
    piqa, boolq = (next([c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith(f"| {t}")) for t in ("piqa", "boolq"))
    assert piqa[2:6] == ["100", "0.400", "0.700", "+0.300"] and piqa[7:] == ["< 0.001"]
    assert boolq[3:6] == ["0.500", "0.500", "+0.000"] and boolq[7:] == ["1.000"]
    assert rows["perplexity"][2] == "20" and rows["perplexity"][-1] == "< 0.001"
    assert max(map(len, printed.splitlines())) <= 110

def test_compare_of_whole_runs(finished, model_folder, task_data, tmp_path, run):
    evaluate(model_folder[0] / "ours", task_data, tmp_path / "int4", "--tasks", SEVEN, "--limit", 12, "--bits", 4)
    done = run("eval.py", "--compare", finished[0], tmp_path / "int4")
    assert done.returncode == 0 and all(re.search(rf"^\| {t} ", done.stdout, re.M) for t in SEVEN.split(",")), done.stderr

def test_compare_needs_two_runs(tmp_path):
    a, b = write_run(tmp_path / "a", piqa=[dict(label=1, prediction=1)]), write_run(tmp_path / "b", boolq=[dict(label=1, prediction=1)])
    with pytest.raises(InputError, match="they have no predictions of the same rows"):
        evaluation.main(["--compare", a, b])
    with pytest.raises(InputError, match="they have no predictions of the same rows"):
        evaluation.main(["--compare", a, str(tmp_path)])

# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("args, message", [
    (["--tasks", "nonsense"], "no task is called 'nonsense': the tasks are boolq, piqa, .*perplexity"),
    (["--limit", "1"], "--limit must be at least 2 tokens, got 1"),
    (["--limit", "0", "--tasks", "piqa"], "argument --limit: must be a whole number, at least 1, got 0"),
    (["--tasks", "piqa,"], "no task is called ''"),
    (["--dtype", "int8"], "unrecognized arguments: --dtype int8"),
    (["--bits", "5"], "bits"),
    (["--adapter", "/nowhere"], "/nowhere"),
    (["--data", "/nowhere.txt"], "there is no such file or folder"),
    (["--model", "/nowhere"], "no such folder or file")])
def test_bad_input(args, message, model_folder, tmp_path):
    folder, _ = model_folder
    with pytest.raises(InputError, match=message):
        evaluation.main(["--model", str(folder / "ours"), "--out-dir", str(tmp_path), *args])

def test_bad_rows_are_told_before_anything_is_written(model_folder, task_data, tmp_path, run):
    shutil.copytree(task_data, tmp_path / "data")
    (tmp_path / "data" / "piqa" / "valid.jsonl").write_text("{}\n")
    done = run("eval.py", "--model", model_folder[0] / "ours", "--tasks", "boolq,piqa", "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "out")
    assert done.returncode == 2 and "valid.jsonl, line 1: it needs 'goal', a str" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
