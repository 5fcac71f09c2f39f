"""Text to token ids and back, one token at a time if need be; chats; and where vocabularies come from.

    tokenizer = gpt2_tokenizer() or train_tokenizer(texts)  # without a network: learned from the corpus
    tokenizer.save("out/model")                             # transformers' AutoTokenizer reads it
    ids = load_tokenizer("out/model").encode("Hello world")

There are two kinds, each run by the library `tokenizers`. Both start from small units (bytes, or characters)
and merge the pair of neighbours that stands first in a learned list, again and again, until no pair is in it.
They differ in how text is cut before, and in spaces:

                    byte-level BPE                              SentencePiece
    models          GPT-2, Llama 3, Qwen2, SmolLM2              Llama 2, Mistral
    cut first       by a regular expression, into words         not at all
    a space is      the byte 0x20, at the front of a word       the character "▁", one added before the text
    anything else   every byte is a token                       bytes <0x00>..<0xFF> where no piece fits
"""
import codecs
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import tempfile
import urllib.request
from datetime import datetime
from pathlib import Path

import jinja2.sandbox
import sentencepiece
import tiktoken.load
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from common.cli import InputError, refuse, write_atomic

STOPS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")  # they end a text or a turn
ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id",  # with GGUF's names of their ids
         "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, as GGUF numbers them
LLAMA_FIELDS = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_bos_token=True,
                    add_space_prefix=True)  # of a GGUF's "llama" that does not say
TRAINING_CHARACTERS = 4_000_000  # of a text, from which a tokenizer is trained, at most
# Byte-level vocabularies spell these bytes as they are, and the others with characters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
Utf8Decoder = codecs.getincrementaldecoder("utf-8")  # of the bytes of tokens: a character may take several

class Tokenizer:
    """A named vocabulary. backend: a tokenizers.Tokenizer; roles: the text of bos_token, eos_token and so on.

    begin: the id that starts every text, or None. end: the one that ends it. stop_ids: all that end one."""

    def __init__(self, name, backend, roles, chat_template=None):
        self.backend, self.chat_template = backend, chat_template
        ids = backend.get_vocab()
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.name = f"{name} ({self.vocab_size:,} tokens)"
        start = backend.encode("a")
        self.begin = start.ids[0] if start.ids and start.special_tokens_mask[0] else None
        roles = {"eos_token": STOPS[0], **roles}
        self.roles = {role: token for role, token in roles.items() if token in ids}
        text_ends = [*STOPS[:2], self.roles.get("eos_token")]  # a chat model's eos ends a turn, not a text
        self.end = next((ids[token] for token in text_ends if token in ids), None)
        self.stop_ids = {ids[token] for token in (*STOPS, *text_ends) if token in ids}
        decode = backend.decoder.decode
        self.byte_level, self.adds_space = decode(["Ġ"]) == " ", decode(["▁a"]) == "a"
        refuse(not self.byte_level and decode(["a", "▁b"]) != "a b", f"{name} is neither byte-level BPE nor "
               f"SentencePiece ({backend.decoder}): give a model with one of these")

    def encode(self, text, special=False, around=False):
        """The ids of a text. special: "<|im_start|>" in it is that token, as chat templates mean it, and no
        ten characters. around: with the tokens that belong around every prompt, as a rule a BOS."""
        self.backend.encode_special_tokens = not special
        return self.backend.encode(valid(text), add_special_tokens=around).ids

    def encode_batch(self, texts):
        """The ids of each text, on all cores."""
        self.backend.encode_special_tokens = True
        encoded = self.backend.encode_batch_fast([valid(text) for text in texts], add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids):
        text = b"".join(map(self.piece, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space else text

    def piece(self, i):
        """The bytes of one token: not always whole characters."""
        token = self.backend.id_to_token(i)
        refuse(token is None, f"token {i} is outside the vocabulary of {self.name}")
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in token) if BYTE_OF.keys() >= set(token) else token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.roles | ({"chat_template": self.chat_template} if self.chat_template else {})
        write_atomic(folder / "tokenizer.json", self.backend.to_str())
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

def valid(text):
    """Lone surrogates have no bytes: they become question marks."""
    return text.encode("utf-8", "replace").decode()

# ----------------------------------------------------------------------------- byte-level BPE

def cut_by(regex):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_only])

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
LLAMA3, QWEN2 = cut_by(WORDS), cut_by(WORDS.replace("{1,3}", ""))
GGUF_CUTS = {"default": GPT2, "gpt-2": GPT2, "smollm": DIGITS, "llama-bpe": LLAMA3, "qwen2": QWEN2,
             "deepseek-r1-qwen": QWEN2}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {GPT2_URL + "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              GPT2_URL + "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}

