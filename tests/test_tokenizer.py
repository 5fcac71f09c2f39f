"""tokenizer.py against transformers, tokenizers and sentencepiece: the same ids, on real
text and on hard text, before and after saving."""
import io
import json
import os
import random
import shutil
import time
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from common import tokenizer as ours
from common.cli import InputError

DATA = Path(os.environ.get("DATA_DIR", "data"))
HARD = ("😀👩‍👩‍👧 naïve 中文字符 日本語 ١٢٣ ½² x\n\n   def f(x):\n\t\treturn x  12  345\r\n\r\n  a   b"
        "\u00a0c\u3000d\u2003 'll I'LL don't  \n \n  1\n   \t x_y <|endoftext|> </s> \0\x85\u200b"
        + " " * 50 + "z" + " " * 3)
EVERYTHING = "".join(f"{c} {c}a" for c in map(chr, range(0x20, 0x3000)) if c != "▁")
MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"},
            {"role": "user", "content": "And 3+3?"}]
CHATML = ("{% for m in messages %}\n"
          "  {% if not m['content'] %}{{ raise_exception('an empty turn') }}{% endif %}\n"
          "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()

def needs(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not there: set DATA_DIR to a folder that has it")
    return DATA / path

def from_gguf(fields):
    """As GGUFSource.tokenizer does."""
    with ours.blamed_on("the tokenizer of x"):
        return ours.Tokenizer("x", *ours.vocabulary("x", fields))

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
    shutil.copy(needs("tokenizers/llama2/tokenizer.model"), folder)
    return ours.load_tokenizer(folder)

@pytest.fixture(scope="module")
def trained(corpus):
    return ours.train_tokenizer([corpus])

def byte_level_json(path, text, pre, specials, alphabet=ALPHABET, size=400):
    """A byte-level BPE trained by the tokenizers package, with special tokens first in the id space."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=specials, show_progress=False, vocab_size=size,
                                             initial_alphabet=alphabet)
    made.train_from_iterator(text.splitlines(), trainer)
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    return made

# ----------------------------------------------------------------------------- the same ids

@pytest.mark.parametrize("kind", ["gpt2", "llama2", "trained"])
def test_saved_tokenizer_is_transformers_tokenizer(kind, request, tmp_path, corpus):
    tokenizer = request.getfixturevalue(kind)
    config = LlamaConfig() if kind == "llama2" else GPT2Config()  # AutoTokenizer looks at it as well
    config.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    again, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (corpus, HARD, EVERYTHING):
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert again.encode(text) == ids == tokenizer.encode_batch(["a", text])[1]
        assert tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size == again.vocab_size
    begin = [tokenizer.begin] * (tokenizer.begin is not None)
    assert theirs("hello").input_ids == begin + tokenizer.encode("hello")
    for name in ("begin", "end", "stop_ids", "roles"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert theirs.eos_token_id in tokenizer.stop_ids

def test_gpt2_is_tiktokens(gpt2, corpus, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tokenizers/tiktoken_cache"))
    theirs = tiktoken.get_encoding("gpt2")
    for text in (corpus, HARD, EVERYTHING):
        assert gpt2.encode(text) == theirs.encode_ordinary(text)

def test_llama2_is_sentencepieces(llama2, corpus):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(needs("tokenizers/llama2/tokenizer.model")))
    draw = random.Random(0)
    odd = ["".join(draw.choice(letters) for _ in range(draw.randrange(40)))
           for letters in (" a\n", " e", "ab ", "=- *", "0 1\n", "\t aeiou") for _ in range(500)]
    for text in (corpus, HARD, EVERYTHING, "▁", *odd, *(c * n for c in " =-a\n" for n in range(1, 100))):
        assert llama2.encode(text) == theirs.encode(text)

def test_learned_vocabulary_is_sentencepieces(corpus):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.split("\n")), model_writer=model, model_type="bpe", vocab_size=1000,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=["\n", "<x>"], minloglevel=2)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = ours.Tokenizer("x", *ours.vocabulary("x", ours.read_sentencepiece("x", model.getvalue())))
    for text in (corpus, HARD, EVERYTHING, "a<x>b\n<x>", " \n "):
        assert tokenizer.encode(text) == theirs.encode(text) and tokenizer.decode(theirs.encode(text)) == text

def test_special_ids(gpt2, llama2, trained):
    assert (gpt2.begin, gpt2.end, gpt2.stop_ids, gpt2.vocab_size) == (None, 50256, {50256}, 50257)
    assert (llama2.begin, llama2.end, llama2.stop_ids, llama2.vocab_size) == (1, 2, {2}, 32000)
    assert trained.begin is None and trained.stop_ids == {trained.end}
    assert gpt2.encode("a<|endoftext|>b", special=True) == [64, 50256, 65]
    assert 50256 not in gpt2.encode("a<|endoftext|>b") and gpt2.decode([64, 50256]) == "a<|endoftext|>"
    with pytest.raises(InputError, match="token 50257 is outside the vocabulary"):
        gpt2.decode([50257])

@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("alphabet", [ALPHABET, []], ids=["all bytes", "those of the text"])
def test_byte_level_bpe(cut, alphabet, tmp_path, corpus):
    """As a tokenizer.json, and as a GGUF has it."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    cutter = ours.GGUF_CUTS[cut]
    theirs = byte_level_json(tmp_path, corpus[:400_000], cutter, special, alphabet, 3000)
    tokenizer = ours.load_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {"model": "gpt2", "pre": cut, "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3),
              "merges": [" ".join(m) for m in model["merges"]], "eos_token_id": 0}
    other = from_gguf(fields)
    hard = [HARD.replace("<|endoftext|>", ""), EVERYTHING]
    for sample in (corpus[-300_000:], *hard) if alphabet else (corpus[:300_000],):
        ids = tokenizer.encode(sample)
        assert ids == theirs.encode(sample).ids
        if cut != "qwen2" or sample is not EVERYTHING:  # the model of Qwen2 sees text in the normal form NFC
            assert ids == other.encode(sample)
    if not alphabet:
        assert tokenizer.decode(tokenizer.encode("so\1 it\2 is")) == "so it is"
    marked = "<|im_start|>user\nhi<|im_end|>"
    for t in (tokenizer, other):
        assert t.encode(marked, special=True) == theirs.encode(marked).ids != t.encode(marked)
        assert t.end == 0 and t.stop_ids == {0, 2}

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TEMPLATE = processors.TemplateProcessing([BEGIN, "$A"], [BEGIN, "$A", "$B:1"], [(BEGIN, 0)])
LEVEL = processors.ByteLevel(trim_offsets=False)
ENDS = processors.TemplateProcessing(["$A", END], ["$A", "$B:1", END], [(END, 1)])
BOTH = processors.TemplateProcessing([BEGIN, "$A", END], None, [(BEGIN, 0), (END, 1)])

@pytest.mark.parametrize("processor, config", [
    (TEMPLATE, {}), (processors.Sequence([LEVEL, TEMPLATE]), {}), (LEVEL, {}), (None, {}),
    (None, {"add_bos_token": True}), (TEMPLATE, {"add_bos_token": False}), (LEVEL, {"add_bos_token": True}),
    (ENDS, {}), (BOTH, {}), (processors.Sequence([LEVEL, BOTH]), {"add_eos_token": False})])
def test_begin_is_transformers(processor, config, tmp_path, corpus):
    """A tokenizer.json's template counts (Llama 3 has it in a sequence), and no other setting."""
    made = byte_level_json(tmp_path, corpus[:20_000], BYTES, [BEGIN, END])
    if processor:
        made.post_processor = processor
    made.save(str(tmp_path / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ours.load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        ids = AutoTokenizer.from_pretrained(folder)("Hello").input_ids
        assert ours.load_tokenizer(folder).encode("Hello", around=True) == ids
    assert tokenizer.begin == (0 if ids[0] == 0 else None) and tokenizer.end == 1

@pytest.mark.parametrize("role", [BEGIN, "<|new|>"])
def test_a_role_makes_a_token_special(role, tmp_path, corpus):
    """Also one that is a plain token of the vocabulary, or in none: as transformers, which adds it."""
    byte_level_json(tmp_path, corpus[:20_000], BYTES, [BEGIN, END])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": role, "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (f"a{role}b {END}", f"{BEGIN} c"):
        assert tokenizer.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == theirs(text, split_special_tokens=True).input_ids
    assert tokenizer.vocab_size == len(theirs)

def test_qwen2_reads_text_in_its_normal_form(tmp_path, corpus):
    text, cut = corpus[:100_000] + "caf\u00e9 " * 50, ours.GGUF_CUTS["qwen2"]
    made = byte_level_json(tmp_path, text, cut, ["<|endoftext|>"])
    made.normalizer = normalizers.NFC()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("cafe\u0301 \u212b 123 I'LL", HARD.replace("<|endoftext|>", ""), EVERYTHING):
        assert tokenizer.encode(text, around=True) == theirs(text).input_ids
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")

def test_sentencepiece_without_begin(llama2, tmp_path):
    shutil.copy(DATA / "tokenizers/llama2/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert ours.load_tokenizer(tmp_path).begin is None and llama2.begin == 1

def test_sentencepiece_from_a_gguf(llama2):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(needs("tokenizers/llama2/tokenizer.model")))
    ids = range(len(sp))
    kinds = [2 if i == 0 else 3 if i < 3 else 6 if sp.is_byte(i) else 1 for i in ids]
    fields = {"model": "llama", "tokens": list(map(sp.id_to_piece, ids)),
              "scores": list(map(sp.get_score, ids)), "token_type": kinds,
              "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}

    def tokenizer(**more):
        return from_gguf(fields | more)
    rebuilt = tokenizer()
    for text in (HARD, EVERYTHING, "", " ", "a"):
        assert rebuilt.encode(text) == llama2.encode(text) and rebuilt.decode(rebuilt.encode(text)) == text
    assert (rebuilt.begin, rebuilt.end) == (1, 2) and tokenizer(add_bos_token=False).begin is None
    assert tokenizer(bos_token_id=2 ** 32 - 1).begin is None  # an id that stands for none
    del fields["bos_token_id"], fields["eos_token_id"], fields["unknown_token_id"]
    assert (tokenizer().begin, tokenizer().end, tokenizer().roles) == (1, 2, rebuilt.roles)  # as in llama.cpp
    some_bytes = tokenizer(tokens=["zzzq" if token == "<0x00>" else token for token in fields["tokens"]])
    assert some_bytes.encode("a ☃ 𐍈\n") == llama2.encode("a ☃ 𐍈\n")  # the other bytes are still there
    no_prefix = tokenizer(add_space_prefix=False)
    assert no_prefix.encode("a b") == [29874, 289]  # "a", "▁b"
    assert llama2.encode("a b") == [263, 289]       # "▁a", "▁b"
    assert no_prefix.decode([29874, 289]) == "a b" and no_prefix.decode([263]) == " a"
    with pytest.raises(InputError, match="lacks scores, merges or kinds"):
        tokenizer(scores=None)

def test_tokens_named_beside_the_vocabulary_alone_are_refused(llama2, tmp_path):
    """In tokenizer_config.json or added_tokens.json; those that are in it, too, are as there."""
    llama2.save(tmp_path / "json")
    (tmp_path / "model").mkdir()
    shutil.copy(DATA / "tokenizers/llama2/tokenizer.model", tmp_path / "model")
    there, new = {"2": {"content": "</s>", "special": True}}, {"32000": {"content": "<|im_end|>"}}
    for folder in (tmp_path / "json", tmp_path / "model"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": there}))
        assert ours.load_tokenizer(folder).stop_ids == {2}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": there | new}))
        with pytest.raises(InputError, match="'<.im_end.>' is token None in .* and 32000 beside it: write"):
            ours.load_tokenizer(folder)
        (folder / "tokenizer_config.json").unlink()
        (folder / "added_tokens.json").write_text('{"<s>": 32000}')
        with pytest.raises(InputError, match="'<s>' is token 1 in .* and 32000 beside it"):
            ours.load_tokenizer(folder)

@pytest.mark.parametrize("model", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}], ids=str)
def test_llama_tokenizer_as_transformers_has_it(llama2, model, settings, tmp_path):
    """Spaces after special tokens, where the class is LlamaTokenizer; a mistral's folder stays as it is."""
    llama2.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= settings | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<s>[INST] hi [/INST] you </s><s>[INST]", "  a b", "a\n b", "▁a", HARD, EVERYTHING):
        assert tokenizer.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids
    assert tokenizer.encode("Hello", around=True) == theirs("Hello").input_ids
    shutil.copy(needs("tokenizers/llama2/tokenizer.model"), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again, text = ours.load_tokenizer(tmp_path), "<s>[INST] hi [/INST] you </s><s>[INST]"
    assert again.encode(text, special=True) == tokenizer.encode(text, special=True)

def test_stream_gives_whole_characters(gpt2, llama2, trained):
    for tokenizer in (gpt2, llama2, trained):
        decoder = ours.Utf8Decoder("replace")
        parts = [decoder.decode(tokenizer.piece(i)) for i in tokenizer.encode(HARD)]
        assert "".join(parts).removeprefix(" ") == HARD and "" in parts

def test_lone_surrogates(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a?b"

# ----------------------------------------------------------------------------- what is refused

def test_unknown_kinds_are_refused(tmp_path, corpus):
    def refused(message, **content):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            ours.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        ours.load_tokenizer(tmp_path)
    refused("can't be read")
    byte_level_json(tmp_path, corpus[:20_000], BYTES, [])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    refused("can't be read", **content | {"decoder": None})
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    refused("neither byte-level BPE nor SentencePiece", **content | {"decoder": decoder})
    content["model"]["merges"].append(["q", "☃"])
    refused("can't be read .*out of vocabulary", **content)
    (tmp_path / "tokenizer_config.json").write_text('{"model": ')
    with pytest.raises(InputError, match="read as JSON"):
        ours.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="'somebpe'"):
        from_gguf({"model": "gpt2", "pre": "somebpe"})
    fields = {"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}
    for more, message in (({}, "the tokenizer of x can't be read .*out of vocabulary"),
                          ({"tokens": ["a", "a"]}, "twice"),
                          ({"tokens": [1]}, "can't be read"), ({"token_type": [1, 1]}, "lacks")):
        with pytest.raises(InputError, match=message):
            from_gguf(fields | more)

@pytest.mark.parametrize("settings", [dict(model_type="unigram"), dict(normalization_rule_name="nmt_nfkc")])
def test_sentencepiece_models_of_another_kind(settings, tmp_path, corpus):
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="tokenizer.model can't be read"):
        ours.load_tokenizer(tmp_path)
    model, settings = io.BytesIO(), {"model_type": "bpe", "normalization_rule_name": "identity", **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus[:50_000].split("\n")),
                                             model_writer=model, vocab_size=300, minloglevel=2, **settings)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match="tokenizer.model is no plain BPE"):
        ours.load_tokenizer(tmp_path)

def odd_files(draw, mutate, contents, count):
    """count times the files of a folder, name -> bytes, with a mutation: of a JSON's tree, or of bytes."""
    for n in range(count):
        files = {name: json.dumps(content).encode() for name, content in contents.items()}
        name = draw.choice(list(files))
        if n % 4:
            content = contents[name]
            for _ in range(draw.randrange(1, 3)):
                content = mutate(draw, content) if content else content
            files[name] = json.dumps(content).encode()
        else:
            raw = bytearray(files[name])
            at = draw.randrange(len(raw))
            raw[at:at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
            files[name] = bytes(raw)
        yield files

@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_damaged_files_are_read_right_or_refused(kind, mutate, tmp_path, corpus):
    """Thousands of small mutations: nothing but InputError; and what loads has transformers' ids."""
    if kind == "sentencepiece":
        ours.train_tokenizer([corpus[:5000]], 320).save(tmp_path)
    else:
        made = byte_level_json(tmp_path, corpus[:5000], BYTES, [BEGIN, END], size=290)
        made.post_processor = processors.Sequence([LEVEL, TEMPLATE])
        made.save(str(tmp_path / "tokenizer.json"))
    added = dict(content=BEGIN, special=True, lstrip=False, rstrip=False, normalized=False, single_word=False)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=CHATML, bos_token=BEGIN,
                  eos_token=added | {"content": END, "__type": "AddedToken"})
    if kind == "byte-level":
        config["added_tokens_decoder"] = {"0": added}
    contents = {"tokenizer.json": json.loads((tmp_path / "tokenizer.json").read_text()),
                "tokenizer_config.json": config}
    draw, loaded, compared = random.Random(1), 0, 0
    for n, files in enumerate(odd_files(draw, mutate, contents, 1200)):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        try:
            tokenizer = ours.load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode(HARD))
            ids = tokenizer.encode("It is <a> test.", around=True)
        except InputError:
            continue
        loaded += 1
        if n % 12 == 0:
            try:
                theirs = AutoTokenizer.from_pretrained(tmp_path)
                wanted = theirs("It is <a> test.").input_ids
            except Exception:  # stricter than we, in what we don't look at
                continue
            compared += 1
            assert ids == wanted, files
    assert loaded > 100 and compared > 10

# ----------------------------------------------------------------------------- training

def test_training(corpus, trained):
    start = time.perf_counter()
    again = ours.train_tokenizer([corpus, corpus])  # 2.2 MB
    assert time.perf_counter() - start < 60  # half a second alone on a core
    assert trained.vocab_size == again.vocab_size == 4096
    assert ours.train_tokenizer([corpus]).backend.to_str() == trained.backend.to_str()
    assert len(trained.encode(corpus)) < len(corpus) / 2.5
    assert trained.decode(trained.encode(HARD)) == HARD

def test_training_on_little_and_on_odd_text():
    small = ours.train_tokenizer(["the cat sat on the mat"])
    assert 256 < small.vocab_size < 400 and small.decode(small.encode(HARD)) == HARD
    # more signs than the vocabulary has room for
    signs = "".join(chr(0x4E00 + i) * (1 + 600_000 // (i + 1) ** 2) for i in range(6000))
    many = ours.train_tokenizer([signs[i:i + 50] for i in range(0, len(signs), 50)])
    assert many.vocab_size <= 4096 and many.decode(many.encode(signs)) == signs
    with pytest.raises(InputError, match="no tokenizer of 4096 tokens fits 0 lines"):
        ours.train_tokenizer([])
    with pytest.raises(InputError, match="no tokenizer of 10 tokens"):
        ours.train_tokenizer(["hello"], vocab_size=10)

def test_many_lines_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(ours, "TRAINING_CHARACTERS", 4000)
    lines = ours.sample_lines(f"{i:04}\n" for i in range(8000))
    assert sum(map(len, lines)) <= 4000 and lines[0] == "0000" and int(lines[-1]) > 7000
    assert len({int(b) - int(a) for a, b in pairwise(lines)}) == 1

def test_gpt2_without_network_is_none_soon(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there
    start = time.perf_counter()
    assert ours.gpt2_tokenizer() is None and time.perf_counter() - start < 30  # no waiting for a network

# ----------------------------------------------------------------------------- chat

def test_chat_is_rendered_as_transformers_does(tmp_path, corpus):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    byte_level_json(tmp_path, corpus[:50_000], BYTES, special, [])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config["chat_template"] = CHATML
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(tokenizer, MESSAGES, prompt) == wanted
    with pytest.raises(InputError, match="an empty turn"):
        ours.render_chat(tokenizer, [{"role": "user", "content": ""}])
    tokenizer.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == CHATML
    assert ours.load_tokenizer(tmp_path / "again").chat_template == CHATML
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(InputError, match="SecurityError"):
        ours.render_chat(tokenizer, MESSAGES)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ours.render_chat(tokenizer, MESSAGES)

SYSTEM = ("{%% for message in messages %%}{%% if loop.first and messages[0]['role'] != 'system' %%}"
          "{{ '<|im_start|>system\n%s<|im_end|>\n' }}{%% endif %%}")
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "smollm2": SYSTEM % "You are a helpful AI assistant named SmolLM, trained by Hugging Face" + TURN
             + PROMPT,
    "qwen2": SYSTEM % "You are a helpful assistant." + TURN + PROMPT,
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
              "'<|start_header_id|>' + message['role'] + "
              "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
              "%}{% set content = bos_token + content %}"
              "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
              "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
               "(loop.index0 % 2 == 0) %}"
               "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
               "}}{% endif %}"
               "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif "
               "message['role'] == 'assistant' %}"
               "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant "
               "roles are supported!') }}{% endif %}{% endfor %}",
    "like llama 3.1": """{{- bos_token }}
        {%- if not date_string is defined %}
            {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
            {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
        {%- endif %}
        {%- if messages[0]['role'] == 'system' %}
            {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
        {%- else %}{%- set system = "" %}{%- endif %}
        {%- if tools is not none %}{{- "Environment: ipython\n" }}{{- tools | tojson(indent=4) }}{%- endif %}
        {{- "Today Date: " + date_string + "\n\n" + system }}
        {%- for m in messages %}
            {%- if 'tool_calls' in m %}{%- break %}{%- endif %}
            {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
            {{- '<|eot_id|>' }}
        {%- endfor %}
        {%- if add_generation_prompt %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- endif %}""",
    "like smollm3": """
        {%- for message in messages %}
            {%- set content = message.content if message.content is string else "" %}
            {%- if message.role == "user" %}{{ "<|im_start|>user\n" + content + "<|im_end|>\n" }}
            {%- elif message.role == "assistant" %}{% generation %}
                {{- "<|im_start|>assistant\n<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
            {% endgeneration %}{%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{%- endif %}""",
    "like qwen3": """
        {%- if tools %}{{- '# Tools' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}{%- endif %}
        {%- set ns = namespace(last=messages|length - 1, multi=true) %}
        {%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
            {%- if ns.multi and message.role == "user" and message.content is string %}
                {%- set ns.multi = false %}{%- set ns.last = index %}
            {%- endif %}
        {%- endfor %}
        {%- for message in messages %}
            {%- if message.role == "assistant" and '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- else %}{%- set content = message.content %}{%- endif %}
            {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
            {%- if loop.index0 > ns.last and enable_thinking is defined %}{{- message | tojson }}{%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
            {%- if enable_thinking is defined and enable_thinking is false %}
                {{- '<think>\n\n</think>\n\n' }}
            {%- endif %}
        {%- endif %}"""}

@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_known_models(name, tmp_path, corpus):
    byte_level_json(tmp_path, corpus[:5000], BYTES, [BEGIN, END], [])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
              "chat_template": TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = ours.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    system, thought = {"role": "system", "content": " Be brief. "}, {"role": "assistant",
                                                                     "content": "<think>\n4</think>\n\n4 "}
    for messages in (MESSAGES, [system, *MESSAGES], [MESSAGES[0], thought, MESSAGES[2]], MESSAGES[:2],
                     MESSAGES[:1] * 2, [system]):
        for prompt in (True, False):
            try:
                wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except jinja2.TemplateError:
                with pytest.raises(InputError, match="this conversation can't be written"):
                    ours.render_chat(tokenizer, messages, prompt)
                continue
            assert ours.render_chat(tokenizer, messages, prompt) == wanted
            assert tokenizer.encode(wanted, special=True) == theirs(wanted,
                                                                    add_special_tokens=False).input_ids

@pytest.mark.parametrize("template, file", [
    ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}], None), ("x", CHATML)])
def test_where_a_chat_template_is_found(template, file, tmp_path, corpus):
    byte_level_json(tmp_path, corpus[:20_000], BYTES, [])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert ours.load_tokenizer(tmp_path).chat_template == CHATML
