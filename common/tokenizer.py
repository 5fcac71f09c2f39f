"""Text to token ids and back, one token at a time if need be; chats; what lies in a model's folder.

    tokenizer = gpt2_tokenizer() or train_tokenizer(texts)  # without a network: learned from the corpus
    tokenizer.save("out/model")                             # transformers' AutoTokenizer reads it
    ids = load_tokenizer("out/model").encode("Hello world")

The two algorithms and where their vocabularies come from: common/vocabulary.py.
"""
import codecs
import contextlib
import functools
import json
import re
from datetime import datetime
from pathlib import Path

import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace

from common import vocabulary
from common.cli import InputError, refuse, write_atomic
from common.vocabulary import ROLES, STOPS

# Byte-level vocabularies spell these bytes as they are, and the others with characters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}


class Tokenizer:
    """A named vocabulary. backend: a tokenizers.Tokenizer; roles: the text of bos_token, eos_token and so on.

    begin: the id that starts every text, or None. end: the one that ends it. stop_ids: all that end one."""

    def __init__(self, name, backend, roles, chat_template=None):
        self.backend, self.chat_template = backend, chat_template
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.name = f"{name} ({self.vocab_size:,} tokens)"
        start = backend.encode("a")
        self.begin = start.ids[0] if start.ids and start.special_tokens_mask[0] else None
        ids = {token: backend.token_to_id(token) for token in (*STOPS, *roles.values())}
        known = {token: i for token, i in ids.items() if i is not None}
        roles = {"eos_token": STOPS[0], **roles}
        self.roles = {role: token for role, token in roles.items() if token in known}
        text_ends = [*STOPS[:2], self.roles.get("eos_token")]  # a chat model's eos ends a turn, not a text
        self.end = next((known[token] for token in text_ends if token in known), None)
        self.stop_ids = {known[token] for token in (*STOPS, *text_ends) if token in known}
        decode = backend.decoder.decode if backend.decoder else "".join
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

    def stream(self):
        """An object whose feed(id) gives the text that a token completes: a character may take several."""
        return Stream(self)

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.roles
        if self.chat_template:
            config["chat_template"] = self.chat_template
        write_atomic(folder / "tokenizer.json", self.backend.to_str())
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


class Stream:
    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token):
        return self.decoder.decode(self.tokenizer.piece(token))


def valid(text):
    """Lone surrogates have no bytes: they become question marks."""
    return text.encode("utf-8", "replace").decode()


# ----------------------------------------------------------------------------- where they come from

def gpt2_tokenizer():
    """GPT-2's own; None where it is not on this machine and can't be downloaded."""
    found = vocabulary.gpt2_vocabulary()
    return found and Tokenizer("gpt2", *found)


def train_tokenizer(texts, vocab_size=4096):
    """A SentencePiece BPE learned from texts, with fewer pieces where they have too few different words."""
    return Tokenizer("trained on this corpus", *vocabulary.learn_vocabulary(texts, vocab_size))


def from_gguf(name, fields):
    """From a GGUF's metadata: a dict of its fields, "tokenizer.ggml.tokens" and so on."""
    with blamed_on(f"the tokenizer of {name}"):
        found = vocabulary.gguf_vocabulary(name, fields)
        return Tokenizer(name, *found, fields.get("tokenizer.chat_template"))


def load_tokenizer(folder):
    """The tokenizer in a model's folder, as transformers has it: tokenizer.json, or else tokenizer.model."""
    folder = Path(folder)
    file = next((folder / f for f in ("tokenizer.json", "tokenizer.model") if (folder / f).is_file()), None)
    refuse(file is None, f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there; "
           "copy the one that the model was trained with")
    with blamed_on(file):
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        roles = {role: text_of(config[role]) for role in ROLES if config.get(role)}
        if file.suffix == ".json":
            backend = tokenizers.Tokenizer.from_file(str(file))
            backend.no_padding()
            backend.no_truncation()
        else:
            backend, own_roles = vocabulary.read_sentencepiece(file, file.read_bytes())
            roles = own_roles | roles
            begin = config.get("add_bos_token", True) and roles.get("bos_token")
            vocabulary.set_template(backend, begin, config.get("add_eos_token") and roles.get("eos_token"))
        is_llama = read_json(folder / "config.json").get("model_type", "llama") == "llama"
        class_is_llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        if is_llama and class_is_llama and "▁" in backend.get_vocab():
            spaced = "always" if config.get("legacy") else "first"  # of the parts between special tokens
            backend.normalizer, backend.pre_tokenizer = None, Metaspace("▁", spaced, split=False)
        add_tokens(backend, file, config.get("added_tokens_decoder"), roles)
        name = f"{folder.resolve().name}/{file.name}"
        return Tokenizer(name, backend, roles, chat_template(folder, config))


def text_of(token):
    """Of a token in a configuration: its text, or what AddedToken takes."""
    return token["content"] if isinstance(token, dict) else token


def add_tokens(backend, file, added, roles):
    """Tokens that may be named beside the vocabulary only. added: id -> AddedToken's arguments, or None."""
    if added is None:  # the older way
        old = read_json(file.parent / "added_tokens.json").items()
        added = {i: dict(content=text, special=text in roles.values()) for text, i in old}
    as_written = {"normalized": False} if file.suffix == ".model" else {}  # no "▁" is put before it
    for i in sorted(added, key=int):
        token = AddedToken(**added[i] | as_written)
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        refuse(found != int(i), f"{token.content!r} is token {found} in {file} and {i} beside it: they are "
               "not of the same model")


def chat_template(folder, config):
    """From chat_template.jinja or tokenizer_config.json, where it may be one of several with names."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {t["name"]: t["template"] for t in template}.get("default")
    return template


@contextlib.contextmanager
def blamed_on(what):
    """Whatever goes wrong in a file that others wrote is one line."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as e:  # the library tokenizers has no narrower class for its panics
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{what} can't be read ({why[:200]}): get it again") from None


def read_json(path):
    """The object in a JSON file, {} where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({e}): get the file again") from None
    refuse(not isinstance(content, dict), f"{path} holds no JSON object: get the file again")
    return content


# ----------------------------------------------------------------------------- chat

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
    given = dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    try:
        return environment.from_string(tokenizer.chat_template).render(**given, **tokenizer.roles)
    except Exception as e:  # whatever a template does
        raise InputError(f"the chat template of {tokenizer.name} refuses this conversation: {e}") from None
