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
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.cli import InputError, refuse, write_atomic

SHARD_BYTES = 4 << 30  # of a file of a model, about


def add(digest, name, tensor):
    digest.update(name.encode())
    digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def write_tensors(path, tensors):
    """Write a safetensors file whose header holds the sha256 of names and contents."""
    path, digest = Path(path), hashlib.sha256()
    tensors = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    for name, tensor in tensors.items():
        add(digest, name, tensor)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt", "sha256": digest.hexdigest()})
    except SafetensorError as e:  # which hides the number of a full disk in its text
        partial.unlink(missing_ok=True)
        code = int(re.search(r"os error (\d+)|$", str(e))[1] or 0)
        raise OSError(code, os.strerror(code), str(path)) from e
    os.chmod(partial, 0o644)  # safetensors makes its files readable for their owner alone
    with open(partial, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def opened(path):
    """A safetensors file, for reading."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} is missing, truncated or not a safetensors file ({e})") from None


def read_tensors(path):
    """Yield (name, tensor) of a file in the order of names; at the end its checksum, if any, must agree.

    The file is mapped anew for each tensor: pages of one long mapping would pile up to the file's size."""
    digest = hashlib.sha256()
    with opened(path) as file:
        wanted, names = (file.metadata() or {}).get("sha256"), sorted(file.keys())
    for name in names:
        with opened(path) as file:
            tensor = file.get_tensor(name)
        add(digest, name, tensor)
        yield name, tensor
        del tensor  # before the next one comes
    refuse(wanted not in (None, digest.hexdigest()), f"{path} was altered after it was written: get it again")


def sharded(sizes):
    """The files of a model: name -> bytes of its tensors, in order => file -> names."""
    shards, size = [[]], 0
    for name, count in sizes.items():
        size += count
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = count
        shards[-1].append(name)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def sync_folder(path):
    """Make renames inside a folder last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def replaced(folder):
    """A new folder beside `folder`, to be filled; then it takes its place."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


# ----------------------------------------------------------------------------------- the state of a run

def replace_state(out_dir, write, optimizer_tensors, state):
    """Replace OUT/state, keep the one before, and link its files into OUT.

    write(folder) writes the model, or an adapter. state: what state.json says, with "step" and "args"."""
    out = Path(out_dir)
    new, current, previous = out / "state.partial", out / "state", out / "state.previous"
    shutil.rmtree(new, ignore_errors=True)
    try:
        write(new)
        write_tensors(new / "optimizer.safetensors", optimizer_tensors)
        write_atomic(new / "state.json", json.dumps(state, indent=1) + "\n")
    except OSError:  # a full disk: leave the last good state and give the space back
        shutil.rmtree(new, ignore_errors=True)
        raise
    if current.exists():  # from here on there is always a whole state under one of the two names
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(current, previous)
    os.replace(new, current)
    sync_folder(out)
    for file in current.iterdir():
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
    nothing = f"{out_dir} holds no training state: start the run without --resume"
    raise InputError("; ".join(problems) or nothing)
