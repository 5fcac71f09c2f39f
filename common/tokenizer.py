"""Text to token ids and back: the byte-level BPE of GPT-2 and SmolLM2, and the SentencePiece of Llama 2.

Both start from small units (bytes, or characters) and join the pair of neighbours that stands first in a learned list, again and
again until no pair is in the list. They differ in how the text is cut beforehand and how a space is written:

                    byte-level BPE (tiktoken)                   SentencePiece
    cut first       by a regular expression, into words         not at all
    a space is      the byte 0x20, at the front of a word       the character "▁", one added before the text
    anything else   every byte is a token                       bytes <0x00>..<0xFF> where no piece fits
    file            tokenizer.json                              tokenizer.model

    tokenizer = gpt2_tokenizer() or train_tokenizer(texts)      # without a network: learned from the corpus itself
    ids = tokenizer.encode("Hello world")
    tokenizer.save("out/model"); tokenizer = load_tokenizer("out/model")
"""
import codecs
import hashlib
import io
import json
import math
import os
import re
import socket
import struct
import tempfile
import threading
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import sentencepiece
import tiktoken

from common.cli import InputError, write_atomic

STOPS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")  # tokens that end a turn or a text wherever they exist
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """What the two kinds share. `pieces` gives the bytes of an id; `special` the id of a token that is not made from text, like
    <|im_end|>; `always` those of them that are recognized in any text; `roles` the text of bos_token, eos_token and so on."""

    def __init__(self, name, pieces, special, roles, add_begin=False, chat_template=None, always=()):
        self.pieces, self.special, self.always = pieces, special, frozenset(always)
        self.roles = {k: v for k, v in roles.items() if v in special}
        self.chat_template = chat_template
        self.vocab_size = max(pieces) + 1
        self.name = f"{name} ({self.library}, {self.vocab_size:,} tokens)"
        self.begin = special.get(self.roles.get("bos_token")) if add_begin else None
        eos = special.get(self.roles.get("eos_token"))
        self.end = next((special[t] for t in STOPS[:2] if t in special), eos)  # a chat model's eos ends a turn, not a text
        self.stop_ids = {special[t] for t in STOPS if t in special} | {i for i in (eos, self.end) if i is not None}

    def encode(self, text, special=False):
        """Ids of a text. special: tokens such as <|im_start|> written in it are themselves, and not the characters they are spelled with."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates have no bytes
        known = self.special if special else self.always
        longest_first = "|".join(re.escape(t) for t in sorted(known, key=len, reverse=True))
        parts = re.split(f"({longest_first})", text) if known else [text]  # plain, special, plain, ...
        return [i for n, part in enumerate(parts) if part for i in ([self.special[part]] if n % 2 else self.encode_plain(part))]

    def decode(self, ids):
        return b"".join(self.piece(i) for i in ids).decode("utf-8", "replace")

    def piece(self, i):
        if i not in self.pieces:
            raise InputError(f"token {i} is outside the vocabulary of {self.name}")
        return self.pieces[i]

    def stream(self):
        """An object whose feed(id) gives the text that this token completes: a character may be spread over several tokens."""
        return Stream(self)

    def save(self, folder):
        """Write the files that load_tokenizer and transformers' AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_model(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.roles, "add_bos_token": self.begin is not None,
                  "clean_up_tokenization_spaces": False, "added_tokens_decoder": {t.pop("id"): t for t in self.added_tokens(self.special)}}
        if self.chat_template:
            config["chat_template"] = self.chat_template
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def added_tokens(self, tokens):
        """What Hugging Face writes of tokens that are found in a text as they are."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return [{"id": i, "content": token, "special": token in self.special and token not in self.always, **flags}
                for token, i in sorted(tokens.items(), key=lambda item: item[1])]

    def json_file(self, model, found=None, **steps):
        """A Hugging Face tokenizer.json around its `model`. found: pieces that are found first, as the special ones are."""
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        after = {"type": "TemplateProcessing", "single": text, "pair": text + [{"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}
        if self.begin is not None:
            begin = self.roles["bos_token"]
            for kind in ("single", "pair"):
                after[kind] = [{"SpecialToken": {"id": begin, "type_id": 0}}, *after[kind]]
            after["special_tokens"] = {begin: {"id": begin, "ids": [self.begin], "tokens": [begin]}}
        whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": self.added_tokens(self.special | (found or {})),
                 "normalizer": None, "pre_tokenizer": None, "post_processor": after, "decoder": None, "model": model}
        return json.dumps(whole | steps, ensure_ascii=False)


class Stream:
    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token):
        return self.decoder.decode(self.tokenizer.piece(token))


# ----------------------------------------------------------------------------- byte-level BPE

# Vocabulary files spell each byte with a printable character: itself where it is one, else the next one from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTE_OF = {c: b for b, c in SPELLING.items()}

# How the text is cut: tokenizer.json's words for it, and one regular expression that cuts equally. Where single digits are cut out
# first, spaces before a digit are the end of their part, so the last space is not kept for the digit as it would be for a word.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_FIRST = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_FIRST_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?![^\s\p{N}])|\s"


def cut_by(regex):
    """A tokenizer.json's words for one regular expression of its own."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


