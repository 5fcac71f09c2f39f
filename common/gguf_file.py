"""GGUF, llama.cpp's format: a header of fields and tensors, then the data, rows in blocks of a few numbers.

    fields, tensors = read_gguf("model.gguf")          # tensors: name -> Packed
    W = read_rows("model.gguf", tensors["token_embd.weight"], torch.arange(1000))

The gguf package knows the packings and unpacks them. Its reader of headers takes seconds for the 100,000
strings of a vocabulary, so the header is read here. It is imported where a GGUF is read, and not before.
"""
import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.cli import InputError

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # kinds of values, in struct's letters
STRING, ARRAY = 8, 9
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # packings that are none
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Packed:
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
    """(fields, {name: Packed}), every tensor inside the file, one behind the other."""
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
        tensors[name] = Packed(shape, packing, shape[-1] // block * size, offset)
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
