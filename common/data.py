"""From text to batches: corpora, token files, and the order in which training sees them.

    python data.py builtin                 tokenize the text that comes with Python
    python data.py my_books/               ... or a file or a folder of .txt and .md files
    python data.py openwebtext             ... or the paper's corpus [35], downloaded through `datasets`

A corpus is turned once into a folder of token files, which training reads through memory maps:

    train.bin, val.bin   token ids, little-endian uint16 (uint32 when the vocabulary needs it)
    meta.json            tokenizer, dtype, counts, sha256 of both files
    tokenizer.json or tokenizer.model

The texts pass through in documents, a few hundred at a time, so a corpus never has to fit in memory.
"""
import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import InputError, cache_dir, command, say, write_atomic
from common.tokenizer import gpt2_tokenizer, load_tokenizer, train_tokenizer

DOCUMENT = 8192  # characters: longer texts are cut into documents of about this size, so that a few books still have validation text


# ----------------------------------------------------------------------------- corpora: a name, a key, documents

class Corpus:
    """Texts with a name. `key` changes when the text does; `documents()` yields strings; `val_every`: each so-many-th is for validation;
    `home`: where the tokens are kept, if not in the cache."""
    val_every, home = 20, None

    def __init__(self, name, key, documents, total=None):
        self.name, self.key, self.documents, self.total = name, key, documents, total


def open_corpus(data, data_dir):
    """The corpus that --data names: builtin, openwebtext, or a path."""
    if not data:
        raise InputError("--data is empty: builtin, openwebtext, or a path")
    if data == "builtin":
        return Corpus("builtin", f"python{sysconfig.get_python_version()}", builtin_documents)
    if data == "openwebtext":
        return openwebtext(data_dir)
    return text_corpus(Path(data))


