"""GGUF, llama.cpp's format: a header of fields and tensors, then the data, rows in blocks of a few numbers.

    fields, tensors = read_gguf("model.gguf")          # tensors: name -> PackedTensor
    W = read_rows("model.gguf", tensors["token_embd.weight"], torch.arange(1000))

The gguf package knows the packings and unpacks them. Its reader of headers takes seconds for the 100,000
strings of a vocabulary, so the header is read here. It is imported where a GGUF is read, and not before.
"""
import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import formats
from common.cli import InputError, refuse
from common.rope import rope_frequencies, yarn_attention
from common.tokenizer import from_gguf

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # kinds of values, in struct's letters
STRING, ARRAY = 8, 9
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # packings that are none
BLOCKS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}  # bits of packings that are quant.py's own, in groups of BLOCK
BLOCK = 32
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackedTensor:
    """A tensor inside the file."""
    shape: tuple
    packing: object  # gguf.GGMLQuantizationType
    row: int         # bytes of a row
    offset: int      # of the first row

    @property
    def rows(self):
        return math.prod(self.shape[:-1])  # a vector is one row

    @property
    def bits(self):
        return 8 * self.row / self.shape[-1]


def number(file, letter):
    return struct.unpack("<" + letter, file.read(struct.calcsize(letter)))[0]


def text(file):
    return file.read(min(number(file, "Q"), 1 << 30)).decode("utf-8", "replace")


def value(file, kind):
    if kind == STRING:
        return text(file)
    if kind == ARRAY:
        inner = number(file, "I")
        return [value(file, inner) for _ in range(number(file, "Q"))]
    return number(file, SCALARS[kind])


def read_gguf(path):
    """(fields, {name: PackedTensor}), every tensor inside the file, one behind the other."""
    try:
        with open(path, "rb") as file:
            fields, tensors = read_header(file)
        size, end = path.stat().st_size, max(t.offset + t.rows * t.row for t in tensors.values())
        if end > size:
            raise ValueError(f"its tensors would end at byte {end:,}, it has {size:,}")
    except (ValueError, LookupError, TypeError, struct.error, ZeroDivisionError, RecursionError) as e:
        raise InputError(f"{path} is no GGUF file, or a damaged one ({e}): get the file again") from None
    return fields, tensors


def read_header(file):
    import gguf
    if file.read(4) != b"GGUF" or number(file, "I") not in (2, 3):
        raise ValueError("it does not begin as GGUF version 2 or 3 does")
    count, fields = number(file, "Q"), number(file, "Q")
    fields = {text(file): value(file, number(file, "I")) for _ in range(fields)}
    alignment, end, tensors = int(fields.get("general.alignment", 32)), 0, {}
    for _ in range(count):
        name = text(file)
        shape = tuple(number(file, "Q") for _ in range(number(file, "I")))[::-1]
        packing, offset = gguf.GGMLQuantizationType(number(file, "I")), number(file, "Q")
        block, size = gguf.GGML_QUANT_SIZES[packing]  # numbers in a block, bytes they take
        if name in tensors or offset != end or shape[-1] % block:
            raise ValueError(f"{name} is there twice, or not behind the tensor before, or no whole blocks")
        tensors[name] = PackedTensor(shape, packing, shape[-1] // block * size, offset)
        end += aligned(tensors[name].rows * tensors[name].row, alignment)
    start = aligned(file.tell(), alignment)
    return fields, {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}


def aligned(offset, alignment):
    return -(-offset // alignment) * alignment


def read_rows(path, tensor, order=None):
    """The tensor with its rows in the `order` given; float32, or as it is where it is not packed."""
    import gguf
    order, plain = torch.arange(tensor.rows) if order is None else order, PLAIN.get(tensor.packing.name)
    mapped = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.rows, tensor.row))
    rows = torch.empty(len(order), tensor.shape[-1], dtype=plain or torch.float32)
    for part, out in zip(order.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE)):
        data = mapped[part.numpy()]
        try:  # blocks don't know of rows, and one long row is faster
            unpacked = data if plain else gguf.dequantize(data.reshape(1, -1), tensor.packing)
        except NotImplementedError:
            raise InputError(f"{path} is packed as {tensor.packing.name}, which gguf can't unpack: "
                             "get another quantization") from None
        out.copy_(torch.from_numpy(unpacked).view(plain or torch.float32).view(out.shape))
    return rows.view(-1, *tensor.shape[1:])


