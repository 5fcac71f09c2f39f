"""tokenizer.py against transformers and tokenizers: the same ids, on real text and on hard text, before and after saving."""
import json
import os
import pickle
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from common import tokenizer as ours
from common.cli import InputError

DATA = Path(os.environ.get("DATA_DIR", "data"))
HARD = ("😀👩‍👩‍👧 naïve 中文字符 日本語 ١٢٣ ½² x\n\n   def f(x):\n\t\treturn x  12  345\r\n\r\n  a   b\u00a0c\u3000d\u2003 'll I'LL don't  \n \n  1\n"
        "   \t x_y <|endoftext|> </s> \0\x85\u200b" + " " * 50 + "z" + " " * 3)
EVERYTHING = "".join(f"{c} {c}a" for c in map(chr, range(0x20, 0x3000)) if c != "▁")
MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}]
CHATML = ("{% for m in messages %}\n  {% if not m['content'] %}{{ raise_exception('an empty turn') }}{% endif %}\n"
          "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def needs(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not there: set DATA_DIR to the data that the README lists")
    return DATA / path


@pytest.fixture(scope="module")
def corpus():
    return needs("text/wikitext2-valid.txt").read_text()


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(needs("tokenizers/tiktoken_cache")))
        return ours.gpt2_tokenizer()


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(needs("tokenizers/llama2/tokenizer.model").read_bytes())
    return ours.load_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(corpus):
    return ours.train_tokenizer([corpus])


