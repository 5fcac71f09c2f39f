"""data.py: corpora, token files, the order of batches, and what it refuses."""
import gzip
import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet
import pytest
import torch

from common import data
from common.cli import InputError
from common.data import (
    TokenFiles,
    calibration_batches,
    eval_batches,
    open_corpus,
    prepare,
    train_batch,
    write_tokens,
)
from common.tokenizer import train_tokenizer

@pytest.fixture(scope="module")
def tokenizer(text_file):
    return train_tokenizer([text_file.read_text(encoding="utf-8")], 600)

def test_token_files_hold_every_character_of_the_text(text_file, tokenizer):
    files = prepare(open_corpus(str(text_file), "data"), tokenizer)
    meta = json.loads((files.folder / "meta.json").read_text())
    for split, tokens in (("train", files.train), ("val", files.val)):
        assert len(tokens) == meta[split]["tokens"] > 1000
        content = (files.folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == meta[split]["sha256"]
    assert files.train.dtype == np.dtype("<u2") and isinstance(files.train, np.memmap)
    documents = list(open_corpus(str(text_file), "data").documents())
    assert "".join(documents) == text_file.read_text(encoding="utf-8")
    kept = [d for i, d in enumerate(documents) if i % 20 != 19]
    end = files.tokenizer.end
    assert files.tokenizer.decode([i for i in files.train.tolist() if i != end]) == "".join(kept)

def test_the_second_time_nothing_is_tokenized(text_file, tokenizer, monkeypatch):
    first = prepare(open_corpus(str(text_file), "data"), tokenizer)
    monkeypatch.setattr(data, "write_tokens", None)
    again = prepare(open_corpus(str(text_file), "data"), tokenizer)
    assert again.folder == first.folder and np.array_equal(again.train, first.train)

def test_a_text_of_the_same_name_size_and_time_is_another_corpus(tokenizer, tmp_path):
    for name, text in (("a", "The cat sat on the mat. "), ("b", "Net income rose by 12%. ")):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "corpus.txt"
        file.write_text(text * 400)
        os.utime(file, (1, 1))
        files = prepare(open_corpus(str(file), "data"), tokenizer)
        assert text.startswith(tokenizer.decode(files.train[:5].tolist()))

def test_several_processes_prepare_the_same_corpus(text_file, tokenizer, tmp_path):
    """A sweep that is started with & from a shell: all find the tokens."""
    corpus = open_corpus(str(text_file), "data")
    start = threading.Barrier(4)

    def one():
        start.wait()
        write_tokens(corpus, tokenizer, tmp_path / "t")
        return len(TokenFiles(tmp_path / "t").train)
    with ThreadPoolExecutor(4) as pool:
        counts = [future.result() for future in [pool.submit(one) for _ in range(4)]]
    assert len(set(counts)) == 1 and [p.name for p in tmp_path.iterdir()] == ["t"]

def test_a_corpus_streams_through_without_being_held(tokenizer, tmp_path, monkeypatch):
    """No more than one batch of documents is asked for before the last one was written."""
    asked, written = [], []

    class Spy:
        name, vocab_size, end = tokenizer.name, tokenizer.vocab_size, tokenizer.end
        save = staticmethod(tokenizer.save)

        def encode_batch(self, texts):
            written.extend(texts)
            return tokenizer.encode_batch(texts)

    def documents():
        for i in range(1000):
            assert len(asked) - len(written) <= 64
            asked.append(i)
            yield f"document {i} of many\n"
    monkeypatch.setattr(data, "BATCH", 64)
    write_tokens(data.Corpus("many", "1", documents), Spy(), tmp_path / "many")
    files = TokenFiles(tmp_path / "many")
    texts = tokenizer.decode(files.train.tolist())
    places = [texts.index(f"document {i} ") for i in (3, 500, 998)]
    assert len(asked) == 1000 and places == sorted(places)
    assert [path.name for path in tmp_path.iterdir()] == ["many"], "no partial folder is left"

def test_an_interrupted_preparation_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH", 1)

    def documents():
        yield "some text\n"
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_tokens(data.Corpus("cut", "1", documents), tokenizer, tmp_path / "cut")
    assert not list(tmp_path.iterdir())

def test_builtin_text_is_about_two_megabytes_of_english():
    text = "".join(data.builtin_documents())
    assert 1e6 < len(text) < 6e6 and text.count(" the ") > 10_000

def test_batches_depend_on_seed_and_step_alone_and_are_shared_out():
    tokens = np.arange(5000, dtype=np.uint16)
    x, y = train_batch(tokens, 16, 8, seed=3, step=10)
    assert x.shape == y.shape == (8, 16) and x.dtype == torch.int64 and torch.equal(y, x + 1)
    again, _ = train_batch(tokens, 16, 8, seed=3, step=10)
    parts = [train_batch(tokens, 16, 8, seed=3, step=10, first=i * 4, count=4)[0] for i in range(2)]
    assert torch.equal(again, x) and torch.equal(torch.cat(parts), x)
    for other in (dict(seed=4, step=10), dict(seed=3, step=11)):
        assert not torch.equal(train_batch(tokens, 16, 8, **other)[0], x)
    starts = torch.cat([train_batch(tokens, 16, 64, 0, s)[0][:, 0] for s in range(200)])
    assert starts.min() < 50 and 4900 < starts.max() <= 5000 - 17

def test_eval_windows_are_fixed_and_side_by_side():
    tokens = np.arange(1000, dtype=np.uint16)
    rows = torch.cat([x for x, _ in eval_batches(tokens, 64, 3, limit=512)])
    assert torch.equal(rows.flatten(), torch.arange(512))
    assert sum(len(x) for x, _ in eval_batches(tokens, 64, 3, limit=10 ** 9)) == 15
    assert next(eval_batches(tokens[:20], 64, 3, limit=100))[0].shape == (1, 19)

def test_bad_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "zero.txt").write_bytes(b"text with a \0 in it\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 cr\xe8me\n".encode("latin-1"))
    (tmp_path / "nothing").mkdir()
    for path, message in (("missing.txt", "there is no such file"), ("empty.txt", "the text is empty"),
                          ("nothing", "empty, or no .txt or .md or .jsonl file")):
        with pytest.raises(InputError, match=message):
            open_corpus(str(tmp_path / path), "data")
    for path, message in (("zero.txt", "is not text, it has zero bytes"),
                          ("latin.txt", "not UTF-8 text .*byte 0xe9 in position 3")):
        with pytest.raises(InputError, match=message):
            prepare(open_corpus(str(tmp_path / path), "data"), tokenizer)

