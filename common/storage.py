"""Files that a kill, a full disk or a flipped bit does not ruin: tensors, and the state of a training run.

    OUT/state/             the state of a run: a model or an adapter, optimizer.safetensors, state.json
    OUT/state.previous/    the one before
    OUT/model.safetensors  ... the same files as in state/, by hard link: OUT is itself a model or an adapter

Everything is written beside, synced, then renamed: a process killed at any moment leaves a state that can be
read. Nothing is ever unpickled.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.cli import InputError, refuse, write_atomic
from common.tokenizer import blamed_on

SHARD_BYTES = 4 << 30  # of a file of a model, about

def add(digest, name, tensor):
    digest.update(name.encode())
    digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())

def write_tensors(path, tensors):
    """Write a safetensors file, in a new folder; its header holds the sha256 of names and contents."""
    digest = hashlib.sha256()
    tensors = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    for name, tensor in tensors.items():
        add(digest, name, tensor)
    try:
        save_file(tensors, path, metadata={"format": "pt", "sha256": digest.hexdigest()})
    except SafetensorError as e:  # which hides the number of a full disk in its text
        code = int(re.search(r"os error (\d+)|$", str(e))[1] or 0)
        raise OSError(code, os.strerror(code), str(path)) from e
    os.chmod(path, 0o644)  # safetensors makes its files readable for their owner alone
    with open(path, "rb+") as f:
        os.fsync(f.fileno())

@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""
    file: Path
    key: str
    shape: tuple
    bits: int   # of a number

    def read(self):
        with blamed_on(self.file), safe_open(self.file, "pt") as file:
            return file.get_tensor(self.key)

def read_headers(files):
    """name in the file -> Stored, of all tensors of safetensors files."""
    found = {}
    for path in files:
        with blamed_on(path), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file, no dict)
                part = file.get_slice(key)
                bits = dict(F64=64, F32=32, F16=16, BF16=16).get(part.get_dtype(), 8)
                found[key] = Stored(path, key, tuple(part.get_shape()), bits)
    return found

def read_tensors(path):
    """Yield (name, tensor) of a file in the order of names; at the end its checksum, if any, must agree.

    The file is mapped anew for each tensor: pages of one long mapping would pile up to the file's size."""
    digest = hashlib.sha256()
    with blamed_on(path), safe_open(path, "pt") as file:
        wanted = (file.metadata() or {}).get("sha256")
    for name, stored in sorted(read_headers([path]).items()):
        tensor = stored.read()
        add(digest, name, tensor)
        yield name, tensor
        del tensor  # before the next one comes
    refuse(wanted not in (None, digest.hexdigest()), f"{path} was altered after it was written: get it again")

def write_shards(folder, sizes, tensor_of):
    """Write the tensors tensor_of(name). sizes: name -> bytes, in order. Returns name -> its file's name."""
    shards, before, files = {}, 0, {}
    for name, size in sizes.items():
        shards.setdefault(before // SHARD_BYTES, []).append(name)
        before += size
    for i, names in enumerate(shards.values(), 1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_tensors(folder / f"model{number}.safetensors", {name: tensor_of(name) for name in names})
        files |= dict.fromkeys(names, f"model{number}.safetensors")
    return files

def sync_folder(path):
    """Make renames inside a folder last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

@contextlib.contextmanager
def replaced(folder, keep=False):
    """A new folder, to be filled; then it takes the place of `folder`. keep: that one as FOLDER.previous."""
    folder = Path(folder)
    new, previous = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "previous"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except OSError:  # a full disk: leave what is there and give the space back
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(new)
    if keep and folder.exists():  # from here on there is always a whole one under one of the two names
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    sync_folder(folder.parent)

# ----------------------------------------------------------------------------------- the state of a run

def replace_state(out_dir, write, optimizer_tensors, state):
    """Replace OUT/state, keep the one before, and link its files into OUT.

    write(folder) writes the model, or an adapter. state: what state.json says, with "step" and "args"."""
    out = Path(out_dir)
    with replaced(out / "state", keep=True) as new:
        write(new)
        write_tensors(new / "optimizer.safetensors", optimizer_tensors)
        write_atomic(new / "state.json", json.dumps(state, indent=1) + "\n")
    for file in (out / "state").iterdir():
        if file.name not in ("optimizer.safetensors", "state.json"):
            partial = out / (file.name + ".partial")
            partial.unlink(missing_ok=True)
            try:
                os.link(file, partial)
            except OSError:  # a file system without hard links
                shutil.copy(file, partial)
            os.replace(partial, out / file.name)

def read_state(out_dir):
    """(folder, state.json, optimizer tensors) of the last whole state; of a damaged one stderr has a line."""
    folders, problems = [Path(out_dir) / name for name in ("state", "state.previous")], []
    for folder in filter(Path.exists, folders):
        try:
            state = json.loads((folder / "state.json").read_text())
            step, _ = state["step"], state["args"]
            for file in folder.glob("*model*.safetensors"):
                for _ in read_tensors(file):  # which compares its checksum
                    pass
            optimizer = dict(read_tensors(folder / "optimizer.safetensors"))
        except (OSError, ValueError, TypeError, KeyError) as e:
            problems.append(f"{folder}: {e}")
            continue
        for problem in problems:
            print(f"warning: {problem}; going on from {folder} at step {step}", file=sys.stderr)
        return folder, state, optimizer
    raise InputError("; ".join(problems) or f"{out_dir} holds no training state: start without --resume")
