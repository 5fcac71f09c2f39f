"""The benchmarks as commands: each has a file, helps, refuses what it doesn't know; the README's tables are those of results/."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    return subprocess.run([sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_every_benchmark_has_a_file_and_every_file_is_a_benchmark():
    files = {p.stem for p in (ROOT / "benches").glob("*.py")} - {"common", "__init__"}
    assert files == set(bench.BENCHES)


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
    done = run("plan", "--model", "gpt2-xl", "--gpus", "8", "--sequences", "8", "--seq-len", "1024", "--json", str(file))
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["command"] == "python bench.py plan --model gpt2-xl --gpus 8 --sequences 8 --seq-len 1024 --json rows.json"
    assert record["rows"] and {"device", "torch", "commit", "date"} <= record.keys()


def test_the_tables_of_the_readme_are_those_of_results():
    readme = (ROOT / "README.md").read_text()
    assert "<!-- results/train_cpu.json -->" in readme
    assert bench.tables(readme) == readme, "python bench.py readme"


def test_a_changed_figure_changes_the_table(tmp_path, monkeypatch):
    record = json.loads((ROOT / "results/pipeline.json").read_text())
    record["rows"][0]["utilization"] = 0.123
    (tmp_path / "results").mkdir()
    (tmp_path / "results/pipeline.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    text = bench.tables("before\n<!-- results/pipeline.json -->\nold\n<!-- end -->\nafter\n")
    assert "0.123" in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")