LLAMA3 = cut_by(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GGUF_CUTS = {"gpt-2": BYTE_LEVEL, "default": BYTE_LEVEL, "olmo": BYTE_LEVEL, "smollm": DIGITS_FIRST, "starcoder": DIGITS_FIRST,
             "refact": DIGITS_FIRST, "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "smaug-bpe": LLAMA3, "dbrx": LLAMA3}


def cutting_regex(pre):
    """The regular expression that cuts as a tokenizer.json's pre_tokenizer does."""
    *first, last = pre["pretokenizers"] if pre and pre.get("type") == "Sequence" else [pre or {}]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            if not first:
                return GPT2_WORDS
            if len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits"):
                return DIGITS_FIRST_WORDS
        elif len(first) == 1 and first[0].get("behavior") == "Isolated" and not first[0].get("invert") and "Regex" in first[0]["pattern"]:
            return first[0]["pattern"]["Regex"]
    raise InputError(f"the tokenizer cuts text in a way this program doesn't know: pre_tokenizer {json.dumps(pre)[:200]}")


def last_join(token, ranks):
    """The two parts that BPE joins last when it builds this token; more than two if it never can."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        if min(found) == math.inf:
            break
        at = found.index(min(found))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


class ByteBPE(Tokenizer):
    """tiktoken joins the neighbours whose union has the lowest rank. `ranks` maps bytes to that rank, and `ids` a rank to the
    model's id, None for a byte that the model has no token for: SmolLM2 lacks a few control characters. Those are left out."""

    library = "tiktoken"

    def __init__(self, name, ranks, ids, cut, special, roles, pieces, **more):
        self.ranks, self.ids, self.cut = ranks, ids, cut
        self.encoding = tiktoken.Encoding(name, pat_str=cutting_regex(cut), mergeable_ranks=ranks, special_tokens={})
        super().__init__(name, {**pieces, **{i: token.encode() for token, i in special.items()}}, special, roles, **more)

    @classmethod
    def from_merges(cls, name, vocab, merges, cut, special, roles, whole_words=False, **more):
        """From the spelled vocabulary (token to id) and the list of pairs to join. A list of pairs and ranks of unions are the same thing
        only if each union is reached by a pair of the list, in the list's order: we check that, token by token. whole_words: a word that
        is a token needs no pair."""
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        ordinary = {t: spelled_bytes(t) for t in vocab if t not in special and set(t) <= BYTE_OF.keys()}
        ranks, ids = {bytes([b]): b for b in range(256)}, [vocab.get(SPELLING[b]) for b in range(256)]
        for token in [a + b for a, b in pairs] + (list(ordinary) if whole_words else []):
            if token not in ordinary:
                raise InputError(f"{name}: the merges make {token!r}, which is not in the vocabulary: the file is damaged, get it again")
            if ranks.setdefault(ordinary[token], len(ids)) == len(ids):
                ids.append(vocab[token])
        place, latest = {(ordinary.get(a), ordinary.get(b)): n for n, (a, b) in enumerate(pairs)}, -1
        for token, parts in ((token, last_join(token, ranks)) for token in ranks if len(token) > 1):
            if len(parts) > 2 and whole_words:
                continue
            if place.get(parts, -1) <= latest:
                raise InputError(f"{name}: BPE does not reach {token!r} by the merge listed for it, so tiktoken can't stand in for this list: "
                                 "encode with the tokenizer that made it")
            latest = place[parts]
        pieces = {i: ordinary.get(token, token.encode()) for token, i in vocab.items()}
        return cls(name, ranks, ids, cut, special, roles, pieces, **more)

    def encode_plain(self, text):
        return [i for i in map(self.ids.__getitem__, self.encoding.encode_ordinary(text)) if i is not None]

    def save_model(self, folder):
        special = set(self.special.values())
        vocab = {**self.special, **{spell(piece): i for i, piece in self.pieces.items() if i not in special}}
        joins = [last_join(token, self.ranks) for token in self.ranks if len(token) > 1]
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                 "byte_fallback": False, "ignore_merges": any(len(j) > 2 for j in joins), "vocab": vocab,
                 "merges": [f"{spell(j[0])} {spell(j[1])}" for j in joins if len(j) == 2]}
        write_atomic(folder / "tokenizer.json", self.json_file(model, pre_tokenizer=self.cut, decoder=BYTE_LEVEL))


def spell(token):
    return "".join(SPELLING[b] for b in token)


def spelled_bytes(word):
    return bytes(BYTE_OF[c] for c in word)


GPT2_HOST = "openaipublic.blob.core.windows.net"  # where tiktoken gets these two files, and their SHA-256
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


def gpt2_tokenizer():
    """GPT-2's own, from tiktoken's cache or its download; None where neither can be had (within seconds: tiktoken itself waits forever)."""
    if not (all(map(in_tiktoken_cache, GPT2_FILES)) or answers(GPT2_HOST)):
        return None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no connection after all, or a file that isn't what it should be
        return None
    ranks, roles = encoding._mergeable_ranks, dict.fromkeys(("bos_token", "eos_token", "unk_token"), STOPS[0])
    return ByteBPE("gpt2", ranks, range(len(ranks)), BYTE_LEVEL, dict(encoding._special_tokens), roles, {r: t for t, r in ranks.items()})


def in_tiktoken_cache(file):
    """Whether the file is there, whole, under the name that tiktoken gives it: the SHA-1 of its address."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    path = Path(folder) / hashlib.sha1(f"https://{GPT2_HOST}/gpt-2/encodings/main/{file}".encode()).hexdigest()
    return folder != "" and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_FILES[file]


def answers(host, seconds=3):
    """Whether a TCP connection to the host (or to the proxy on the way) comes about. In a thread: looking up a name has no timeout."""
    proxy = urlsplit(getproxies().get("https", ""))
    target, found = (proxy.hostname, proxy.port or 443) if proxy.hostname else (host, 443), []

    def probe():
        try:
            socket.create_connection(target, seconds).close()
            found.append(True)
        except OSError:
            found.clear()
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found)


# ----------------------------------------------------------------------------- SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in tokenizer.model and in GGUF


class SentencePiece(Tokenizer):
    """`model` is the content of a tokenizer.model. `extra`: tokens that were added to it later, with their ids."""
    library = "SentencePiece"

    def __init__(self, name, model, roles=None, extra=None, **more):
        self.model = model
        try:
            self.sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError(f"{name} is not a SentencePiece model (or a damaged one): get the file again") from None
        words = [sp.id_to_piece(i) for i in range(len(sp))]
        special = {p: i for i, p in enumerate(words) if sp.is_control(i) or sp.is_unknown(i)} | (extra or {})
        own = {role: words[i] for role, i in zip(ROLES, (sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id())) if i >= 0}
        pieces = {i: bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode() for i, p in enumerate(words)}
        super().__init__(name, pieces | {i: t.encode() for t, i in special.items()}, special, own | (roles or {}), **more)
        self.prefix = sp.normalize("a") == "▁a"  # a space is added before the text, and taken away again

    def encode_plain(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        text = super().decode(ids)
        return text[1:] if self.prefix and text.startswith(" ") else text

    def save_model(self, folder):
        """tokenizer.model, and the same as a tokenizer.json, which transformers reads without the protobuf package."""
        (folder / "tokenizer.model").write_bytes(self.model)
        pieces = read_pieces(self.model)
        keeps_characters = self.sp.normalize("ﬁ  a ").removeprefix("▁") == "ﬁ▁▁a▁"
        if keeps_characters and all(score == int(score) for _, score, _ in pieces):  # BPE's scores are minus a rank, a unigram's are logarithms
            own = [i for i, (_, _, kind) in enumerate(pieces) if kind == USER_DEFINED]
            write_atomic(folder / "tokenizer.json", self.json_file(bpe_of(pieces), {pieces[i][0]: i for i in own}, **self.json_steps()))

    def json_steps(self):
        to_mark, to_space = ({"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in (" ▁", "▁ "))
        prepend, strip = [{"type": "Prepend", "prepend": "▁"}], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        before = prepend * self.prefix + [to_mark]
        after = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}] + strip * self.prefix
        return {"normalizer": {"type": "Sequence", "normalizers": before}, "decoder": {"type": "Sequence", "decoders": after}}


def bpe_of(pieces):
    """A tokenizer.json's BPE: SentencePiece joins any two pieces whose union is a piece, that of the highest score first."""
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    joinable = {piece for piece, _, kind in pieces if kind == NORMAL}
    ranked = sorted((p for p in pieces if p[2] == NORMAL), key=lambda p: -p[1])
    merges = [f"{p[:k]} {p[k:]}" for p, _, _ in ranked for k in range(1, len(p)) if p[:k] in joinable and p[k:] in joinable]
    unknown = next(p for p, _, kind in pieces if kind == UNKNOWN)
    return {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for _, _, kind in pieces), "ignore_merges": False, "vocab": ids, "merges": merges}


