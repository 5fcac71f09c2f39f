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
import re
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


def set_begin(backend, token):
    """Let every text start with a token."""
    special = [(token, backend.token_to_id(token))]
    backend.post_processor = processors.TemplateProcessing([token, "$A"], [token, "$A", "$B:1"], special)


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


def byte_level_bpe(name, vocab, merges, cut, special, added=()):
    """vocab: token -> id. merges: "a b", in order. cut: a pre-tokenizer. special, added: never merged."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut is LLAMA3))
    except Exception as e:  # the library has no narrower class
        why = f"its merges do not fit its vocabulary ({str(e).splitlines()[0]})"
        raise InputError(f"{name}: {why}: get the file again") from None
    if cut is QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return backend


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


def gpt2_vocabulary():
    """GPT-2's own, from tiktoken's cache or download; None where neither can be had, within seconds."""
    try:
        if not all(map(in_tiktoken_cache, GPT2_FILES)):  # tiktoken waits forever where there is no network
            urllib.request.urlopen(GPT2_URL + "vocab.bpe", timeout=3).close()
        merges, vocab = (tiktoken.load.read_file_cached(GPT2_URL + f, GPT2_FILES[f]) for f in GPT2_FILES)
    except (OSError, ValueError):  # no connection, or a file that isn't what it should be
        return None
    merges = merges.decode().split("\n")[1:-1]  # the first line is a version
    backend = byte_level_bpe("gpt2", json.loads(vocab), merges, GPT2, STOPS[:1])
    return backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), STOPS[0])


def in_tiktoken_cache(file):
    """Whether the whole file is there, under the name that tiktoken gives it: the SHA-1 of its address."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    path = Path(folder) / hashlib.sha1((GPT2_URL + file).encode()).hexdigest()
    if folder == "" or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_FILES[file]


# ----------------------------------------------------------------------------- SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, as GGUF numbers them


def sentencepiece_bpe(pieces, unknown, adds_space):
    """pieces: (text, score, kind) of each id. adds_space: one is put before the text.

    SentencePiece merges any two pieces whose union is a piece, that of the highest score first; the library
    wants a list of the pairs."""
    normal = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = []
    for text in sorted(normal, key=normal.get, reverse=True):
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        merges += [(left, right) for left, right in splits if left in normal and right in normal]
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True,
                                              byte_fallback="<0x00>" in vocab))
    add, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if adds_space else ([], [])
    backend.normalizer = normalizers.Sequence([*add, normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(to_text + strip)
    special = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    added = [text for text, _, kind in pieces if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return backend


def read_sentencepiece(name, model):
    """(backend, roles) of a tokenizer.model, given its bytes."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise InputError(f"{name} is not a SentencePiece model (or damaged): get the file again") from None
    pieces = [(sp.id_to_piece(i), sp.get_score(i), kind_of(sp, i)) for i in range(len(sp))]
    is_bpe = all(score.is_integer() for _, score, _ in pieces)  # minus a rank; a unigram's is a logarithm
    if not is_bpe or sp.normalize("ﬁ  a ").removeprefix("▁") != "ﬁ▁▁a▁":
        raise InputError(f"{name} is no plain BPE, but a unigram or one that changes characters: put a "
                         "tokenizer.json beside it (save_pretrained of transformers' AutoTokenizer)")
    ids = zip(ROLES, (sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()))
    roles = {role: sp.id_to_piece(i) for role, i in ids if i >= 0}
    return sentencepiece_bpe(pieces, roles["unk_token"], sp.normalize("a") == "▁a"), roles


def kind_of(sp, i):
    """The kind of a piece. What a user defined has the score 0.0; the first that was learned has -0.0."""
    if sp.is_control(i) or sp.is_unknown(i):
        return CONTROL
    if sp.is_byte(i) or sp.is_unused(i):
        return BYTE
    return USER_DEFINED if math.copysign(1, sp.get_score(i)) > 0 else NORMAL


TRAINING_CHARACTERS = 4_000_000


def learn_vocabulary(texts, vocab_size):
    """A SentencePiece BPE learned from texts, with fewer pieces where they have too few different words.

    Bytes stand for what it never saw: every text comes back as it was (but for "▁" itself)."""
    lines, coverage = sample_lines(texts), 0.9995
    while True:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                character_coverage=coverage, byte_fallback=True, normalization_rule_name="identity",
                add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                split_digits=True, user_defined_symbols=["\n"], max_sentence_length=1 << 24, num_threads=1,
                unk_id=0, eos_id=1, eos_piece=STOPS[0], bos_id=-1, pad_id=-1, minloglevel=2)
            return read_sentencepiece("the trained model", model.getvalue())
        except RuntimeError as e:
            largest = re.search(r"too high .*value <= (\d+)", str(e))
            if largest:
                vocab_size = int(largest[1])
            elif "smaller than required_chars" in str(e) and coverage > 0.98:
                coverage = max(0.98, coverage - 0.005)  # thousands of signs: the rarest become bytes
            else:
                why = str(e).split("] ")[-1] if lines else "it is empty"
                raise InputError(f"no tokenizer of {vocab_size} tokens fits this text: {why}") from None


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
    needed = "scores" if kind == "llama" else "merges"
    if get(needed) is None:
        raise InputError(f"{name} has no tokenizer.ggml.{needed}: get the file again")
    kinds = get("token_type", [NORMAL] * len(tokens))
    usual = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = [get(f"{role}_token_id", usual.get(role)) for role in ("bos", "eos", "unknown", "padding")]
    roles = {role: tokens[i] for role, i in zip(ROLES, ids) if i is not None and i < len(tokens)}
    if kind == "llama":
        pieces = list(zip(tokens, get("scores"), kinds))
        backend = sentencepiece_bpe(pieces, roles.get("unk_token"), get("add_space_prefix", True))
    else:
        special = [token for token, k in zip(tokens, kinds) if k == CONTROL]
        added = [token for token, k in zip(tokens, kinds) if k == USER_DEFINED]
        vocab = {token: i for i, token in enumerate(tokens)}
        backend = byte_level_bpe(name, vocab, get("merges"), cut, special, added)
    if get("add_bos_token", kind == "llama" or cut is LLAMA3) and "bos_token" in roles:
        set_begin(backend, roles["bos_token"])
    return backend, roles
