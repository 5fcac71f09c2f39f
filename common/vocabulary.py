"""Vocabularies of the two kinds of tokenizers, each run by the library `tokenizers`.

Both start from small units (bytes, or characters) and merge the pair of neighbours that stands first in a
learned list, again and again, until no pair is in it. They differ in how text is cut before, and in spaces:

                    byte-level BPE                              SentencePiece
    models          GPT-2, Llama 3, Qwen2, SmolLM2              Llama 2, Mistral
    cut first       by a regular expression, into words         not at all
    a space is      the byte 0x20, at the front of a word       the character "▁", one added before the text
    anything else   every byte is a token                       bytes <0x00>..<0xFF> where no piece fits

A vocabulary is a pair (backend, roles): a tokenizers.Tokenizer, and the text of bos_token, eos_token, ....
"""
import hashlib
import io
import json
import math
import os
import tempfile
import urllib.request
from pathlib import Path

import sentencepiece
import tiktoken.load
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from common.cli import InputError

STOPS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")  # they end a text or a turn
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, as GGUF numbers them


def set_template(backend, begin, end=None):
    """Let every prompt start with a token, and end with one, where these are given."""
    around = [token for token in (begin, "$A", end) if token]
    special = [(token, backend.token_to_id(token)) for token in around if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)


def with_added(backend, tokens, kinds):
    """The backend, which leaves tokens of some kinds whole, whatever stands around them."""
    for names, add in ((UNKNOWN, CONTROL), backend.add_special_tokens), ((USER_DEFINED,), backend.add_tokens):
        add([AddedToken(text, normalized=False) for text, kind in zip(tokens, kinds) if kind in names])
    return backend


# ----------------------------------------------------------------------------- byte-level BPE

def cut_by(regex):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_only])


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
LLAMA3, QWEN2 = cut_by(WORDS), cut_by(WORDS.replace("{1,3}", ""))
GGUF_CUTS = {"default": GPT2, "gpt-2": GPT2, "olmo": GPT2,
             "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS,
             "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "smaug-bpe": LLAMA3, "dbrx": LLAMA3,
             "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}


def byte_level_bpe(vocab, merges, cut, tokens, kinds):
    """vocab: token -> id. merges: "a b", in order. cut: a pre-tokenizer."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut is LLAMA3))
    if cut is QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    return with_added(backend, tokens, kinds)


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


def gpt2_vocabulary():
    """GPT-2's own, from tiktoken's cache or download; None where neither can be had, within seconds."""
    try:
        merges, vocab = map(gpt2_file, GPT2_FILES)
    except (OSError, ValueError):  # no connection, or a file that isn't what it should be
        return None
    merges = merges.decode().split("\n")[1:-1]  # the first line is a version
    backend = byte_level_bpe(json.loads(vocab), merges, GPT2, STOPS[:1], [CONTROL])
    return backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), STOPS[0])


def gpt2_file(name):
    url, default = GPT2_URL + name, os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    if not Path(cache, hashlib.sha1(url.encode()).hexdigest()).is_file():
        urllib.request.urlopen(url, timeout=3).close()  # without a network tiktoken would wait forever
    return tiktoken.load.read_file_cached(url, GPT2_FILES[name])


# ----------------------------------------------------------------------------- SentencePiece


def sentencepiece_bpe(tokens, scores, kinds, unknown, adds_space):
    """The text, the score and the kind of each id. adds_space: one is put before the text.

    SentencePiece merges any two pieces whose union is a piece, that of the highest score first; the library
    wants a list of the pairs."""
    normal = {text: score for text, score, kind in zip(tokens, scores, kinds) if kind == NORMAL}
    merges = []
    for text in sorted(normal, key=normal.get, reverse=True):
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        merges += [(left, right) for left, right in splits if left in normal and right in normal]
    vocab = {text: i for i, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True,
                                              byte_fallback="<0x00>" in vocab))
    add, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if adds_space else ([], [])
    backend.normalizer = normalizers.Sequence([*add, normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(to_text + strip)
    return with_added(backend, tokens, kinds)


def read_sentencepiece(name, model):
    """(backend, roles) of a tokenizer.model, given its bytes."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(len(sp))
    tokens, scores = [sp.id_to_piece(i) for i in ids], [sp.get_score(i) for i in ids]
    is_bpe = all(score.is_integer() for score in scores)  # minus a rank; a unigram's is a logarithm
    if not is_bpe or sp.normalize("ﬁ  a ").removeprefix("▁") != "ﬁ▁▁a▁":
        raise InputError(f"{name} is no plain BPE, but a unigram or one that changes characters: put a "
                         "tokenizer.json beside it (save_pretrained of transformers' AutoTokenizer)")
    kinds = []
    for i, score in enumerate(scores):
        kind = NORMAL if math.copysign(1, score) < 0 else USER_DEFINED  # -0.0: the first that was learned
        kind = BYTE if sp.is_byte(i) or sp.is_unused(i) else kind
        kinds.append(CONTROL if sp.is_control(i) or sp.is_unknown(i) else kind)
    special = zip(ROLES, (sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()))
    roles = {role: tokens[i] for role, i in special if i >= 0}
    adds_space = sp.normalize("a") == "▁a"
    return sentencepiece_bpe(tokens, scores, kinds, roles.get("unk_token"), adds_space), roles


TRAINING_CHARACTERS = 4_000_000
COVERAGES = (0.9995, 0.9945, 0.9895, 0.9845, 0.98)  # of a text's characters; the others become bytes


def learn_vocabulary(texts, vocab_size):
    """A SentencePiece BPE learned from texts, with fewer pieces where they have too few different words.

    Bytes stand for what it never saw: every text comes back as it was (but for "▁" itself)."""
    lines = sample_lines(texts)
    for coverage in COVERAGES:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                hard_vocab_limit=False, character_coverage=coverage, byte_fallback=True,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, split_digits=True, user_defined_symbols=["\n"],
                max_sentence_length=1 << 24, num_threads=1, unk_id=0, eos_id=1, eos_piece=STOPS[0], bos_id=-1,
                pad_id=-1, minloglevel=2)
            return read_sentencepiece("the trained model", model.getvalue())
        except RuntimeError as e:  # thousands of signs: more than there are tokens
            why = str(e).split("] ")[-1] if lines else "it is empty"
    raise InputError(f"no tokenizer of {vocab_size} tokens fits this text: {why}")