def gpt2_tokenizer():
    """GPT-2's own, from tiktoken's cache or download; None where neither can be had, within seconds."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache"))
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", default))
    try:
        if not all((cache / hashlib.sha1(url.encode()).hexdigest()).is_file() for url in GPT2_FILES):
            urllib.request.urlopen(next(iter(GPT2_FILES)), timeout=3).close()  # tiktoken would wait long
        merges, ids = (tiktoken.load.read_file_cached(url, sha256) for url, sha256 in GPT2_FILES.items())
    except (OSError, ValueError):  # no connection, or a file that isn't what it should be
        return None
    merges, ids = merges.decode().split("\n")[1:-1], json.loads(ids)  # the first line is a version
    tokens, kinds = sorted(ids, key=ids.get), [NORMAL] * (len(ids) - 1) + [CONTROL]
    backend, _ = vocabulary("gpt2", dict(model="gpt2", tokens=tokens, token_type=kinds, merges=merges))
    return Tokenizer("gpt2", backend, dict.fromkeys(["bos_token", "eos_token", "unk_token"], STOPS[0]))

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
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    add, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if adds_space else ([], [])
    backend.normalizer = normalizers.Sequence([*add, normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(to_text + strip)
    return backend

def read_sentencepiece(name, model):
    """The vocabulary in the bytes of a tokenizer.model, in GGUF's fields."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = list(range(len(sp)))
    tokens, scores, kinds = sp.id_to_piece(ids), sp.get_score(ids), []
    is_bpe = all(score.is_integer() for score in scores)  # minus a rank; a unigram's is a logarithm
    refuse(not is_bpe or sp.normalize("ﬁ  a ").removeprefix("▁") != "ﬁ▁▁a▁", f"{name} is no plain BPE, but a "
           "unigram or one that changes characters: put a tokenizer.json beside it (save_pretrained of "
           "transformers' AutoTokenizer)")
    for i, score in enumerate(scores):
        kind = NORMAL if math.copysign(1, score) < 0 else USER_DEFINED  # -0.0: the first that was learned
        kind = BYTE if sp.is_byte(i) or sp.is_unused(i) else kind
        kinds.append(CONTROL if sp.is_control(i) or sp.is_unknown(i) else kind)
    return dict(model="llama", tokens=tokens, scores=scores, token_type=kinds, bos_token_id=sp.bos_id(),
                eos_token_id=sp.eos_id(), unknown_token_id=sp.unk_id(), padding_token_id=sp.pad_id(),
                add_space_prefix=sp.normalize("a") == "▁a")

def train_tokenizer(texts, vocab_size=4096, coverage=0.9995):
    """A SentencePiece BPE learned from texts, with fewer pieces where they have too few different words.

    Bytes stand for what it never saw: every text comes back as it was (but for "▁" itself). coverage: of the
    text's characters; less where that are thousands of signs, more than there are tokens."""
    lines, model = sample_lines(texts), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, character_coverage=coverage, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], max_sentence_length=1 << 24,
            num_threads=1, unk_id=0, eos_id=1, eos_piece=STOPS[0], bos_id=-1, pad_id=-1, minloglevel=2)
    except RuntimeError:
        refuse(coverage < 0.98, f"no tokenizer of {vocab_size} tokens fits {len(lines)} lines: add text")
        return train_tokenizer(lines, vocab_size, coverage - 0.005)
    fields = read_sentencepiece("the trained model", model.getvalue())
    return Tokenizer("trained on this corpus", *vocabulary("it", fields))

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

# ----------------------------------------------------------------------------- files of others

