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

from common.cli import InputError, refuse
from common.formats import FAMILIES, LIKE_LLAMA, Source, read_settings, require, shapes_of, their_name
from common.rope import rope_frequencies
from common.tokenizer import Tokenizer, blamed_on, vocabulary

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # kinds of values, in struct's letters
STRING, ARRAY = 8, 9
BLOCKS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}  # bits of packings that are quant.py's own, in groups of BLOCK
BLOCK = 32
ROWS_AT_ONCE = 1024

@dataclass(frozen=True)
class PackedTensor:
    """A tensor inside the file."""
    shape: tuple
    packing: object  # gguf.GGMLQuantizationType
    bits: float      # of a number
    table: tuple     # how many rows, a vector being one, and the bytes of each
    offset: int      # of the first row

def number(file, letter):
    return struct.unpack("<" + letter, file.read(struct.calcsize(letter)))[0]

def value(file, kind=STRING):
    if kind == STRING:
        return file.read(min(number(file, "Q"), 1 << 30)).decode("utf-8", "replace")
    if kind == ARRAY:
        inner = number(file, "I")
        return [value(file, inner) for _ in range(number(file, "Q"))]
    return number(file, SCALARS[kind])

def read_gguf(path):
    """(fields, {name: PackedTensor}), every tensor inside the file, one behind the other."""
    import gguf
    tensors, end = {}, 0
    with blamed_on(path), open(path, "rb") as file:
        refuse(file.read(4) != b"GGUF" or number(file, "I") not in (2, 3),
               f"{path} does not begin as a GGUF file of version 2 or 3 does: get the file again")
        count, fields = number(file, "Q"), number(file, "Q")
        fields = {value(file): value(file, number(file, "I")) for _ in range(fields)}  # name, kind, value
        alignment = int(fields.get("general.alignment", 32))
        for _ in range(count):
            name = value(file)
            shape = tuple(number(file, "Q") for _ in range(number(file, "I")))[::-1]
            packing, offset = gguf.GGMLQuantizationType(number(file, "I")), number(file, "Q")
            block, size = gguf.GGML_QUANT_SIZES[packing]  # numbers in a block, bytes they take
            refuse(name in tensors or offset != end + -end % alignment or shape[-1] % block,
                   f"{path}: {name} is there twice, or not behind the tensor before, or no whole blocks")
            table = math.prod(shape[:-1]), shape[-1] // block * size
            tensors[name] = PackedTensor(shape, packing, 8 * size / block, table, offset)
            end = offset + math.prod(table)
        start, length = file.tell() + -file.tell() % alignment, path.stat().st_size
    refuse(start + end > length,
           f"{path} is cut off: its tensors would end at byte {start + end:,}, it has {length:,}")
    return fields, {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}

def read_rows(path, tensor, order):
    """The tensor's rows in this order, in float32."""
    import gguf
    mapped = np.memmap(path, np.uint8, "r", tensor.offset, tensor.table)
    rows = torch.empty(len(order), tensor.shape[-1])
    with blamed_on(path):  # gguf knows packings that it can't unpack
        for part, out in zip(order.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE)):
            data = mapped[part.numpy()].reshape(1, -1)  # one long row: blocks don't know of rows
            out.copy_(torch.from_numpy(gguf.dequantize(data, tensor.packing)).view(out.shape))
    return rows.view(-1, *tensor.shape[1:])

def read_blocks(path, tensor, order):
    """A matrix in one of BLOCKS as a quant.QuantMatrix, its integers and s as they are. A block of 32 numbers
    is a float16 s, in Q4_1 a float16 minimum m, and the integers; of 4 bits they begin at 0, the first 16 in
    the low halves of bytes. Ours begin at -8: o = m + 8 s, which float16 holds where a block has numbers
    of both signs (all but two of smollm2's 3 million blocks), and else to 2^-12 of it."""
    from quant import QuantMatrix, pack
    mapped = np.memmap(path, np.uint8, "r", tensor.offset, tensor.table)
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

# Settings that change the network, and the values with which they don't.
GGUF_ONLY = {"rope.scaling.type": ("linear", "none", "yarn"), "rope.scaling.attn_factor": (1.0,),
             "attention.sliding_window": (0,), "attention.clamp_kqv": (0.0,), "attention.causal": (True,),
             "logit_scale": (0.0, 1.0), "expert_count": (0,), "split.count": (0, 1)}
# RoPE's numbers at Hugging Face -> after "rope.scaling."
ROPE = dict(factor="factor", original_max_position_embeddings="original_context_length",
            beta_slow="yarn_beta_slow", beta_fast="yarn_beta_fast")

