"""The shape of the house: a ratchet, which may only be tightened."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AT_ROOT = {"model", "lowrank", "quant", "kernels", "recompute", "pipeline", "train", "finetune", "decompose", "eval", "sample",
           "serve", "checkpoint", "bench"}
FOLDERS = ("", "common", "tasks", "beyond", "benches", "examples")
SOURCE = [f for folder in FOLDERS for f in sorted((ROOT / folder).glob("*")) if f.suffix in (".py", ".cu", ".cpp")]
LINES = 11_500
SCRIPTS = {"train", "finetune", "decompose", "eval", "sample", "serve", "bench"}

def name_of(file):
    return str(file.relative_to(ROOT))

def imports(tree, inside_functions):
    """Names of the modules that a file imports: at its top, or anywhere."""
    nodes = ast.walk(tree) if inside_functions else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}

def test_the_root_shows_the_paper_and_nothing_else():
    assert {f.stem for f in SOURCE if f.parent == ROOT} == AT_ROOT

@pytest.mark.parametrize("file", SOURCE, ids=name_of)
def test_files_are_short_and_narrow(file):
    lines = file.read_text().split("\n")
    assert len(lines) - 1 <= (900 if file.name == "kernels.cu" else 420)
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []

def test_the_whole_is_small():
    total = sum(f.read_text().count("\n") for f in SOURCE)
    assert total <= LINES, f"{total} lines: what is added must be paid for by what is taken away"
    assert (ROOT / "README.md").read_text().count("\n") <= 200

@pytest.mark.parametrize("script, most", [("train", 25), ("finetune", 20)])
def test_few_flags_and_a_loop_that_comes_soon(script, most):
    text = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    flags = set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z0-9-]*)", text, re.M)) - {"--help"}
    assert 0 < len(flags) <= most
    loops = [n.lineno for n in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())) if isinstance(n, ast.While)]
    assert min(loops) < 220

@pytest.mark.parametrize("file", [f for f in SOURCE if f.suffix == ".py"], ids=name_of)
def test_who_imports_whom(file):
    tree = ast.parse(file.read_text())
    top, folder = imports(tree, False), file.parent.name if file.parent != ROOT else ""
    assert ast.get_docstring(tree), "no opening"
    if folder in ("", "common", "tasks"):
        assert "beyond" not in top, "beyond/ is imported where it is chosen, inside a function"
        assert not top & {"benches", "tests", "examples"}
    if file.stem not in SCRIPTS | {"checkpoint"} and folder in ("", "common", "tasks", "beyond"):
        assert not top & SCRIPTS, "a mechanism does not know the scripts"
    if file.stem == "model":
        assert not top & (AT_ROOT | {"tasks"})

def test_imports_are_a_tree():
    """No cycle among what is imported at the top of files."""
    graph = {}
    for file in SOURCE:
        if file.suffix != ".py":
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        names = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        graph[module] = names
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a cycle: {path + [module]}"
        if module not in done:
            path.append(module)
            for other in sorted(graph[module] & graph.keys()):
                visit(other)
            done.add(path.pop())
    for module in graph:
        visit(module)

@pytest.mark.parametrize("gone", ["beyond", "recompute.py", "pipeline.py", "quant.py", "kernels.cu"])
def test_training_works_without(gone, tmp_path, text_file):
    ignored = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "data", "results", "tests")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    target = Path(copy) / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    done = subprocess.run([sys.executable, "train.py", "--model", "tiny", "--rank", "16", "--max-iters", "2", "--data", text_file,
                           "--out-dir", tmp_path / "out"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