@contextlib.contextmanager
def blamed_on(what, done="read", remedy="get it again"):
    """Whatever goes wrong with what others made is one line: these libraries have no class in common."""
    try:
        yield
    except (InputError, KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    except BaseException as e:  # the library tokenizers has no narrower class for its panics
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{what} can't be {done} ({why[:200]}): {remedy}") from None

def parse_json(text, where):
    with blamed_on(where, "read as JSON", "mend it, or get it again"):
        return json.loads(text)

def read_json(path):
    """The object in a JSON file, {} where there is no file."""
    content = parse_json(path.read_bytes(), path) if path.is_file() else {}
    refuse(not isinstance(content, dict), f"{path} holds no JSON object: get the file again")
    return content

def vocabulary(name, fields):
    """(backend, roles) of a GGUF's fields "tokens", "scores", "merges" and so on."""
    is_llama = fields.get("model") == "llama"
    get = (LLAMA_FIELDS | fields if is_llama else fields).get
    cut = GGUF_CUTS.get(get("pre", "default"))
    refuse(not is_llama and (get("model") != "gpt2" or cut is None), f"{name}: its tokenizer is "
           f"{get('model')!r} with {get('pre')!r}; known are llama, and gpt2 with {', '.join(GGUF_CUTS)}")
    tokens, order = get("tokens", []), get("scores" if is_llama else "merges") or []
    kinds = get("token_type", [NORMAL] * len(tokens))
    lengths = {len(tokens), len(set(tokens)), len(kinds), len(order if is_llama else tokens)}
    refuse(not order or len(lengths) > 1,
           f"{name} lacks scores, merges or kinds of tokens, or has one twice: get it again")
    roles = {role: tokens[get(key)] for role, key in ROLES.items() if 0 <= get(key, -1) < len(tokens)}
    if is_llama:
        backend = sentencepiece_bpe(tokens, order, kinds, roles.get("unk_token"), get("add_space_prefix"))
    else:
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(pair.split(" ")) for pair in order]
        backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut is LLAMA3))
        backend.normalizer = normalizers.NFC() if cut is QWEN2 else None
        backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=kind != USER_DEFINED, normalized=False)
                        for text, kind in zip(tokens, kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)])
    begin = roles.get("bos_token") if get("add_bos_token", cut is LLAMA3) else None
    end = roles.get("eos_token") if get("add_eos_token") else None
    special = [(token, backend.token_to_id(token)) for token in (begin, end) if token]
    if special:
        around = [token for token in (begin, "$A", end) if token]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return backend, roles

def load_tokenizer(folder):
    """The tokenizer in a model's folder, as transformers has it: tokenizer.json, or else tokenizer.model."""
    folder = Path(folder)
    file = next((folder / f for f in ("tokenizer.json", "tokenizer.model") if (folder / f).is_file()), None)
    refuse(file is None, f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there; "
           "copy the one that the model was trained with")
    with blamed_on(file):
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        roles = {role: config[role] for role in ROLES if config.get(role)}
        roles = {role: t["content"] if isinstance(t, dict) else t for role, t in roles.items()}
        if file.suffix == ".json":
            backend = tokenizers.Tokenizer.from_file(str(file))
            backend.no_padding()
            backend.no_truncation()
        else:  # add_bos_token and add_eos_token are in config
            backend, own_roles = vocabulary(file, config | read_sentencepiece(file, file.read_bytes()))
            roles = own_roles | roles
        is_llama = read_json(folder / "config.json").get("model_type", "llama") == "llama"
        class_is_llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        if is_llama and class_is_llama and backend.token_to_id("▁") is not None:
            spaced = "always" if config.get("legacy") else "first"  # of the parts between special tokens
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", spaced, split=False)
        beside = {token["content"]: i for i, token in config.get("added_tokens_decoder", {}).items()}
        for token, i in (read_json(folder / "added_tokens.json") | beside).items():
            found = backend.token_to_id(token)
            refuse(found != int(i), f"{token!r} is token {found} in {file} and {i} beside it: write a "
                   "tokenizer.json with save_pretrained of transformers' AutoTokenizer")
        there = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([token for token in roles.values() if token not in there])
        template, name = config.get("chat_template"), f"{folder.resolve().name}/{file.name}"
        if isinstance(template, list):  # several, with names
            template = {t["name"]: t["template"] for t in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return Tokenizer(name, backend, roles, template)

def render_chat(tokenizer, messages, add_generation_prompt=True):
    """The text of a conversation, [{"role": "user", "content": "..."}, ...], by the model's own template.

    It is to be encoded with special=True. A template may come from anyone: it runs in jinja2's sandbox."""
    refuse(not tokenizer.chat_template, f"{tokenizer.name} has no chat template, it was not made to chat")

    def raise_exception(message):
        raise jinja2.TemplateError(message)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    # {% generation %} marks what a model writes, for training by transformers: it is made a comment
    template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", tokenizer.chat_template)
    given = dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    with blamed_on("this conversation", f"written by the chat template of {tokenizer.name}", "change it"):
        return environment.from_string(template).render(**given, **tokenizer.roles)
