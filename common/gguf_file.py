"""GGUF, llama.cpp's format: a header of fields and tensors, then the data, rows in blocks of a few numbers.

    fields, tensors = read_gguf("model.gguf")          # tensors: name -> Packed
    W = read_rows("model.gguf", tensors["token_embd.weight"], torch.arange(1000))

The gguf package knows the packings and unpacks them. Its reader of headers takes seconds for the 100,000
strings of a vocabulary, so the header is read here.
"""
import math
import struct
from dataclasses import dataclass

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


class Header:
    """Reads a header value by value."""

    def __init__(self, file):
        self.file = file

    def number(self, letter):
        return struct.unpack("<" + letter, self.file.read(struct.calcsize(letter)))[0]

    def text(self):
        return self.file.read(min(self.number("Q"), 1 << 30)).decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner = self.number("I")
            return [self.value(inner) for _ in range(self.number("Q"))]
        return self.number(SCALARS[kind])

    def tensor(self):
        """(shape, packing, offset in the data)"""
        shape = [self.number("Q") for _ in range(self.number("I"))]
        return tuple(reversed(shape)), self.number("I"), self.number("Q")


def read_header(path):
    """(fields, {tensor: (shape, packing, offset in the data)}, where the data begins)"""
    with open(path, "rb") as file:
        header = Header(file)
        if file.read(4) != b"GGUF" or header.number("I") not in (2, 3):
            raise ValueError("it does not begin as GGUF version 2 or 3 does")
        tensors, fields = header.number("Q"), header.number("Q")
        fields = {header.text(): header.value(header.number("I")) for _ in range(fields)}
        tensors = {header.text(): header.tensor() for _ in range(tensors)}
        alignment = fields.get("general.alignment", 32)
        return fields, tensors, -(-file.tell() // alignment) * alignment


def read_gguf(path):
    """(fields, {name: Packed}), every tensor inside the file."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path} is a GGUF file: it needs the gguf package (pip install gguf)") from None
    packed, size = {}, path.stat().st_size
    try:
        fields, tensors, start = read_header(path)
        for name, (shape, packing, offset) in tensors.items():
            packing = gguf.GGMLQuantizationType(packing)
            block, block_bytes = gguf.GGML_QUANT_SIZES[packing]  # numbers in a block, bytes they take
            packed[name] = Packed(shape, packing, shape[-1] // block * block_bytes, start + offset)
            end = packed[name].offset + packed[name].rows * packed[name].row
            if end > size:
                raise ValueError(f"{name} would end at byte {end:,}")
    except (ValueError, KeyError, IndexError, struct.error, ZeroDivisionError) as e:
        raise InputError(f"{path} is no GGUF file, or a damaged one ({e}; it has {size:,} bytes): "
                         "get the file again") from None
    return fields, packed


def read_rows(path, tensor, order):
    """The tensor with its rows in the `order` given; float32, or as it is where it is not packed."""
    mapped = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.rows, tensor.row))
    rows = torch.empty(len(order), tensor.shape[-1], dtype=PLAIN.get(tensor.packing.name, torch.float32))
    for part, out in zip(order.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE)):
        out.copy_(unpack(path, mapped[part.numpy()], tensor.packing).view(out.shape))
    return rows.view(-1, *tensor.shape[1:])


def unpack(path, data, packing):
    import gguf
    if packing.name in PLAIN:
        return torch.from_numpy(data).view(PLAIN[packing.name])
    try:  # blocks don't know of rows, and one long row is faster
        return torch.from_numpy(gguf.dequantize(data.reshape(1, -1), packing))
    except NotImplementedError:
        raise InputError(f"{path} is packed as {packing.name}, which gguf can't unpack: "
                         "get another quantization") from None