# A tokenizer.model is a protobuf message: fields, each a key (number * 8 + type) and a value. These few lines read and write them, so that
# the protobuf package is not needed. Numbers as in sentencepiece_model.proto: 1 a piece, 2 the training's settings, 3 the normalizer's.

def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, value):
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def fields(message):
    """The (number, value) of a message's fields: integers, 4 or 8 raw bytes, or bytes."""
    at, end = 0, len(message)

    def number():
        nonlocal at
        n = shift = 0
        while True:
            n, shift, at = n | (message[at] & 127) << shift, shift + 7, at + 1
            if message[at - 1] < 128:
                return n
    while at < end:
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or number()
            at += size
            yield key >> 3, message[at - size:at]


def read_pieces(model):
    """[(piece, score, kind)] of a tokenizer.model."""
    pieces = [dict(fields(value)) for number, value in fields(model) if number == 1]
    return [(p[1].decode(), struct.unpack("<f", p.get(2, bytes(4)))[0], p.get(3, NORMAL)) for p in pieces]


def write_model(pieces, prefix, ids):
    """A tokenizer.model from [(piece, score, kind)]; ids of (unknown, begin, end, padding), None for none."""
    body = b"".join(field(1, field(1, p.encode()) + field(2, float(score)) + field(3, kind)) for p, score, kind in pieces)
    numbers = b"".join(field(40 + n, 2 ** 64 - 1 if i is None else i) for n, i in enumerate(ids))  # -1
    trainer = field(3, 2) + field(35, int(any(kind == BYTE for _, _, kind in pieces))) + numbers  # 2: a BPE
    normalizer = field(1, b"identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1)  # extra spaces stay, a space is written as ▁
    return body + field(2, trainer) + field(3, normalizer)


TRAINING_CHARACTERS = 4_000_000


def train_tokenizer(texts, vocab_size=4096):
    """A SentencePiece BPE learned from texts. Bytes stand for what it never saw, so every text comes back as it was (but for "▁" itself)."""
    lines, coverage = sample_lines(texts), 0.9995
    while True:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, character_coverage=coverage,
                byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, split_digits=True, user_defined_symbols=["\n"], max_sentence_length=1 << 24,
                unk_id=0, eos_id=1, eos_piece=STOPS[0], bos_id=-1, pad_id=-1, num_threads=1, minloglevel=2)
            return SentencePiece("trained on this corpus", model.getvalue())
        except RuntimeError as e:
            largest = re.search(r"too high .*value <= (\d+)", str(e))
            if largest:  # a small corpus has fewer pieces in it
                vocab_size = int(largest[1])
            elif "smaller than required_chars" in str(e) and coverage > 0.98:  # a script of thousands of signs: the rarest become bytes
                coverage = max(0.98, coverage - 0.005)
            else:
                why = str(e).split("] ")[-1] if lines else "it is empty"
                raise InputError(f"no tokenizer of {vocab_size} tokens can be trained on this text: {why}") from None


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