def sample_lines(texts):
    """The lines of all texts, or, where they are many, every 2nd, 4th, 8th... of them."""
    lines, size, step = [], 0, 1
    for n, line in enumerate(line for text in texts for line in text.split("\n") if line):
        if n % step == 0:
            lines.append(line)
            size += len(line)
        if size > TRAINING_CHARACTERS:
            lines, step = lines[::2], 2 * step
            size = sum(map(len, lines))
    return lines


# ----------------------------------------------------------------------------- GGUF

def gguf_vocabulary(name, fields):
    """From a GGUF's metadata: a dict of its fields, "tokenizer.ggml.tokens" and so on."""
    def get(key, default=None):
        return fields.get(f"tokenizer.ggml.{key}", default)
    kind, cut, tokens = get("model"), GGUF_CUTS.get(get("pre", "default")), get("tokens", [])
    if kind != "llama" and (kind != "gpt2" or cut is None):
        raise InputError(f"{name}: its tokenizer is {kind!r} with {get('pre')!r}; known are llama, and gpt2 "
                         f"with {', '.join(GGUF_CUTS)}")
    kinds, order = get("token_type", [NORMAL] * len(tokens)), get("scores" if kind == "llama" else "merges")
    complete = order is not None and (kind == "gpt2" or len(order) == len(tokens))
    if not complete or not len(set(tokens)) == len(tokens) == len(kinds):
        raise InputError(f"{name} lacks scores, merges or kinds of tokens, or has one twice: get it again")
    usual = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = [get(f"{role}_token_id", usual.get(role)) for role in ("bos", "eos", "unknown", "padding")]
    roles = {role: tokens[i] for role, i in zip(ROLES, ids) if i is not None and 0 <= i < len(tokens)}
    if kind == "llama":
        unknown, adds_space = roles.get("unk_token"), get("add_space_prefix", True)
        backend = sentencepiece_bpe(tokens, order, kinds, unknown, adds_space)
    else:
        backend = byte_level_bpe({token: i for i, token in enumerate(tokens)}, order, cut, tokens, kinds)
    adds_begin = get("add_bos_token", kind == "llama" or cut is LLAMA3)
    set_template(backend, roles.get("bos_token") if adds_begin else None)
    return backend, roles
