"""The benchmarks as commands: each has a file, helps, refuses what it doesn't know; the README's tables are those of results/."""
import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import bench
from benches import chance, common, decode, http, paper, quality
from checkpoint import save_model
from common.cli import InputError
from common.tokenizer import train_tokenizer
from model import Config, Transformer

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    return subprocess.run([sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_every_benchmark_says_in_its_first_line_what_it_is_and_every_flag_is_used():
    assert {"train", "memory", "recompute", "decompose", "decode", "kernels", "finetune"} < set(bench.BENCHES)
    used = set()
    for name, line in bench.BENCHES.items():
        used |= importlib.import_module(f"benches.{name}").DEFAULTS.keys()
        assert len(line) > 40 and line.endswith("."), name
    assert used == set(common.FLAGS)


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
    with pytest.raises(InputError, match="missing.json.*--json"):
        bench.tables("<!-- missing.json -->\n<!-- end -->", tmp_path)
    assert "0.123" in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")


@pytest.mark.parametrize("best", [0.25, 0.5, 1, 2, 4])
def test_the_search_for_a_rate_ends_beyond_the_best_one(best, monkeypatch):
    monkeypatch.setattr(quality, "train", lambda name, rate, seed, args: dict(lr=rate, val_loss=abs(math.log2(rate / best))))
    rows = quality.climb("plain", Namespace(rate=1.0, seeds=[1], steps=10))
    rates = [r["lr"] for r in rows]
    assert best in rates and len(set(rates)) == len(rates) >= 3
    assert min(rates) < best < max(rates), "neither end is the best: the search did not stop too early"


def test_lines_of_quality_are_means_over_the_seeds_at_the_best_rate():
    def row(variant, lr, seed, loss, steps=10, equal=False):
        return dict(variant=variant, rank=0, lr=lr, seed=seed, val_loss=loss, steps=steps, equal_seconds=equal, share=1.0, tokens=100 * steps,
                    tokens_per_second=50.0, seconds=2.0 * steps)
    rows = [row("full rank, AdamW", 1e-3, 1, 5.0), row("full rank, AdamW", 2e-3, 1, 4.8), row("full rank, AdamW", 2e-3, 2, 4.6),
            row("full rank, Muon", 2e-3, 1, 4.0), row("full rank, Muon", 2e-3, 1, 4.5, steps=5, equal=True), row("plain", 1e-3, 1, 4.9)]
    lines = {r["variant"]: r for r in quality.summary(rows)}
    adamw = lines["full rank, AdamW"]
    assert (adamw["lr"], adamw["runs"]) == (2e-3, 2) and [adamw[k] for k in ("mean", "low", "high")] == pytest.approx([4.7, 4.6, 4.8])
    assert lines["full rank, Muon"]["mean"] == 4.0, "a run of another length is left out"
    table = quality.report(rows).splitlines()
    assert len(table) == 2 + 3 and "+0.200" in table[-1] and "+0.900" in table[-1], "plain over full rank with AdamW and with Muon"


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


SCRIPT = """
import argparse, json, pathlib, sys
SETTINGS = dict(dropout=0.1, warmup=None)
def make_parser():
    p = argparse.ArgumentParser()
    p.add_argument("--eval-limit", type=int, default=500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out-dir")
    p.add_argument("--resume", action="store_true")
    return p
def main():
    args = make_parser().parse_args()
    out = pathlib.Path(args.out_dir)
    (out / "state").mkdir(parents=True, exist_ok=True)
    arguments = dict(SETTINGS, warmup=15, **vars(args))
    if args.resume:
        arguments = json.loads((out / "state/state.json").read_text())["args"]
    (out / "state/state.json").write_text(json.dumps(dict(args=arguments)))
    stopped = None if args.resume else "SIGINT"
    summary = dict(stopped_by=stopped, arguments=arguments, argv=sys.argv[1:])
    (out / "summary.json").write_text(json.dumps(summary))
    sys.exit("error: no" if args.seed == 13 else 0)
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def once(tmp_path, monkeypatch):
    """run_once of a small script that takes the part of finetune.py."""
    (tmp_path / "finetune.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "finetune", raising=False)
    yield lambda *args, **more: common.run_once("finetune.py", *args, **more)
    sys.modules.pop("finetune", None)


def test_a_run_that_was_stopped_is_gone_on_with_and_a_finished_one_is_not_repeated(once, tmp_path):
    assert once("out", "--eval-limit", 100)["stopped_by"] == "SIGINT"
    assert once("out", "--eval-limit", 100)["argv"] == ["--resume", "--out-dir", "out"]
    before = (tmp_path / "out" / "summary.json").stat().st_mtime_ns
    assert once("out", "--eval-limit", 100)["stopped_by"] is None
    assert (tmp_path / "out" / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="finetune.py ended with 1: error: no"):
        once("other", "--seed", 13, quiet=True)


@pytest.mark.parametrize("flags, settings, words", [
    (["--eval-limit", 200], {}, "eval_limit 100, and 200"), ([], {}, "eval_limit 100, and 500"),
    (["--eval-limit", 100, "--seed", 2], {}, "seed 1, and 2"),
    (["--eval-limit", 100], dict(dropout=0.0), "dropout 0.1, and 0.0")])
@pytest.mark.parametrize("runs", [1, 2], ids=["stopped", "finished"])
def test_a_run_with_another_argument_is_not_reused(runs, flags, settings, words, once, tmp_path):
    for _ in range(runs):
        once("out", "--eval-limit", 100)
    before = (tmp_path / "out" / "summary.json").read_text()
    with pytest.raises(InputError, match=f"out holds a run with {words}.*--out-dir"):
        once("out", *flags, settings=settings)
    assert (tmp_path / "out" / "summary.json").read_text() == before


def test_the_arguments_of_each_script_are_all_that_its_summary_says():
    for script, flags in (("train.py", ["--lr", 2e-4]), ("finetune.py", ["--rank", 4]),
                          ("eval.py", ["--limit", 16384]),
                          ("decompose.py", ["--model", "tiny", "--ratio", 0.8])):
        found = common.arguments_of(script, flags, dict(dropout=0.3) if script == "train.py" else {})
        assert found[flags[-2][2:].replace("-", "_")] == flags[-1] and found["out_dir"]
    assert common.arguments_of("train.py", [], dict(dropout=0.3))["dropout"] == 0.3


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
        summary = common.run_once(script, folder, *flags, quiet=True)
        before = (folder / "summary.json").stat().st_mtime_ns
        assert common.run_once(script, folder, *flags, quiet=True) == summary
        assert (folder / "summary.json").stat().st_mtime_ns == before, f"{script} ran again"
        with pytest.raises(InputError, match=f"{folder.name} holds a run with "):
            common.run_once(script, folder, *flags[:-1], flags[-1] / 2 if script == "decompose.py" else 300)


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
    wanted = ["--lengths", "8,20", "--new-tokens", "6", "--rounds", "1", "--bits", "8"]
    bench.main(["http", "--gguf", small, "--clients", "1,3", *wanted, "--json", f"{small}/rows.json"])
    rows = json.loads(Path(f"{small}/rows.json").read_text())["rows"]
    assert [(r["clients"], r["requests"], r["bits"]) for r in rows] == [(1, 2, 8), (3, 6, 8)]
    assert all(0 < r["first_p50"] <= r["first_p95"] and r["tokens_per_second"] > 0 for r in rows)
    assert "first token s, median" in capsys.readouterr().out
    with pytest.raises(InputError, match="--lengths must be the shortest and the longest prompt"):
        bench.main(["http", "--gguf", small, "--lengths", "8"])


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
