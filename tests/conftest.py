"""What every test shares: the repository on the path, one thread a process (there is a process for each core), private caches, and a way to run a command."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory):
    """Tests neither find nor leave anything in the user's caches, and never wait for a network."""
    os.environ["FINGPT_CACHE"] = os.environ.get("FINGPT_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    os.environ["TIKTOKEN_CACHE_DIR"] = str(tmp_path_factory.mktemp("no-tiktoken"))

@pytest.fixture(scope="session")
def compiler():
    """Skips where there is no g++ that knows OpenMP and _Float16, as Apple's and those before 12 do not. What such a g++
    can't build is a mistake of kernels_cpu.cpp, and fails."""
    source, flags = "#include <omp.h>\n_Float16 half;", ["-fopenmp", "-x", "c++", "-fsyntax-only", "-"]
    if not shutil.which("g++") or subprocess.run(["g++", *flags], input=source.encode(), capture_output=True).returncode:
        pytest.skip("no g++ of version 12 or later, with OpenMP, to compile kernels_cpu.cpp with")

@pytest.fixture
def run():
    """run("train.py", "--rank", 8, processes=2, settings={"dropout": 0.1}) -> CompletedProcess with stdout, stderr, returncode.

    settings: what has no flag, given to the script's main(argv, **settings).
    """
    def call(script, *args, processes=1, env=None, timeout=300, settings=None):
        python = [sys.executable]
        if processes > 1:
            python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        head = [script]
        if settings:
            code = f"import sys, {script[:-3]} as m; from common.cli import command; command(lambda: m.main(sys.argv[1:], **{settings!r}))"
            head = ["-c", code] if processes == 1 else ["--no-python", sys.executable, "-c", code]
        return subprocess.run([*python, *head, *map(str, args)], cwd=ROOT, env=dict(os.environ, **(env or {})), timeout=timeout,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return call

@pytest.fixture(scope="session")
def mutate():
    """mutate(draw, value) -> a copy of a JSON value with one thing in it changed, moved, doubled or gone."""
    odd = [None, True, -1, 0, 3, 10 ** 12, 0.5, "", "a", "\u2581", "<unk>", [], {}, [["a", "b"]], {"type": "x"}, float("nan")]

    def change(draw, value):
        value = parent = copy.deepcopy(value)
        while True:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw.choice(keys)
            if isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.9:
                parent = parent[key]
                continue
            what = draw.randrange(4)
            if what == 0:
                del parent[key]
            elif what == 1 and isinstance(parent, list):
                parent.insert(key, parent[draw.choice(keys)])
            else:
                parent[key] = parent[draw.choice(keys)] if what == 2 else draw.choice(odd)
            return value
    return change

@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some 300 kB of real text that every Python has."""
    from pydoc_data.topics import topics
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics[k] for k in sorted(topics))[:300_000], encoding="utf-8")
    return path

@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    """The paper's seven sets in their own formats, a few dozen made-up rows each."""
    folder = tmp_path_factory.mktemp("sets")

    def put(name, text, encoding="utf-8"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode(encoding))
    things = ["cup", "green lamp", "door", "very old book", "pan", "window", "chair"]
    rows = range(36)

    def thing(i):
        return things[i % 7]
    put("boolq/dev.jsonl", "".join(json.dumps(dict(question=f"is the {thing(i)} number {i}", answer=i % 3 > 0, passage=f"This {thing(i)} -- " * (1 + i % 5)))
                                   + "\n" for i in rows))
    put("piqa/valid.jsonl", "".join(json.dumps(dict(id=str(i), goal=f"How do I clean a {thing(i)}?", sol1=f"Use the {thing(i + 1)} slowly.",
                                                    sol2=f"Use the {thing(i + 2)}, {'slowly ' * (i % 3)}at night.")) + "\n" for i in rows))
    put("piqa/valid-labels.lst", "".join(f"{i % 2}\n" for i in rows))
    put("winogrande/dev.jsonl", "".join(json.dumps(dict(sentence=f"The {thing(i)} hid the {thing(i + 3)} because the _ was big.", option1=thing(i),
                                                        option2=thing(i + 3), answer=str(1 + i % 2))) + "\n" for i in rows))
    label = ["positive", "neutral", "negative", "neutral"]
    put("fpb/FinancialPhraseBank-v1.0/Sentences_50Agree.txt",
        "".join(f"Profit of Mäkinen Oyj @ {thing(i)} was {i} mn .@{label[i % 4]}\r\n" for i in rows), "latin-1")
    scores = ["-0.374", "-0.1", "0.099", "0.1", "0.8", "-0.101"]
    for kind, start in (("headline", 0), ("post", 1)):
        put(f"fiqa/task1_{kind}_ABSA_train.json", json.dumps({str(i): dict(sentence=f"{kind} {i}: {thing(i)} up", info=[
            dict(sentiment_score=scores[(i + start + n) % 6], target="X") for n in range(1 + i % 2)]) for i in rows}))
    put("tfns/sent_train.csv", "text,label\r\n" + "".join(f'"$X{i}, the ""{thing(i)}""\nfalls",{i % 3}\r\n' for i in rows))
    put("ner/FIN5.txt", "-DOCSTART- -X- O O\n\n" + "".join(
        f"Ms NNP - O\nAnna NNP - I-PER\nKoch{i} NNP - I-PER\nof IN - O\nAcme NNP - I-ORG\nParis NNP - {'I-LOC' if i % 2 else 'I-MISC'}\n. . - O\n\n"
        "No DT - O\nname NN - O\n\n" for i in rows))
    return folder