def packed(text, suffix):
    encoding = "utf-16" if "16" in suffix else "utf-8"
    content = text.encode(encoding)
    return gzip.compress(content, mtime=0) if suffix.lower().endswith(".gz") else content

@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".gz", ".txt.gz", ".16.txt", ".16.txt.gz", "", ".unknown"])
def test_a_text_is_known_by_its_first_bytes(suffix, tmp_path):
    text = "Net income rose.\u2028Really.\n" * 2000
    (tmp_path / f"a{suffix}").write_bytes(packed(text, suffix))
    assert "".join(open_corpus(str(tmp_path / f"a{suffix}"), "data").documents()) == text

def test_rows_of_jsonl_are_documents(tmp_path):
    texts = ["one\u2028line", "two\nlines\n", "x" * 600_000]
    text = "\n".join(json.dumps(dict(text=t, id=1), ensure_ascii=False) for t in texts) + "\n\n"
    for suffix in (".jsonl", ".JSONL", ".jsonl.gz", ".16.jsonl"):
        (tmp_path / f"a{suffix}").write_bytes(packed(text, suffix))
        documents = list(open_corpus(str(tmp_path / f"a{suffix}"), "data").documents())
        assert documents[:2] == ["one\u2028line\n", "two\nlines\n\n"] and "".join(documents[2:]) == texts[2] + "\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    keys = {open_corpus(str(tmp_path / name), "data").key for name in ("a.txt", "a.jsonl")}
    assert len(keys) == 2, "the same bytes, but other documents"

