"""What every test shares: the repository on the path, one thread a process, private caches, and a way to run a command."""
import os
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


@pytest.fixture
def run():
    """run("train.py", "--rank", 8, processes=2, env={...}) -> CompletedProcess with stdout, stderr and returncode."""
    def call(*args, processes=1, env=None, timeout=300):
        launcher = [sys.executable] if processes == 1 else \
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.run(launcher + [str(a) for a in args], cwd=ROOT, env=dict(os.environ, **(env or {})), timeout=timeout,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return call


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some 300 kB of real text that every Python has."""
    from pydoc_data.topics import topics
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics[k] for k in sorted(topics))[:300_000], encoding="utf-8")
    return path