# ----------------------------------------------------------------------------- reading

def load_tokenizer(folder):
    """The tokenizer in a model's folder."""
    folder = Path(folder)
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    roles = {role: text_of(config[role]) for role in ROLES if config.get(role)}
    template, add_begin = chat_template(folder, config), config.get("add_bos_token")
    name = folder.resolve().name
    if (folder / "tokenizer.model").is_file():
        added = config.get("added_tokens_decoder", {})
        return SentencePiece(f"{name}/tokenizer.model", (folder / "tokenizer.model").read_bytes(), roles, {t["content"]: int(i) for i, t in added.items()},
                             add_begin=add_begin is not False, chat_template=template,
                             always=[t["content"] for t in added.values() if not t.get("special", True)])
    if (folder / "tokenizer.json").is_file():
        return from_json(f"{name}/tokenizer.json", read_json(folder / "tokenizer.json"), roles, add_begin, template)
    raise InputError(f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json is there; copy the one that the model was trained with")


def read_json(path):
    """The object in a JSON file, {} where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}): get the file again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object, but a {type(content).__name__}: get the file again")
    return content


def text_of(token):
    return token["content"] if isinstance(token, dict) else token


def chat_template(folder, config):
    """From chat_template.jinja or tokenizer_config.json, where it may be one of several with names."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    return next((t["template"] for t in template if t["name"] == "default"), None) if isinstance(template, list) else template


def from_json(name, content, roles=None, add_begin=None, chat_template=None):
    """From a tokenizer.json of byte-level BPE."""
    model = content.get("model", {})
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys() or model.get("byte_fallback") or content.get("normalizer"):
        raise InputError(f"{name} is not a byte-level BPE (model {model.get('type')}, byte_fallback {model.get('byte_fallback')}, "
                         f"normalizer {content.get('normalizer')}): put the model's tokenizer.model beside it")
    added = {t["content"]: t for t in content.get("added_tokens", [])}
    special = {token: t["id"] for token, t in added.items()}
    before = [s["SpecialToken"]["id"] for s in (content.get("post_processor") or {}).get("single", []) if "SpecialToken" in s][:1]
    roles = {"eos_token": STOPS[0], **({"bos_token": before[0]} if before else {}), **(roles or {})}
    return ByteBPE.from_merges(name, model["vocab"], model["merges"], content.get("pre_tokenizer"), special, roles, model.get("ignore_merges", False),
                               add_begin=bool(before or add_begin), chat_template=chat_template, always=[t for t in added if not added[t]["special"]])


def from_gguf(name, fields):
    """From a GGUF's metadata: a dict of its fields, "tokenizer.ggml.tokens" and so on."""
    def get(key, default=None):
        return fields.get(f"tokenizer.ggml.{key}", default)
    tokens = get("tokens", [])
    kinds, at = get("token_type", [NORMAL] * len(tokens)), [get(f"{role}_token_id") for role in ("bos", "eos", "unknown", "padding")]
    roles = {role: tokens[i] for role, i in zip(ROLES, at) if i is not None}
    template = fields.get("tokenizer.chat_template")
    if get("model") == "llama":
        model = write_model(list(zip(tokens, get("scores"), kinds)), get("add_space_prefix", True), (at[2], at[0], at[1], at[3]))
        return SentencePiece(name, model, roles, add_begin=get("add_bos_token", True), chat_template=template)
    cut = GGUF_CUTS.get(get("pre", "default"))
    if get("model") != "gpt2" or cut is None:
        raise InputError(f"{name}: its tokenizer is {get('model')!r} with {get('pre')!r}; known are llama, and gpt2 with {', '.join(GGUF_CUTS)}")
    ids = {token: i for i, token in enumerate(tokens)}
    special = {token: i for token, i in ids.items() if kinds[i] in (CONTROL, USER_DEFINED)}
    llama3 = cut is LLAMA3
    return ByteBPE.from_merges(name, ids, get("merges"), cut, special, roles, llama3, add_begin=get("add_bos_token", llama3), chat_template=template,
                               always=[token for token, i in special.items() if kinds[i] == USER_DEFINED])


# ----------------------------------------------------------------------------- chat

def render_chat(tokenizer, messages, add_generation_prompt=True):
    """The text of a conversation, [{"role": "user", "content": "..."}, ...], as the model's own template writes it. Encode it with special=True.

    A template comes with the model, from anyone: it runs in jinja2's sandbox."""
    import jinja2
    import jinja2.sandbox
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name} has no chat template: the model was not trained to chat; leave out --chat")

    def raise_exception(message):
        raise jinja2.TemplateError(message)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda style: datetime.now().strftime(style))
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokenizer.roles)
    except jinja2.TemplateError as e:
        raise InputError(f"the chat template of {tokenizer.name} refuses this conversation: {e}") from None