def builtin_documents():
    """Text that every Python has: the language's documentation topics and the docstrings of the standard library, about 2 MB."""
    from pydoc_data.topics import topics
    yield from (unwrap(topics[name]) for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "lib2to3", "turtledemo", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings(path)


def _docstrings(path):
    """One document a module: its docstrings in order, each under the name it explains."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # templates and deliberately broken files
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            found.append(f"{getattr(node, 'name', path.stem)}\n\n{text}\n")
    if found:
        yield unwrap("\n".join(found))


def unwrap(text):
    """Join the lines of a paragraph: a line end before a letter at the margin is where an editor broke the line."""
    return re.sub(r"(?<=\S)\n(?=[^\W_])", " ", text)


def text_corpus(path):
    """A text file, or all .txt and .md files below a folder, in the order of their names."""
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file or folder (nor a corpus of that name: builtin, openwebtext)")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise InputError(f"--data {path}: the folder has no .txt or .md file")
    if not any(f.stat().st_size for f in files):
        raise InputError(f"--data {path}: the text is empty")
    stamp = hashlib.sha256(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:12]
    return Corpus(path.stem, stamp, lambda: itertools.chain.from_iterable(map(_read_documents, files)))


def _read_documents(path):
    """The documents of one UTF-8 file: cut at line ends, read as it goes."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            while lines := f.readlines(DOCUMENT):
                text = "".join(lines)
                if "\0" in text:
                    raise InputError(f"{path} is not text: it has zero bytes")
                for start in range(0, len(text), 64 * DOCUMENT):  # a file without line ends is one enormous line
                    yield text[start:start + 64 * DOCUMENT]
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text (byte {e.start} of a block is {e.object[e.start]:#x}): convert it, for example with "
                         f"iconv -f latin1 -t utf-8") from None


def openwebtext(data_dir):
    """The paper's corpus, streamed through the `datasets` library: 8 million documents, 54 GB of text, 9 billion tokens."""
    def documents():
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError("openwebtext is downloaded by the library `datasets`: pip install datasets, or give --data a text file") from None
        try:
            stream = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
            yield from (row["text"] for row in stream)
        except (OSError, ConnectionError) as e:
            raise InputError(f"openwebtext could not be downloaded ({type(e).__name__}): check the network, or give --data a text file") from None
    corpus = Corpus("openwebtext", "v1", documents, total=8_013_769)
    corpus.val_every, corpus.home = 2000, Path(data_dir)  # 18 GB of tokens are no cache
    return corpus


# ----------------------------------------------------------------------------- token files

class TokenFiles:
    """A folder of token files, memory-mapped: .train and .val are arrays of ids, .tokenizer reads them, .meta says what they are."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.train, self.val = (self._map(split) for split in ("train", "val"))
        except (OSError, KeyError, json.JSONDecodeError) as e:
            raise InputError(f"{folder} has no readable token files ({e}): remove it and prepare the data again") from None
        self.tokenizer = load_tokenizer(self.folder)

    def _map(self, split):
        path, dtype = self.folder / f"{split}.bin", np.dtype(self.meta["dtype"]).newbyteorder("<")
        size, wanted = path.stat().st_size, self.meta[split]["tokens"] * dtype.itemsize
        if size != wanted or size == 0:
            raise InputError(f"{path} has {size:,} bytes, meta.json says {wanted:,}: remove {self.folder} and prepare the data again")
        return np.memmap(path, dtype=dtype, mode="r")

    def check_fits(self, vocab_size):
        if self.meta["largest"] >= vocab_size:
            raise InputError(f"the data has token {self.meta['largest']}, outside the model's vocabulary 0..{vocab_size - 1}: "
                             f"prepare it with the model's own tokenizer")


def prepare(corpus, tokenizer=None, vocabulary=4096, own=False):
    """Token files of a corpus, made now or found where they were made before; a folder for each tokenizer.

    tokenizer None: GPT-2's, or where that can't be had, or with `own`, a SentencePiece model of `vocabulary` pieces trained on the corpus.
    """
    if tokenizer is None and not own:
        tokenizer = gpt2_tokenizer()
    kind = f"sp{vocabulary}" if tokenizer is None else hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:8]
    folder = (corpus.home or cache_dir() / "tokens") / f"{corpus.name}-{corpus.key}-{kind}"
    if not (folder / "meta.json").exists():
        if tokenizer is None:
            say(f"training a SentencePiece model of {vocabulary:,} pieces on the corpus" if own else
                "GPT-2's vocabulary is not on this machine and can't be downloaded: training a SentencePiece model on the corpus instead")
            tokenizer = train_tokenizer(corpus.documents(), vocabulary)
        write_tokens(corpus, tokenizer, folder)
    return TokenFiles(folder)


def write_tokens(corpus, tokenizer, folder, batch=256):
    """Stream the corpus into folder/train.bin and val.bin. The folder appears when it is complete, never before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = [] if tokenizer.end is None else [tokenizer.end]
    parts = {split: dict(tokens=0, sha256=hashlib.sha256()) for split in ("train", "val")}
    largest = 0
    try:
        with open(partial / "train.bin", "wb") as train, open(partial / "val.bin", "wb") as val, ThreadPoolExecutor(os.cpu_count()) as pool:
            documents = tqdm(corpus.documents(), desc=f"tokenizing {corpus.name}", total=corpus.total, unit=" documents", disable=None, leave=False)
            for n, ids in enumerate(_encode_in_order(documents, tokenizer, pool, batch)):
                split, file = ("val", val) if n % corpus.val_every == corpus.val_every - 1 else ("train", train)
                block = np.array(ids + end, dtype=dtype)
                largest = max(largest, int(block.max(initial=0)))
                file.write(block.tobytes())
                parts[split]["tokens"] += block.size
                parts[split]["sha256"].update(block.tobytes())
        if parts["val"]["tokens"] == 0:  # a text of a few pages: its last tenth
            _split_off_validation(partial, parts, dtype)
        if parts["train"]["tokens"] < 2 or parts["val"]["tokens"] < 2:
            raise InputError(f"the text of {corpus.name} has {parts['train']['tokens'] + parts['val']['tokens']} tokens, too few to train on and to validate "
                             "with: give more text")
        tokenizer.save(partial)
        meta = dict(corpus=corpus.name, tokenizer=tokenizer.name, dtype=dtype.name, largest=largest,
                    **{s: dict(tokens=p["tokens"], sha256=p["sha256"].hexdigest()) for s, p in parts.items()})
        write_atomic(partial / "meta.json", json.dumps(meta, indent=2) + "\n")
        if not (folder / "meta.json").exists():  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encode_in_order(documents, tokenizer, pool, batch):
    """Ids of each document, encoded in parallel (both tokenizers let go of Python's lock), a few hundred documents in flight."""
    documents = iter(documents)
    while block := list(itertools.islice(documents, batch)):
        yield from pool.map(tokenizer.encode, block)


def _split_off_validation(folder, parts, dtype):
    tokens = np.fromfile(folder / "train.bin", dtype)
    cut = len(tokens) - len(tokens) // 10
    for split, block in (("train", tokens[:cut]), ("val", tokens[cut:])):
        (folder / f"{split}.bin").write_bytes(block.tobytes())
        parts[split] = dict(tokens=block.size, sha256=hashlib.sha256(block.tobytes()))


# ----------------------------------------------------------------------------- batches

def windows(tokens, starts, length):
    """Rows of `length` tokens from each start, and the same rows one token later: two (rows, length) int64 tensors."""
    rows = torch.from_numpy(np.stack([tokens[s:s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def check_length(tokens, length, what):
    if len(tokens) < length + 1:
        raise InputError(f"the {what} text has {len(tokens)} tokens, a window of {length} needs {length + 1}: give more text or a smaller --seq-len")


def train_batch(tokens, length, rows, seed, step, first=0, count=None):
    """Rows first..first+count of the whole batch of `rows` windows that belongs to this step.

    The draw depends on the seed and the step alone: a resumed run sees what an undisturbed one sees, and processes that share a
    batch see together what one process sees.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, rows)
    return windows(tokens, starts[first:first + (rows if count is None else count)], length)


def eval_batches(tokens, length, rows, limit):
    """The same windows at every call: side by side from the start, at most `limit` tokens, in batches of `rows`."""
    length = min(length, len(tokens) - 1)
    starts = range(0, min(len(tokens) - length, max(limit, length)), length)
    for i in range(0, len(starts), rows):
        yield windows(tokens, starts[i:i + rows], length)


def first_tokens(name, tokenizer, count=None):
    """Ids of the first `count` tokens of a text, or of all; only as much of it is read and encoded as that needs."""
    room, documents = 16 * count if count else None, []  # characters; no vocabulary here has longer tokens on average
    for document in open_corpus(name, "data").documents():
        documents.append(document)
        if room and sum(map(len, documents)) >= room:
            break
    return tokenizer.encode("".join(documents)[:room])[:count]


CALIBRATION_TOKENS, CALIBRATION_WINDOW = 16384, 512  # more text changes little: the moments of 16,384 inputs have settled


def calibration_batches(text, tokenizer, context, count=CALIBRATION_TOKENS):
    """The first tokens of a text, in windows: a list of (1, T) tensors."""
    if tokenizer is None:
        raise InputError("--calibration needs the model's tokenizer, and there is none beside the weights")
    ids = first_tokens(text, tokenizer, count)
    length = min(CALIBRATION_WINDOW, context)
    if len(ids) < length:
        raise InputError(f"--calibration {text} has {len(ids)} tokens: at least {length} are needed")
    return [row[None] for row in torch.tensor(ids).split(length) if len(row) == length]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="builtin, openwebtext, or a text file or folder")
    parser.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"), help="where named data sets are (default: $DATA_DIR, then data/)")
    args = parser.parse_args(argv)
    files = prepare(open_corpus(args.name, args.data_dir))
    print(f"{files.folder}: {len(files.train):,} training and {len(files.val):,} validation tokens, {files.tokenizer.name}")


if __name__ == "__main__":
    command(main)