def gguf_config(file, fields, packed):
    known = [kind for kind, family in FAMILIES.items() if family.column == "llama"]
    require(file, fields, {"general.architecture": known})
    kind = fields.get("general.architecture", known[0])
    theirs = {}
    for key, value in fields.items():  # a list has a value for each block
        alike = isinstance(value, list) and value and value.count(value[0]) == len(value)
        theirs[key.removeprefix(f"{kind}.")] = value[0] if alike else value
    require(file, theirs, GGUF_ONLY)
    rope = {key: theirs.get(f"rope.scaling.{name}") for key, name in ROPE.items()}
    rope["factor"] = rope["factor"] or theirs.get("rope.scale_linear")  # in older files
    scaling = theirs.get("rope.scaling.type", "linear" if rope["factor"] else "none")  # as llama.cpp does
    embed = packed.get("token_embd.weight")
    defaults = LIKE_LLAMA | dict(vocab_size=embed and embed.shape[0], tied="output.weight" not in packed,
                                 attention_bias="blk.0.attn_output.bias" in packed)
    config = read_settings(file, kind, "gguf", theirs, defaults, scaling.replace("none", "default"), rope)
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    require(file, theirs, dict.fromkeys(sizes, (config.head_size,)))
    return replace(config, norm_eps=float(f"{config.norm_eps:.7g}"),  # the digits that a float32 has
                   no_rope=tuple(range(3, config.blocks, 4)) if kind == "smollm3" else ())

def scaled(file, config, factors):
    """The Config with Llama 3's scaling, of which a GGUF has only what RoPE's frequencies are divided by."""
    llama3 = replace(config, rope_scaling="llama3", rope_original=8192)
    for other in (config, replace(llama3, rope_factor=8.0), replace(llama3, rope_factor=32.0)):
        wanted = rope_frequencies(config) / rope_frequencies(other)
        if factors.shape == wanted.shape and torch.allclose(wanted, factors, 1e-3):
            return other
    raise InputError(f"{file}: rope_freqs.weight scales RoPE's frequencies as no Llama 3 does")

class GGUFSource(Source):
    def __init__(self, file):
        self.path, (self.fields, packed) = file, read_gguf(file)
        self.config = gguf_config(file, self.fields, packed)
        self.shapes, factors = shapes_of(self.config), packed.get("rope_freqs.weight")
        self.find(packed, self.shapes, lambda name: their_name(name, "gguf"), "rope_freqs.weight")
        if factors is not None:
            self.config = scaled(file, self.config, read_rows(file, factors, torch.arange(1)))

    def order(self, name):
        """Its rows in our order: of RoPE's neighbours 0 2 4 ... 1 3 5 ... of each head."""
        order = torch.arange(self.stored[name].shape[0])
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(name.split(".")[-2])
        if heads and FAMILIES[self.config.kind].gguf_neighbours:
            order = order.view(heads, -1, 2).transpose(1, 2).reshape(-1)  # (heads, d/2, 2) -> (heads, 2, d/2)
        return order

    def get(self, name, rows=None):
        packed, order = self.stored[name], self.order(name)
        if len(packed.shape) == 1:
            return read_rows(self.path, packed, torch.arange(1))[order]
        return read_rows(self.path, packed, order[:rows])

    def tensors(self, forms=None):
        for name in self.shapes:
            packed, form = self.stored[name], forms and forms.get(name.removesuffix(".weight"))
            if form and BLOCKS.get(packed.packing.name) == form[0] and form[1] in (None, BLOCK):
                yield name, read_blocks(self.path, packed, self.order(name))
            else:
                yield name, self.get(name)

    def tokenizer(self):
        fields = {key.removeprefix("tokenizer.ggml."): field for key, field in self.fields.items()}
        if "model" not in fields:
            return None
        tokens, rows = fields.get("tokens"), self.config.vocab_size
        refuse(not isinstance(tokens, list) or len(tokens) > rows,
               f"{self.path} has no list of at most {rows:,} tokens, the rows of its embedding")
        for role in ("bos", "eos"):
            i = fields.get(f"{role}_token_id", 0)
            refuse(i not in range(len(tokens)), f"{self.path}: its {role} is {i} of {len(tokens)} tokens")
        name, template = self.path.stem, fields.get("tokenizer.chat_template")
        with blamed_on(f"the tokenizer of {name}"):
            return Tokenizer(name, *vocabulary(name, fields), template)