def read_blocks(path, tensor, order):
    """A matrix in one of BLOCKS as a quant.QuantMatrix, its integers and s as they are. A block of 32 numbers
    is a float16 s, in Q4_1 a float16 minimum m, and the integers; of 4 bits they begin at 0, the first 16 in
    the low halves of bytes. Ours begin at -8: o = m + 8 s, which float16 holds where a block has numbers
    of both signs (all but two of smollm2's 3 million blocks), and else to 2^-12 of it.
    """
    from quant import QuantMatrix, pack
    mapped = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.rows, tensor.row))
    blocks = torch.from_numpy(mapped[order.numpy()]).unflatten(1, (tensor.shape[-1] // BLOCK, -1))
    name = tensor.packing.name
    W = QuantMatrix(*tensor.shape, BLOCKS[name], BLOCK)
    W.scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if name == "Q4_1":
        minimum = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0]
        W.offset = (minimum.float() + 8 * W.scale.float()).half()
    refuse(not (W.scale + W.offset).isfinite().all(), f"{path} has scales that are no numbers: get it again")
    if name == "Q8_0":
        q = blocks[..., 2:].contiguous().view(torch.int8)
    else:
        halves = blocks[..., -BLOCK // 2:]
        q = torch.cat([halves & 15, halves >> 4], -1).to(torch.int8) - 8  # (out, blocks, 32)
    W.q = pack(q.flatten(1), W.bits)
    return W


# ----------------------------------------------------------------------------- a model in it

# Settings that change the network, and the values with which they don't.
GGUF_ONLY = {"rope.scaling.type": ("linear", "none", "yarn"), "rope.scaling.attn_factor": (1.0,),
             "attention.clamp_kqv": (0.0,), "attention.causal": (True,), "logit_scale": (0.0, 1.0),
             "expert_count": (0,), "split.count": (0, 1)}


def gguf_config(file, fields, packed):
    known = [kind for kind, family in formats.FAMILIES.items() if family.gguf_neighbours is not None]
    formats.require(file, fields, {"general.architecture": known})
    kind = fields.get("general.architecture", known[0])
    theirs = {}
    for key, value in fields.items():  # a list has a value for each block
        alike = isinstance(value, list) and value and value.count(value[0]) == len(value)
        theirs[key.removeprefix(f"{kind}.")] = value[0] if alike else value
    get, embed = theirs.get, packed.get("token_embd.weight")
    defaults = formats.LIKE_LLAMA | dict(
        vocab_size=embed and embed.shape[0], tied="output.weight" not in packed, norm_eps=None,
        attention_bias="blk.0.attn_output.bias" in packed)
    if get("rope.scaling.type") != "none":  # as llama.cpp does, where the type is left out
        defaults |= dict(rope_factor=get("rope.scaling.factor") or get("rope.scale_linear") or 1.0)
    if get("rope.scaling.type") == "yarn":
        original = get("rope.scaling.original_context_length") or get("context_length")
        defaults |= dict(rope_scaling="yarn", rope_original=original, rope_attention=yarn_attention(
            defaults["rope_factor"]), rope_low=get("rope.scaling.yarn_beta_slow", 1.0),
            rope_high=get("rope.scaling.yarn_beta_fast", 32.0))
    config = formats.read_settings(file, kind, formats.column(formats.SETTINGS, "gguf"), theirs, defaults)
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    formats.require(file, theirs, GGUF_ONLY | dict.fromkeys(sizes, (config.head_size,)))
    window = config.window if config.window < config.context else 0
    refuse(window and kind != "llama", f"{file}: attention.sliding_window is {window}, and which blocks of a "
           f"{kind} have it is not said")
    return replace(config, norm_eps=float(f"{config.norm_eps:.7g}"),  # the digits that a float32 has
                   kind="mistral" if window else kind, window=window,
                   no_rope=tuple(range(3, config.blocks, 4)) if kind == "smollm3" else ())


def scaled(file, config, factors):
    """The Config with Llama 3's scaling, of which a GGUF has only what RoPE's frequencies are divided by."""
    plain, known = rope_frequencies(config), [config]
    if config.rope_factor == 1:
        llama3 = replace(config, rope_scaling="llama3", rope_original=8192)
        known += [replace(llama3, rope_factor=factor) for factor in (8.0, 32.0)]
    for other in known:
        if factors.shape == plain.shape and torch.allclose(plain / rope_frequencies(other), factors, 1e-3):
            return other
    raise InputError(f"{file}: rope_freqs.weight scales RoPE's frequencies as no Llama 3 does")


class GGUFSource(formats.Source):
    def __init__(self, file):
        self.path, self.bytes = file, file.stat().st_size
        self.fields, packed = read_gguf(file)
        self.config = gguf_config(file, self.fields, packed)
        self.shapes = formats.shapes_of(self.config)
        self.find(packed, self.shapes, lambda name: formats.their_name(name, "gguf"), "rope_freqs.weight")
        if "rope_freqs.weight" in packed:
            self.config = scaled(file, self.config, read_rows(file, packed["rope_freqs.weight"]))

    def order(self, name):
        """Its rows in our order: of RoPE's neighbours 0 2 4 ... 1 3 5 ... of each head."""
        order = torch.arange(self.stored[name].shape[0])
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(name.split(".")[-2])
        if heads and formats.FAMILIES[self.config.kind].gguf_neighbours:
            order = order.view(heads, -1, 2).transpose(1, 2).reshape(-1)  # (heads, d/2, 2) -> (heads, 2, d/2)
        return order

    def get(self, name, rows=None):
        packed, order = self.stored[name], self.order(name)
        if len(packed.shape) == 1:
            return read_rows(self.path, packed)[order]
        return read_rows(self.path, packed, order[:rows])

    def tensors(self, forms=None):
        for name in self.shapes:
            packed, form = self.stored[name], forms and forms.get(name.removesuffix(".weight"))
            if form and BLOCKS.get(packed.packing.name) == form[0] and form[1] in (None, BLOCK):
                yield name, read_blocks(self.path, packed, self.order(name))
            else:
                yield name, self.get(name)

    def tokenizer(self):
        if "tokenizer.ggml.model" not in self.fields:
            return None
        tokens, rows = self.fields.get("tokenizer.ggml.tokens"), self.config.vocab_size
        refuse(not isinstance(tokens, list) or len(tokens) > rows,
               f"{self.path} has no list of at most {rows:,} tokens, the rows of its embedding")
        for role in ("bos", "eos"):
            i = self.fields.get(f"tokenizer.ggml.{role}_token_id", 0)
            refuse(i not in range(len(tokens)), f"{self.path}: its {role} is {i} of {len(tokens)} tokens")
        return from_gguf(self.path.stem, self.fields)