def byte_level_json(path, text, pre, specials, **trainer):
    """A byte-level BPE trained by the tokenizers package, with special tokens first in the id space."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(text.splitlines(), tokenizers.trainers.BpeTrainer(special_tokens=specials, show_progress=False, **trainer))
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    return made


def same_ids(mine, theirs, text):
    assert mine.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "trained"])
def test_saved_tokenizer_is_transformers_tokenizer(kind, request, tmp_path, corpus):
    tokenizer = request.getfixturevalue(kind)
    (LlamaConfig() if kind == "llama2" else GPT2Config()).save_pretrained(tmp_path)  # AutoTokenizer looks at the model's kind as well
    tokenizer.save(tmp_path)
    again, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (corpus, HARD, EVERYTHING):
        same_ids(tokenizer, theirs, text)
        assert again.encode(text) == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size == again.vocab_size
    assert theirs("hello").input_ids == [tokenizer.begin] * (tokenizer.begin is not None) + tokenizer.encode("hello")
    assert (again.begin, again.end, again.stop_ids, again.roles) == (tokenizer.begin, tokenizer.end, tokenizer.stop_ids, tokenizer.roles)
    assert theirs.eos_token_id in tokenizer.stop_ids


def test_special_ids(gpt2, llama2, trained):
    assert (gpt2.begin, gpt2.end, gpt2.stop_ids, gpt2.vocab_size) == (None, 50256, {50256}, 50257)
    assert (llama2.begin, llama2.end, llama2.stop_ids, llama2.vocab_size) == (1, 2, {2}, 32000)
    assert trained.begin is None and trained.stop_ids == {trained.end}
    assert gpt2.encode("a<|endoftext|>b", special=True) == [64, 50256, 65]
    assert 50256 not in gpt2.encode("a<|endoftext|>b") and gpt2.decode([64, 50256]) == "a<|endoftext|>"
    with pytest.raises(InputError, match="token 50257 is outside the vocabulary"):
        gpt2.decode([50257])


BYTES, BYTES_UNCUT = (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut) for cut in (True, False))
LLAMA3 = tokenizers.Regex(ours.LLAMA3["pretokenizers"][0]["pattern"]["Regex"])
CUTS = {"gpt2": BYTES, "smollm": tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(True), BYTES]),
        "llama3": tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(LLAMA3, "isolated"), BYTES_UNCUT])}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("alphabet", [tokenizers.pre_tokenizers.ByteLevel.alphabet(), []], ids=["all bytes", "those of the text"])
def test_json_of_byte_level_bpe(cut, alphabet, tmp_path, corpus):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    theirs = byte_level_json(tmp_path, corpus[:400_000], CUTS[cut], special, vocab_size=3000, initial_alphabet=alphabet)
    tokenizer = ours.load_tokenizer(tmp_path)
    for sample in (corpus[-300_000:], HARD.replace("<|endoftext|>", ""), EVERYTHING) if alphabet else (corpus[:300_000],):
        assert tokenizer.encode(sample) == theirs.encode(sample).ids
    if not alphabet:
        assert tokenizer.decode(tokenizer.encode("so\1 it\2 is")) == "so it is"
    marked = "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.encode(marked, special=True) == theirs.encode(marked).ids
    assert tokenizer.end == 0 and tokenizer.stop_ids == {0, 2}


def test_merges_that_ranks_cannot_express(tmp_path, corpus):
    byte_level_json(tmp_path, corpus[:100_000], BYTES, [], vocab_size=600, initial_alphabet=BYTES.alphabet())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    merges, vocab = content["model"]["merges"], content["model"]["vocab"]
    at = next(i for i, (a, b) in enumerate(merges) if len(a + b) == 3 and len(a) == 2 and a[1:] + b in vocab)
    a, b = merges[at]
    merges[at] = [a[0], a[1:] + b]  # its letters never come together this way
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="BPE does not reach"):
        ours.load_tokenizer(tmp_path)
    merges[at] = [a, b]
    merges.append(merges.pop(at))  # the list's order and the ids' differ now, which is no problem
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    last = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.load_tokenizer(tmp_path).encode(corpus[:50_000]) == last.encode(corpus[:50_000]).ids
    merges[at] = ["q", "☃"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not in the vocabulary"):
        ours.load_tokenizer(tmp_path)


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        ours.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match="not JSON"):
        ours.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(InputError, match="WordPiece"):
        ours.load_tokenizer(tmp_path)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": empty, "pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(InputError, match="Whitespace"):
        ours.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        ours.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="'somebpe'"):
        ours.from_gguf("x", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "somebpe", "tokenizer.ggml.tokens": []})


def test_sentencepiece_from_a_gguf(llama2):
    pieces = ours.read_pieces(llama2.model)
    fields = {"model": "llama", "tokens": [p for p, _, _ in pieces], "scores": [s for _, s, _ in pieces], "token_type": [k for _, _, k in pieces],
              "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    rebuilt = ours.from_gguf("llama2", {f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    for text in (HARD, EVERYTHING, "", " ", "a"):
        assert rebuilt.encode(text) == llama2.encode(text) and rebuilt.decode(rebuilt.encode(text)) == text
    assert (rebuilt.begin, rebuilt.end, rebuilt.prefix) == (1, 2, True)
    no_prefix = ours.from_gguf("llama2", {f"tokenizer.ggml.{k}": v for k, v in (fields | {"add_space_prefix": False}).items()})
    assert no_prefix.encode("a b") == [29874, 289] and llama2.encode("a b") == [263, 289]  # "a", "▁b"; "▁a", "▁b"
    assert no_prefix.decode([29874, 289]) == "a b" and no_prefix.decode([263]) == " a"


def test_tokens_added_to_sentencepiece(llama2, tmp_path):
    llama2.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"32000": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    more = ours.load_tokenizer(tmp_path)
    assert more.vocab_size == 32001 and more.encode("<s>hi<|im_end|>", special=True) == [1, *llama2.encode("hi"), 32000]
    assert more.stop_ids == {2, 32000}
    more.save(tmp_path / "again")
    again, theirs = ours.load_tokenizer(tmp_path / "again"), AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "hi<|im_end|>hello there</s>"
    assert again.encode(text, special=True) == more.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids


def test_stream_gives_whole_characters(gpt2, llama2, trained):
    for tokenizer in (gpt2, llama2, trained):
        stream, ids = tokenizer.stream(), tokenizer.encode(HARD)
        parts = [stream.feed(i) for i in ids]
        assert "".join(parts).removeprefix(" ") == HARD and "" in parts and not any("\ufffd" in p for p in parts)


def test_other_processes_can_use_it(gpt2, llama2, trained):
    for tokenizer in (gpt2, llama2, trained):
        assert pickle.loads(pickle.dumps(tokenizer)).encode(HARD) == tokenizer.encode(HARD)


def test_training(corpus, trained):
    start = time.perf_counter()
    again = ours.train_tokenizer([corpus, corpus])  # 2.2 MB
    assert time.perf_counter() - start < 60  # half a second alone on a core
    assert trained.vocab_size == again.vocab_size == 4096
    assert ours.train_tokenizer([corpus]).model == trained.model
    assert len(trained.encode(corpus)) < len(corpus) / 2.5
    assert trained.decode(trained.encode(HARD)) == HARD


def test_training_on_little_and_on_odd_text():
    small = ours.train_tokenizer(["the cat sat on the mat"])
    assert 256 < small.vocab_size < 400 and small.decode(small.encode(HARD)) == HARD
    signs = "".join(chr(0x4E00 + i) * (1 + 600_000 // (i + 1) ** 2) for i in range(6000))  # more signs than the vocabulary has room for
    many = ours.train_tokenizer([signs[i:i + 50] for i in range(0, len(signs), 50)])
    assert many.vocab_size <= 4096 and many.decode(many.encode(signs)) == signs
    with pytest.raises(InputError, match="it is empty"):
        ours.train_tokenizer([])
    with pytest.raises(InputError, match="no tokenizer of 10 tokens"):
        ours.train_tokenizer(["hello"], vocab_size=10)


def test_many_lines_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(ours, "TRAINING_CHARACTERS", 4000)
    lines = ours.sample_lines(f"{i:04}\n" * 1 for i in range(8000))
    assert sum(map(len, lines)) <= 4000 and lines[0] == "0000" and int(lines[-1]) > 7000
    assert len({int(b) - int(a) for a, b in pairwise(lines)}) == 1


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_gpt2_without_network_is_none_soon(variable, tmp_path, monkeypatch):
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there
    start = time.perf_counter()
    assert ours.gpt2_tokenizer() is None and time.perf_counter() - start < 30  # it must not wait for a network that is not there


def test_chat_is_rendered_as_transformers_does(tmp_path, corpus):
    byte_level_json(tmp_path, corpus[:50_000], BYTES, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], vocab_size=400)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        assert ours.render_chat(tokenizer, MESSAGES, prompt) == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    with pytest.raises(InputError, match="an empty turn"):
        ours.render_chat(tokenizer, [{"role": "user", "content": ""}])
    tokenizer.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == CHATML == ours.load_tokenizer(tmp_path / "again").chat_template
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(InputError, match="refuses"):  # the sandbox
        ours.render_chat(tokenizer, MESSAGES)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ours.render_chat(tokenizer, MESSAGES)