def test_a_folder_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("b.TXT", "sub/a.md", "c.txt.gz", ".git/x.txt", ".d.txt", "sub/.e/f.txt", "g.pdf", "no-suffix"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(packed(f"text of {name}\n", name))
    documents = list(open_corpus(str(tmp_path / "in"), "data").documents())
    assert documents == ["text of b.TXT\n", "text of c.txt.gz\n", "text of sub/a.md\n"]
    line = "3 of 8 files, the others are hidden or no .txt or .md or .jsonl"
    assert line in capsys.readouterr().out

@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"\x28\xb5\x2f\xfd more", "a.txt is not UTF-8 text .*unpack it"),  # zstd
    ("a.txt", b"PK\3\4\x14\0 more", "a.txt is not text, it has zero bytes"),  # zip
    ("a.gz", gzip.compress(b"some text " * 100, mtime=0)[:-20], "a.gz is not UTF-8 text"),
    ("a.gz", gzip.compress(b"some text " * 100, mtime=0)[:10], "a.gz is not UTF-8 text"),
    ("a.gz", gzip.compress(b"some text " * 100, mtime=0)[:-8] + b"12345678", "a.gz is not UTF-8 text .CRC check failed"),
    ("a.gz", b"\x1f\x8bnothing", "a.gz is not UTF-8 text"),
    ("a.txt", "text".encode("utf-16")[:-1], "a.txt is not UTF-8 text .*utf-16"),
    ("a.txt", "text".encode("utf-32"), "a.txt is not text, it has zero bytes"),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl: a row should be .*, not {'body': 'b'}"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, '{\"text\": .*' can't be read as JSON"),
    ("a.jsonl", b'["text"]\n', "a row should be"),
    ("a.jsonl", b'{"text": "\\u0000"}\n', "it has zero bytes")])
def test_what_is_no_text_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        list(open_corpus(str(tmp_path / name), "data").documents())
    assert "\n" not in str(refused.value)

@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz", ".16.txt", ".jsonl.gz"])
def test_nothing_but_an_input_error_is_raised_for_a_damaged_text(suffix, tmp_path):
    random, path = np.random.default_rng(0), tmp_path / f"a{suffix}"
    whole = packed('{"text": "some text, \\u00e9"}\n' * 20, suffix)
    for _ in range(2000):
        content = bytearray(whole)
        for place in random.integers(len(whole), size=random.integers(1, 4)):
            content[place] = random.integers(256)
        path.write_bytes(content[int(random.integers(4) == 0):len(content) - int(random.choice([0, 1, 9]))])
        try:
            list(open_corpus(str(path), "data").documents())
        except InputError as e:
            assert "\n" not in str(e), e

def test_bad_token_files_are_refused(text_file, tokenizer, tmp_path):
    write_tokens(open_corpus(str(text_file), "data"), tokenizer, tmp_path / "t")
    files = TokenFiles(tmp_path / "t")
    with pytest.raises(InputError, match="outside the model's vocabulary 0..99"):
        files.check(100, 32)
    with pytest.raises(InputError, match="the training text has .* tokens, a window of 1000000 needs"):
        files.check(600, 10 ** 6)
    with open(tmp_path / "t" / "train.bin", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(InputError, match="the token files in .* can't be read .*greater than file size.: remove it"):
        TokenFiles(tmp_path / "t")

def test_openwebtext_without_its_library_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="openwebtext can't be downloaded .ModuleNotFoundError: .*datasets"):
        prepare(open_corpus("openwebtext", tmp_path), tokenizer)

def test_openwebtext_from_its_parquet_files(tmp_path, tokenizer, monkeypatch):
    texts = [f"page {i} of the web\n" for i in range(4001)]
    for i, part in enumerate((texts[:3000], texts[3000:])):
        rows = pyarrow.table({"text": part})
        pyarrow.parquet.write_table(rows, tmp_path / f"train-{i}.parquet", row_group_size=1000)
    monkeypatch.setattr("common.download.OPENWEBTEXT", str(tmp_path / "*.parquet"))
    files = prepare(open_corpus("openwebtext", tmp_path / "t"), tokenizer)
    assert files.folder.parent == tmp_path / "t"
    other = train_tokenizer(texts[:300], 280)
    again = prepare(open_corpus("openwebtext", tmp_path / "t"), other)
    assert again.folder != files.folder, "a folder for each tokenizer"
    assert again.tokenizer.backend.to_str() == other.backend.to_str()
    assert "page 1999 of" in tokenizer.decode(files.val.tolist())
    assert "page 4000 of" in tokenizer.decode(files.train.tolist())

@pytest.mark.parametrize("size", [20, 100_000])
def test_calibration_takes_as_many_tokens_as_it_is_asked_for(tmp_path, tokenizer, size, text_file):
    """Of many short texts and of a long one."""
    text = text_file.read_text()
    (tmp_path / "texts").mkdir()
    for i in range(min(2000, len(text) // size)):
        (tmp_path / "texts" / f"{i:05}.txt").write_text(text[i * size:(i + 1) * size])
    batches = calibration_batches(tmp_path / "texts", tokenizer, 64, 4096)
    assert [b.shape for b in batches] == [(1, 64)] * 64
    assert torch.cat(batches, 1)[0].tolist() == tokenizer.encode(text[:40_000])[:4096]
