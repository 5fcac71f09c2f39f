"""From text to batches: corpora, token files, and the order in which training sees them.

    files = prepare(open_corpus("builtin", "data"))       # or a path, or openwebtext, the paper's corpus [35]
    x, y = train_batch(files.train, 256, rows=8, seed=1, step=0)

A corpus is turned once into a folder of token files, which training reads through memory maps:

    train.bin, val.bin   token ids, little-endian uint16 (uint32 when the vocabulary needs it)
    meta.json            tokenizer, dtype, counts, sha256 of both files; and the tokenizer's own files

Texts pass through in documents, some hundred at a time: a corpus never has to fit in memory.
"""
import ast
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import sysconfig
import tempfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import InputError, cache_dir, refuse, say
from common.download import openwebtext
from common.tokenizer import blamed_on, gpt2_tokenizer, load_tokenizer, parse_json, train_tokenizer

DOCUMENT = 8192  # characters: longer texts are cut about here, so that a few books have some for validation
BATCH = 256      # documents that are encoded together
CALIBRATION_TOKENS, CALIBRATION_WINDOW = 16384, 512  # more text changes the second moments little
NOT_TEXT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "lib2to3",
            "turtledemo"}
SUFFIXES = (".txt", ".md", ".jsonl")  # of the files of a folder that are read, also with .gz behind

# key changes when the text does; documents() yields strings, `total` of them if that is known; each
# val_every-th is for validation; home is where the tokens are kept, if not in the cache
Corpus = namedtuple("Corpus", "name key documents total val_every home", defaults=(None, 20, None))

def open_corpus(data, data_dir):
    """The corpus that --data names: builtin, openwebtext, or a path."""
    refuse(not data, "--data is empty: builtin, openwebtext, or a path")
    if data == "builtin":
        return Corpus("builtin", f"python{sysconfig.get_python_version()}", builtin_documents)
    if data == "openwebtext":  # 18 GB of tokens are no cache
        return Corpus("openwebtext", "v1", openwebtext, 8_013_769, 2000, Path(data_dir))
    return text_corpus(Path(data))

def builtin_documents():
    """Text that every Python has: its documentation topics and the standard library's docstrings, 2 MB."""
    from pydoc_data.topics import topics
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [p for p in sorted(root.rglob("*.py")) if NOT_TEXT.isdisjoint(p.relative_to(root).parts)]
    for text in itertools.chain((topics[name] for name in sorted(topics)), map(docstrings, modules)):
        if text:  # a line end before a letter at the margin is where an editor broke a paragraph
            yield re.sub(r"(?<=\S)\n(?=[^\W_])", " ", text)

def docstrings(path):
    """One document a module: its docstrings in order, each under the name it explains."""
    try:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # templates and deliberately broken files
    found = []
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            name = path.stem if isinstance(node, ast.Module) else node.name
            found.append(f"{name}\n\n{ast.get_docstring(node)}\n")
    return "\n".join(found)

def text_corpus(path):
    """A file, or all below a folder that have one of SUFFIXES and are not hidden, in their names' order."""
    refuse(not path.exists(), f"--data {path}: there is no such file or folder (nor builtin, openwebtext)")
    files, found, kinds = [path], [path], " or ".join(SUFFIXES)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        files = [p for p in found if suffix(p) in SUFFIXES and "/." not in f"/{p.relative_to(path)}"]
    refuse(not any(f.stat().st_size for f in files), f"--data {path}: the text is empty, or no {kinds} file")
    if len(files) < len(found):
        say(f"data {path}: {len(files):,} of {len(found):,} files, the others are hidden or no {kinds}")
    digest = hashlib.sha256()  # of the text and its form: sizes and times may be those of another one
    for file in files:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest() + suffix(file).encode())
    key = digest.hexdigest()[:12]
    return Corpus(path.stem, key, lambda: (text for file in files for text in read_documents(file)))

def suffix(path):
    """In small letters, and that before a .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

def read_documents(path):
    """The documents of a file, read as it goes: each row's text of .jsonl, else pieces cut at line ends."""
    with open_text(path) as f:
        for lines in iter(lambda: f.readlines(DOCUMENT), []):
            texts = ["".join(lines)]
            if suffix(path) == ".jsonl":
                rows = [parse_json(line, f"{path}, {line[:40]!r}") for line in lines if line.strip()]
                wrong = [r for r in rows if not isinstance(r, dict) or not isinstance(r.get("text"), str)]
                refuse(wrong, f'{path}: a row should be {{"text": ...}}, not {str(wrong[:1])[1:60]}')
                texts = [row["text"] + "\n" for row in rows]
            for text in texts:
                refuse("\0" in text, f"{path} is not text, it has zero bytes: unpack it if it is packed")
                yield text

@contextlib.contextmanager
def open_text(path, newline=None):
    """A text file, opened for reading: UTF-8, or UTF-16 by its first bytes; either may be in gzip."""
    with open(path, "rb") as f:
        opener = gzip.open if f.read(2) == b"\x1f\x8b" else open
    try:
        with opener(path, "rb") as f:
            encoding = "utf-16" if f.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with opener(path, "rt", encoding=encoding, newline=newline) as f:
            yield f
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise InputError(f"{path} is not UTF-8 text ({e}): get the whole file, unpack it, or convert it, as "
                         "with iconv -f latin1 -t utf-8") from None

