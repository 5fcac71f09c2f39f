"""The benchmarks as commands: each has a file, helps, refuses what it doesn't know; the README's tables are those of results/."""
import importlib
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import bench
from benches import chance, common, compress, decode, gain, http, paper, scaling, scores
from checkpoint import save_model
from common.cli import InputError
from common.device import find_device
from common.tokenizer import train_tokenizer
from model import Config, Transformer
from tasks import score, sets
from tasks.rows import made_up_headlines

ROOT = Path(__file__).resolve().parent.parent

def run(*args):
    return subprocess.run([sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True)

def test_every_benchmark_says_in_its_first_line_what_it_is_and_every_flag_is_used():
    assert {"train", "memory", "recompute", "decompose", "decode", "kernels", "finetune"} < set(bench.BENCHES)
    used = set()
    for name, line in bench.BENCHES.items():
        used |= importlib.import_module(f"benches.{name}").DEFAULTS.keys()
        assert len(line) > 40 and line.endswith("."), name
    assert set(common.HELP) <= used

@pytest.mark.parametrize("name", bench.BENCHES)
def test_help_of(name, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main([name, "--help"])
    assert end.value.code == 0
    assert f"bench.py {name}" in capsys.readouterr().out

def test_an_unknown_benchmark_is_refused():
    done = run("nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr and "'train'" in done.stderr and "Traceback" not in done.stderr

def test_rows_are_written_with_where_they_come_from(tmp_path):
    file = tmp_path / "rows.json"
    done = run("chance", "--json", str(file))
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["command"] == "python bench.py chance --json rows.json"
    assert record["rows"] and {"device", "torch", "commit", "date"} <= record.keys()

def test_the_tables_of_the_readme_are_those_of_results():
    readme = (ROOT / "results" / "README.md").read_text()
    assert "<!-- train_cpu.json -->" in readme
    assert bench.tables(readme) == readme, "python bench.py tables"

def test_a_changed_figure_changes_the_table(tmp_path):
    record = json.loads((ROOT / "results/pipeline.json").read_text())
    record["rows"][0]["utilization"] = 0.123
    (tmp_path / "pipeline.json").write_text(json.dumps(record))
    text = bench.tables("before\n<!-- pipeline.json -->\nold\n<!-- end -->\nafter\n", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.json"):
        bench.tables("<!-- missing.json -->\n<!-- end -->", tmp_path)
    assert "0.123" in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")

@pytest.mark.parametrize("best", [1e-3, 8e-3, 16e-3, 32e-3, 0.25])
def test_the_search_for_a_rate_ends_beyond_the_best_one(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log2(rate / best))
    found = scaling.best_rate(loss, 16e-3)
    assert abs(math.log2(found / best)) <= 0.5 and min(tried) < found < max(tried)
    assert scaling.best_rate(loss, 16e-3, up=False) == min(found, 16e-3)

@pytest.mark.parametrize("late, ratios", [(None, [1, 4, 20]), (20, [1, 4]), (scaling.SEARCH, [])])
def test_a_variant_has_the_lengths_that_are_in_time(late, ratios, monkeypatch):
    def train(args, size, name, ratio, rate, seed):
        if ratio == late:
            raise TimeoutError
        return dict(size=size, ratio=ratio, lr=rate, choose=abs(math.log2(rate / (8e-3 if size == "64x4" else 1))))
    monkeypatch.setattr(scaling, "train", train)
    for size in ("64x4", "96x6"):  # the rates are those of the first
        rows = scaling.finish(SimpleNamespace(seeds=[1], sizes=["64x4", "96x6"]), size, 1, "full rank")
        assert [(r["size"], r["ratio"], r["lr"]) for r in rows] == [(size, ratio, 8e-3) for ratio in ratios]

def test_narrow_models_have_as_many_parameters_or_operations():
    for name, count in (("narrow, parameters of n/4", scaling.count_parameters), ("narrow, operations of n/4", scaling.operations)):
        narrow, low = count(scaling.shapes(*scaling.variant("64x4", name))), count(scaling.shapes((4, 4, 64), 16))
        assert abs(narrow / low - 1) < 0.08
    assert scaling.variant("128x6", "r = 3n/8") == ((6, 8, 128), 48)

@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_model_that_counts_is_the_textbooks(order, monkeypatch):
    monkeypatch.setattr(scaling, "VOCABULARY", 5)
    random = np.random.default_rng(0)
    train, text = random.integers(0, 5, 400), random.integers(0, 5, 50)

    def p(context, word):
        if len(context) == 0:
            lower, grams = 1 / 5, [(w,) for w in train]
        else:
            lower, n = p(context[1:], word), len(context) + 1
            grams = [tuple(train[i:i + n]) for i in range(len(train) - n + 1)]
        after = [g[-1] for g in grams if g[:-1] == context]
        if not after:
            return lower
        return (max(after.count(word) - 0.75, 0) + 0.75 * len(set(after)) * lower) / len(after)
    exact = [math.log(p(tuple(text[i - order + 1:i]), text[i])) for i in range(order - 1, len(text))]
    assert scaling.counting_model(train.tolist(), [text.tolist()], order) == pytest.approx(-np.mean(exact), rel=1e-12)

def scaling_row(variant, loss, seed=1, ratio=20, parameters=100, rank=0):
    parts = [loss + 0.01 * (i % 2) for i in range(scaling.PARTS)]
    return dict(size="64x4", variant=variant, ratio=ratio, lr=0.01, seed=seed, rank=rank, shape=[4, 4, 64], parameters=parameters,
                operations=7 * parameters, tokens=1000, seconds=1.0, choose=loss, loss=sum(parts) / len(parts), parts=parts)

def test_the_table_of_scaling_compares_with_full_rank_and_with_dense_models(tmp_path):
    rows = [scaling_row("full rank", 3.0), scaling_row("full rank", 3.2, seed=2), scaling_row("r = n/4", 3.5, rank=16, parameters=40),
            scaling_row("r = n/4", 3.6, seed=2, rank=16, parameters=40), scaling_row("r = n/2", 3.25, rank=32, parameters=70),
            scaling_row("narrow, parameters of n/4", 3.6, parameters=25), dict(size=None, variant="bigrams, counted", tokens=1000, loss=4.1)]
    lines = {line["variant"]: line for line in scaling.compared(rows)}
    assert lines["r = n/4"]["gap"] == pytest.approx(0.45) and lines["r = n/4"]["seeds"] == 2
    assert lines["r = n/4"]["half"] == pytest.approx(12.71 * np.std([0.5, 0.4], ddof=1) / 2 ** 0.5, rel=1e-3)
    # full rank 3.1 with 100 parameters, narrow 3.6 with 25: 3.55 is nine tenths of the way down, in log N
    assert scaling.dense_like(lines["r = n/4"], lines.values()) == pytest.approx(0.25 ** 0.9, rel=1e-2)
    assert scaling.dense_like(lines["r = n/4"] | dict(loss=9.0), lines.values()) is None
    shares = [math.log(share) for share in (0.25, 0.5)]
    likes = [math.log(scaling.dense_like(lines[name], lines.values())) for name in ("r = n/4", "r = n/2")]
    gamma = sum(x * y for x, y in zip(shares, likes)) / sum(x * x for x in shares)
    text = scaling.report([*rows[:-1], scaling_row("r = n/8", 3.5, ratio=21, rank=8), rows[-1]])
    assert "3.555 (+0.450" in text and f"N_eff = N (r/n)^{gamma:.2f} at" in text and "bigrams, counted: 4.100 (all 1,000 tokens" in text
    scaling.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

def test_probabilities_by_chance_are_those_of_drawn_samples():
    draws = torch.distributions.Binomial(1000, torch.tensor(0.62)).sample((200_000, 2)) / 10  # percent
    for difference in (0.5, 2.0, 4.0):
        drawn = (draws[:, 0] - draws[:, 1]).abs()
        share = sum((drawn > bound).double().mean().item() for bound in (difference - 0.05, difference + 0.05)) / 2  # rows are whole: half of the equal ones
        assert abs(chance.by_chance(62, 62 + difference, 1000) - share) < 0.01
    assert chance.by_chance(50, 50, 100) == 1

def test_holms_correction_is_that_of_statistics_books():
    assert chance.holm([0.01, 0.04, 0.03, 0.005]) == 2  # 0.005 <= 0.05/4, 0.01 <= 0.05/3, 0.03 > 0.05/2
    assert chance.holm([0.2]) == 0 and chance.holm([0.05, 0.001]) == 2

def test_the_papers_tables_have_its_figures_in_brackets_and_a_star_where_nothing_ran():
    rows = [dict(table="V", what="int8", quantity="TFLOPS", value=1.5, paper=624, how="measured"),
            dict(table="VI", what="gpt2 r48", quantity="training speed", value=3.9, paper=[1.192, 1.197], how="counted"),
            dict(table="VI", what="gpt2 r48", quantity="MB", value=52.5, paper=None, how="exact"),
            dict(table="VI", what="gpt2 r96", quantity="MB", value=62, paper=58.5, how="exact")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in paper.report(rows).splitlines()]
    assert ["int8", "1.5 (624)"] in cells and ["gpt2 r48", "3.9* (1.192 / 1.197)", "52.5"] in cells and ["gpt2 r96", "", "62 (58.5)"] in cells

def test_baselines_of_finetuning_are_scored_as_scikit_learn_does(monkeypatch):
    examples = made_up_headlines(90, seed=1)
    parts = dict(train=examples[:60], test=examples[60:])
    monkeypatch.setattr(sets, "load", lambda task, data_dir, part: parts[part])
    torch.manual_seed(0)
    tokenizer = train_tokenizer([e.prompt + e.answer for e in examples], 400)
    model = Transformer(Config("llama", vocab_size=tokenizer.vocab_size, context=256, blocks=1, heads=2, kv_heads=1, width=16, ffn=24)).eval()
    found = {r["method"]: r for r in gain.baselines("fpb", model, tokenizer, find_device("float32"))}
    labels = [e.label for e in parts["test"]]
    for r in found.values():
        given = [int(p) for p in r["predictions"]]
        assert r["labels"] == "".join(map(str, labels)) and r["f1"] == pytest.approx(f1_score(labels, given, average="weighted"))
        assert r["macro_f1"] == pytest.approx(f1_score(labels, given, average="macro"))
    assert found["TF-IDF, linear SVM"]["f1"] > 0.95, "templates give their words away"
    assert found["untuned"]["f1"] < 0.6 < found["linear probe"]["f1"] and len(set(found["always the commonest label"]["predictions"])) == 1
    e, each = examples[60], []  # the likeliest label, one prompt at a time
    for choice in e.choices:
        given, ending = score.encode_pair(tokenizer, e.prompt, choice)
        logp = model(torch.tensor([given + ending]))[0].log_softmax(-1)
        each.append(sum(logp[len(given) - 1 + i, t].item() for i, t in enumerate(ending)))
    assert int(found["untuned"]["predictions"][0]) == int(np.argmax(each))

def test_the_table_of_gain_compares_with_full_finetuning():
    examples = made_up_headlines(200, seed=1)
    right = [e.label for e in examples]
    wrong = [(label + (i % 4 == 0)) % 3 for i, label in enumerate(right)]
    common = dict(rank=0, bits=16, random=False, seed=1, learned=10_000_000, seconds=1.0)
    rows = [gain.row("fpb", "TF-IDF, linear SVM", examples, wrong), gain.row("fpb", "full", examples, right, **common),
            gain.row("fpb", "lora", examples, right, **common | dict(rank=8, bits=8)),
            gain.row("fpb", "lora", examples, wrong, **common | dict(rank=8, bits=8, seed=2))]
    table = gain.report(rows)
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    cells = [dict(zip([c.strip() for c in lines[0]], [c.strip() for c in line])) for line in lines[1:]]
    lora = [c for c in cells if c["learns"] == "lora"]
    assert [c["as full?"] for c in lora] == ["p = 1.000", ""] and lora[0]["learned"] == "10.00M" and lora[0]["r"] == "8"
    assert cells[0]["as full?"] == "p < 0.001" and cells[1]["as full?"] == "" and cells[1]["weighted F1"] == "1.000"
    assert cells[0]["95%"].startswith("0.6") and "fpb, 200 test rows" in table

def test_adapters_learn_from_the_sets_that_their_names_say(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    for task in (*scores.SENTIMENT, "alpaca"):
        (data / task).mkdir(parents=True)
    alpaca = [dict(instruction=f"question {i}", output=f"answer {i}") for i in range(9)]
    (data / "alpaca" / "alpaca_data.json").write_text(json.dumps(alpaca))
    monkeypatch.setattr(scores, "DATA_DIR", data)
    monkeypatch.setattr(sets, "load", lambda task, data_dir, part: made_up_headlines(2, seed=1) if part == "train" else None)
    for _ in range(2):  # a second time in the same folder
        flags = scores.adapters(out)
    assert len(flags) == 9 and flags["ner"] == ["--task", "ner"]
    for name, there in (("all three", "fiqa fpb tfns"), ("all but fpb", "fiqa tfns"), ("all but tfns", "fiqa fpb")):
        assert " ".join(sorted(path.name for path in flags[name][-1].iterdir())) == there
    rows = json.loads(flags["all three, Alpaca"][-1].read_text())
    assert len(rows) == 12 and sum(row["completion"].startswith("answer") for row in rows) == 6

def test_the_table_of_scores_marks_what_was_learned():
    def row(bits, adapter, task, unseen=None):
        return dict(model="m", bits=bits, adapter=adapter, task=task, value=0.5, unseen=unseen, interval=[0.4, 0.62], rows=1200, majority=0.45, seconds=1.0)
    names = ["", "fpb", "all three", "all but fpb"]
    text = scores.report([row(8, name, task, 0.25 if task == "fpb" else None) for name in names for task in ("fpb", "ner")])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[2:] == [["rows", "1,200", "1,200"], ["commonest answer", "0.450", "0.450"], ["8 bit", "0.500 (0.250) ± 0.110", "0.500 ± 0.110"],
                         ["fpb", "**0.500 (0.250) ± 0.110**", "0.500 ± 0.110"], ["all three", "**0.500 (0.250) ± 0.110**", "0.500 ± 0.110"],
                         ["all but fpb", "0.500 (0.250) ± 0.110", "0.500 ± 0.110"]]

def peer_and_inputs():
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=300, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)).eval()
    for p in model.requires_grad_(False).parameters():
        p.mul_(3)  # so that the blocks count
    return model, list(torch.randint(300, (4, 64)).split(1))

@pytest.mark.parametrize("method", [compress.svd_llm, compress.modegpt])
def test_a_peer_loses_nothing_where_it_keeps_all_and_more_the_less_it_keeps(method):
    lost = []
    for ratio in (1.0, 0.75, 0.5):
        model, windows = peer_and_inputs()
        before = model(torch.cat(windows))
        with torch.no_grad():
            method(model, windows, 2 * ratio if method is compress.svd_llm and ratio == 1 else ratio)
        lost.append(((model(torch.cat(windows)) - before).norm() / before.norm()).item())
    assert lost[0] < 2e-6 and 0.1 < lost[1] < lost[2]

def test_a_peers_factor_is_that_of_least_squares():
    torch.manual_seed(0)
    W, A, X = torch.randn(7, 12), torch.randn(4, 12).double(), torch.randn(12, 50).double()
    exact = torch.linalg.lstsq((A @ X).T, (W.double() @ X).T).solution.T
    assert torch.allclose(compress.fitted(W, A, X @ X.T), exact)

def test_modegpt_keeps_the_hidden_units_and_heads_that_its_paper_says():
    model, windows = peer_and_inputs()
    with torch.no_grad():
        compress.modegpt(model, windows, 0.5)
    for block in model.blocks:
        attention, d = block.attention, 8
        for layer, heads in ((attention.q, 4), (attention.k, 2)):
            kept = layer.weight.abs().sum(1).view(heads, 2, d // 2) > 0  # both halves of a rotated pair
            assert (kept[:, 0] == kept[:, 1]).all() and (kept[:, 0].sum(1) == 2).all()
        kept = [layer.weight.abs().sum(1).view(heads, -1) > 0 for layer, heads in ((attention.q, 4), (attention.k, 2))]
        assert (kept[0].view(2, 2, d) == kept[1][:, None]).all(), "the query heads of a key keep the same"
        assert (attention.v.weight.abs().sum(1).view(2, d) > 0).sum(1).tolist() == [4, 4]
        assert (block.mlp.down.weight.abs().sum(0) > 0).sum() == 24

def test_a_model_is_made_smaller_recovered_and_rounded_in_all_ways(small, task_data, text_file, tmp_path, monkeypatch, capsys):
    def in_this_process(script, folder, *flags):
        main = importlib.import_module(script[:-3]).main
        assert not main([str(flag) for flag in (*flags, "--out-dir", folder)])
    monkeypatch.setattr(compress, "run_once", in_this_process)
    monkeypatch.setattr(compress, "DATA_DIR", task_data)
    monkeypatch.setattr(compress, "RATIOS", (0.6,))
    monkeypatch.setattr(compress, "TOKENS", 600)
    flags = ["compress", "--model", str(small), "--texts", str(text_file), "--calibration", str(text_file), "--recovery", str(text_file),
             "--steps", "2", "--limit", "4", "--out-dir", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]
    bench.main([*flags, "--hours", "1e-9"])
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [], "it is late from the start"
    bench.main(flags)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [(method, bits) for method, all_bits in compress.BITS.items() for bits in all_bits]
    assert all(math.isfinite(r["scores"]["topics.txt"]) for r in rows) and {r["ratio"] for r in rows} == {1.0, 0.6}
    assert [r["method"] for r in rows if set(compress.TASKS) < set(r["scores"])] == ["dense", "recovered"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0] for line in table[-7:]] == list(compress.BITS) and table[-6][1:3] == ["60%", "16 / 8 / 4"] and table[-6][3].count("/") == 2
    monkeypatch.setattr(compress, "run_once", None)  # all is done
    with pytest.raises(InputError, match="holds runs of .* is asked for: remove it"):
        bench.main([*flags, "--limit", "5"])
    bench.main(flags)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows

def test_what_compress_cannot_compare_is_refused(tmp_path):
    save_model(tmp_path / "gpt2", Transformer(Config("gpt2", vocab_size=50, context=16, blocks=1, heads=2, kv_heads=2, width=8, ffn=32)))
    save_model(tmp_path / "llama", Transformer(Config("llama", vocab_size=50, context=16, blocks=1, heads=2, kv_heads=2, width=8, ffn=32)))
    for name, message in (("gpt2", "must be of Llama's kind"), ("llama", "need different names")):
        with pytest.raises(InputError, match=message):
            bench.main(["compress", "--out-dir", str(tmp_path / "out"), "--model", str(tmp_path / name), "--texts", "a/x.txt,b/x.txt"])

@pytest.mark.parametrize("default, given, value", [
    (["a", "b"], "c,d", ["c", "d"]), ([8, 4], "16", [16]), ([], "0,192", [0, 192]), (3, "5", 5), (2.5, "0.5", 0.5),
    ("auto", "float32", "float32"), (None, "file", "file"), (False, None, True)])
def test_a_flag_is_of_its_defaults_type(default, given, value):
    module = SimpleNamespace(__doc__="A bench.", DEFAULTS=dict(some_flag=default))
    assert common.parse("x", module, []).some_flag == default
    assert common.parse("x", module, ["--some-flag", given] if given else ["--some-flag"]).some_flag == value
    if given and isinstance(value, (int, float)):
        with pytest.raises(InputError, match="--some-flag: must be .*, got 0"):
            common.parse("x", module, ["--some-flag", "0"])

def test_a_table_shows_keys_functions_and_units():
    rows = [dict(rank=0, cached=True, bytes=2e9), dict(rank=8, cached=None, bytes=5e8)]
    columns = {"rank": "rank", "cached": "cached", "GB": ("bytes", "{:.1f}", 1e9), "twice": lambda r: 2 * r["rank"]}
    lines = common.table(rows, columns).splitlines()
    assert [lines[0], *lines[2:]] == ["| rank | cached |  GB | twice |", "| full |    yes | 2.0 |     0 |",
                                      "|    8 |        | 0.5 |    16 |"]
    assert common.table([dict(a=1), dict(b="x")]).splitlines()[2:] == ["| 1 |   |", "|   | x |"]

SCRIPT = """
import json, pathlib, sys
def main(argv, dropout=0.1):
    out, resume = pathlib.Path(argv[argv.index("--out-dir") + 1]), "--resume" in argv
    (out / "state").mkdir(parents=True, exist_ok=True)
    if resume:
        (out / "summary.json").write_text(json.dumps(dict(argv=argv, dropout=dropout)))
    return 13 if "--fail" in argv else 0
"""

@pytest.fixture
def once(tmp_path, monkeypatch):
    """run_once of a small script that takes the part of finetune.py."""
    (tmp_path / "finetune.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return partial(common.run_once, "finetune.py")

def test_a_run_that_was_stopped_is_gone_on_with_and_a_finished_one_is_not_repeated(once, tmp_path):
    assert once("out/a", "--rank", 4, dropout=0.3) == {}
    assert once("out/a", "--rank", 4, dropout=0.3) == dict(argv=["--resume", "--out-dir", "out/a"], dropout=0.3)
    before = (tmp_path / "out/a/summary.json").stat().st_mtime_ns
    once("out/a", "--rank", 4, dropout=0.3)
    assert (tmp_path / "out/a/summary.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="finetune.py ended with 13"):
        once("other", "--fail")

@pytest.mark.parametrize("runs", [1, 2], ids=["stopped", "finished"])
def test_a_run_with_another_argument_is_not_reused(runs, once, tmp_path):
    for _ in range(runs):
        once("out", "--rank", 4)
    before = [file.read_text() for file in tmp_path.rglob("*.json")]
    for flags, settings in ((["--rank", 8], {}), ([], {}), (["--rank", 4], dict(dropout=0.0))):
        with pytest.raises(InputError, match="out holds a run of .*\"4\".* is asked for: .*--out-dir"):
            once("out", *flags, **settings)
    assert [file.read_text() for file in tmp_path.rglob("*.json")] == before
    (tmp_path / "out.flags.json").unlink()
    with pytest.raises(InputError, match="out holds a run of unknown flags"):
        once("out", "--rank", 4)
    shutil.rmtree(tmp_path / "out")
    assert once("out", "--rank", 8) == {}

@pytest.mark.slow
def test_the_scripts_themselves_are_run_once(tmp_path, text_file):
    tiny = ["--model", "tiny", "--batch-size", 2, "--seq-len", 32]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([dict(instruction="Say it.", input=f"{i}", output=f"= {i}") for i in range(40)]))
    jobs = [("train.py", tmp_path / "model", *tiny, "--data", text_file, "--max-iters", 2),
            ("decompose.py", tmp_path / "low", "--model", tmp_path / "model", "--ratio", 0.7),
            ("eval.py", tmp_path / "ppl", "--model", tmp_path / "low", "--data", text_file, "--limit", 600),
            ("finetune.py", tmp_path / "adapter", "--base", tmp_path / "model", "--task", rows,
             "--max-iters", 2, "--batch-size", 2)]
    for script, folder, *flags in jobs:
        summary = common.run_once(script, folder, *flags)
        before = (folder / "summary.json").stat().st_mtime_ns
        assert common.run_once(script, folder, *flags) == summary
        assert (folder / "summary.json").stat().st_mtime_ns == before, f"{script} ran again"

@pytest.fixture
def small(tmp_path, text_file):
    """A folder with a model of two blocks and its tokenizer."""
    config = Config("llama", vocab_size=500, context=256, blocks=2, heads=4, kv_heads=2, width=64, ffn=64,
                    tied=False)
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    save_model(tmp_path / "m", Transformer(config), tokenizer)
    return str(tmp_path / "m")

@pytest.mark.slow
def test_clients_over_http(small, monkeypatch, capsys):
    """Without llama.cpp; its rows are those that no file here is for."""
    monkeypatch.setattr(http, "installed", lambda package: False)
    wanted = ["--new-tokens", "6", "--rounds", "1", "--bits", "8"]
    bench.main(["http", "--gguf", small, "--clients", "1,3", *wanted, "--json", f"{small}/rows.json"])
    rows = json.loads(Path(f"{small}/rows.json").read_text())["rows"]
    assert [(r["clients"], r["requests"], r["bits"]) for r in rows] == [(1, 2, 8), (3, 6, 8)]
    assert all(0 < r["first_p50"] <= r["first_p95"] and r["tokens_per_second"] > 0 for r in rows)
    assert "first token s, median" in capsys.readouterr().out

def test_a_models_own_file_is_timed_and_its_head_is_read_once(small):
    answer = decode.writer(small, 1, "ours", 0, 16)
    sizes = answer((2, True))
    table_of_input = 500 * 64 * 2  # of which a token reads one row
    assert sizes["model_bytes"] - sizes["read_bytes"] == table_of_input and sizes["peak_memory_bytes"] > 0

def test_each_rows_share_of_the_bandwidth_of_reading():
    row = dict(model="m", rank=0, cache=True, new_tokens=9, prompt_seconds=0.5, with_prompt=5.0, model_bytes=1e9,
               peak_memory_bytes=2e9)
    rows = [row | dict(engine="llama.cpp", bits="its own", tokens_per_second=10.0, share_of_read=0.4),
            row | dict(engine="ours", bits=4, tokens_per_second=15.0, share_of_read=0.6)]
    lines = [[cell.strip() for cell in line.split("|")] for line in decode.report(rows).splitlines()]
    assert "over llama.cpp" in lines[0] and "1.5x" in lines[3] and "60%" in lines[3]