class TokenFiles:
    """A folder of token files: .train, .val are memory-mapped ids, .tokenizer made them. meta: meta.json."""

    def __init__(self, folder):
        self.folder = Path(folder)
        with blamed_on(f"the token files in {folder}", remedy="remove it"):
            self.meta = json.loads((self.folder / "meta.json").read_bytes())
            dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
            self.train, self.val = (np.memmap(self.folder / f"{s}.bin", dtype, "r",
                                              shape=self.meta[s]["tokens"]) for s in ("train", "val"))
        self.tokenizer = load_tokenizer(self.folder)

    def check(self, vocab_size, length):
        """Refuse ids outside a model's vocabulary, and a text that is shorter than a window."""
        largest, tokens = self.meta["largest"], len(self.train)
        refuse(largest >= vocab_size, f"the data has token {largest}, outside the model's vocabulary "
               f"0..{vocab_size - 1}: prepare it with the model's own tokenizer")
        refuse(tokens <= length, f"the training text has {tokens} tokens, a window of {length} needs "
               f"{length + 1}: give more text or a smaller --seq-len")

def prepare(corpus, tokenizer=None, vocabulary=4096, own=False):
    """Token files of a corpus, made now or found where they were made before; a folder for each tokenizer.

    tokenizer None: GPT-2's; where that can't be had, or with `own`, `vocabulary` pieces learned here."""
    if tokenizer is None and not own:
        tokenizer = gpt2_tokenizer()
    kind = f"sp{vocabulary}"
    if tokenizer is not None:
        kind = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:8]
    folder = (corpus.home or cache_dir() / "tokens") / f"{corpus.name}-{corpus.key}-{kind}"
    if not (folder / "meta.json").exists():
        if tokenizer is None:
            say(f"training a SentencePiece model on the corpus, {vocabulary:,} pieces in place of GPT-2's")
            tokenizer = train_tokenizer(corpus.documents(), vocabulary)
        write_tokens(corpus, tokenizer, folder)
    return TokenFiles(folder)

def write_tokens(corpus, tokenizer, folder):
    """Write the token files of a corpus. The folder appears when it is complete, never before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as partial:
        meta = encode_corpus(corpus, tokenizer, Path(partial))
        tokenizer.save(partial)
        Path(partial, "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(partial, folder)

def encode_corpus(corpus, tokenizer, folder):
    """Stream the corpus into train.bin and val.bin; what meta.json says of them."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = [] if tokenizer.end is None else [tokenizer.end]
    paths, n = {split: folder / f"{split}.bin" for split in ("train", "val")}, 0
    documents = iter(tqdm(corpus.documents(), desc=f"tokenizing {corpus.name}", total=corpus.total,
                          unit=" documents", disable=None, leave=False))
    with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
        for batch in iter(lambda: list(itertools.islice(documents, BATCH)), []):
            for ids in tokenizer.encode_batch(batch):  # on all cores
                n += 1
                (train if n % corpus.val_every else val).write(np.array(ids + end, dtype).tobytes())
    if paths["val"].stat().st_size == 0:  # a text of a few pages: its last tenth
        tokens = np.fromfile(paths["train"], dtype)
        cut = len(tokens) - len(tokens) // 10
        tokens[:cut].tofile(paths["train"])
        tokens[cut:].tofile(paths["val"])
    meta = dict(corpus=corpus.name, tokenizer=tokenizer.name, dtype=dtype.name, largest=0)
    for split, path in paths.items():
        count = path.stat().st_size // dtype.itemsize
        refuse(count < 2, f"{path.name} of {corpus.name} gets {count} tokens, too few to train on and to "
               "validate with")
        tokens = np.memmap(path, dtype, "r")
        meta[split] = dict(tokens=count, sha256=hashlib.sha256(tokens).hexdigest())
        meta["largest"] = max(meta["largest"], int(tokens.max()))
    return meta

def windows(tokens, starts, length):
    """`length` tokens from each start, and the same one token later: two (rows, length) int64 tensors."""
    rows = torch.from_numpy(np.stack([tokens[s:s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

def train_batch(tokens, length, rows, seed, step, first=0, count=None):
    """Rows first..first+count (or to the end) of the `rows` windows of this step.

    The draw depends on the seed and the step alone: a resumed run sees what an undisturbed one sees, and
    processes that share a batch see together what one process sees."""
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, rows)
    return windows(tokens, starts[first:][:count], length)

def eval_batches(tokens, length, rows, limit):
    """The same windows at every call: side by side from the start, at most `limit` tokens, in batches."""
    length = min(length, len(tokens) - 1)
    starts = range(0, min(len(tokens) - length, max(limit, length)), length)
    for i in range(0, len(starts), rows):
        yield windows(tokens, starts[i:i + rows], length)

def first_tokens(name, tokenizer, count=None):
    """Ids of the first `count` tokens of a text, or of all; no more of it is read than that needs."""
    limit = 16 * count if count else None  # characters; no vocabulary here has longer tokens on average
    text = ""
    for document in open_corpus(name, "data").documents():
        text += document
        if limit and len(text) >= limit:
            break
    return tokenizer.encode(text[:limit])[:count]

def calibration_batches(text, tokenizer, context, count=CALIBRATION_TOKENS):
    """The first tokens of a text, in windows: a list of (1, T) tensors."""
    refuse(tokenizer is None, "--calibration needs the model's tokenizer, and none is beside the weights")
    ids = first_tokens(text, tokenizer, count)
    length = min(CALIBRATION_WINDOW, context)
    refuse(len(ids) < length, f"--calibration {text} has {len(ids)} tokens: at least {length} are needed")
    return [row[None] for row in torch.tensor(ids).split(length) if len(row) == length]
