"""Models in other people's files: Hugging Face folders, GGUF files, Meta's checkpoints; one tensor at a time, under our names.

The formats differ in three things:

    names     the table below, a column for each format
    layout    y = W x everywhere but in GPT-2's Hugging Face files, whose Conv1D stores W transposed
    RoPE      turns pairs of coordinates of a head. Which two make a pair does not matter as long as the rows of W^Q and W^K stand in
              that order: Meta and llama.cpp pair neighbours (0,1) (2,3) ..., Hugging Face and model.py the two halves
              (0, d/2) (1, d/2 + 1) .... So rows are reordered.

    with open_source("Llama-2-7b-hf") as source:  # or a .gguf file, or Meta's folder
        for name in source.names:                 # "embed.weight", "blocks.0.attention.q.weight", ...
            tensor = source.get(name)             # as stored: float32, float16 or bfloat16; what a GGUF packs comes as float32

Files are mapped into memory anew for each tensor, and the mapping goes when the tensor does: reading needs no more than the
largest tensor above what the reader keeps. Nothing is unpickled but tensors.
"""
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from common.cli import InputError
from common.tokenizer import from_gguf, load_tokenizer, read_json
from model import Config, Transformer

NAMES = """
    ours            gpt2          llama                      gguf          meta
    embed           wte           embed_tokens               token_embd    tok_embeddings
    positions       wpe           -                          -             -
    blocks          h             layers                     blk           layers
    norm1           ln_1          input_layernorm            attn_norm     attention_norm
    attention.qkv   attn.c_attn   -                          -             -
    attention.q     -             self_attn.q_proj           attn_q        attention.wq
    attention.k     -             self_attn.k_proj           attn_k        attention.wk
    attention.v     -             self_attn.v_proj           attn_v        attention.wv
    attention.o     attn.c_proj   self_attn.o_proj           attn_output   attention.wo
    norm2           ln_2          post_attention_layernorm   ffn_norm      ffn_norm
    mlp.gate        -             mlp.gate_proj              ffn_gate      feed_forward.w1
    mlp.up          mlp.c_fc      mlp.up_proj                ffn_up        feed_forward.w3
    mlp.down        mlp.c_proj    mlp.down_proj              ffn_down      feed_forward.w2
    norm            ln_f          norm                       output_norm   norm
    head            lm_head       lm_head                    output        output
"""
ROWS = [line.split() for line in NAMES.split("\n") if line]
CONV1D = ("attention.qkv", "attention.o", "mlp.up", "mlp.down")  # GPT-2's layers whose weight is stored transposed
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "rope.freqs")  # constants that old files carry along


def their_name(name, column):
    """Our name of a parameter in another format: "blocks.3.attention.q.weight" -> "layers.3.self_attn.q_proj.weight"."""
    theirs = {row[0]: row[ROWS[0].index(column)] for row in ROWS}
    module, parameter = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{theirs[module]}.{parameter}"
    _, number, module = module.split(".", 2)
    return f"{theirs['blocks']}.{number}.{theirs[module]}.{parameter}"


def open_source(path):
    """The model at a path, whichever format it has."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if (path / "params.json").is_file() or list(path.glob("consolidated.*.pth")):
            return MetaSource(path)
        if (path / "config.json").is_file():
            return HuggingFaceSource(path)
        if len(found) == 1:
            return GGUFSource(found[0])
        raise InputError(f"{path} is no model that can be read: it has neither config.json and *.safetensors, nor params.json and "
                         f"consolidated.*.pth, nor one .gguf file (it has {len(found)})")
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path)
    raise InputError(f"{path} is neither a folder nor a .gguf file: give a model's folder")


class Source:
    """What the formats share. A format tells its `column` of the table, where tensors are and their shapes, and how to `read` one."""

    def __init__(self, path, config, stored):
        """stored: their name -> shape, of everything in the files."""
        self.path, self.config = Path(path), config
        with torch.device("meta"):
            self.shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
        self.names = list(self.shapes)
        self.check(stored)

    def check(self, stored):
        theirs = {their_name(name, self.column): name for name in self.names}
        missing = [t for t in theirs if t not in stored]
        if missing:
            raise InputError(f"{self.path} lacks {len(missing)} of {len(theirs)} tensors, {missing[0]} among them: get the files again")
        unexpected = [t for t in stored if t not in theirs and not t.endswith(NOT_WEIGHTS)]
        if self.config.tied:  # some files write the shared matrix twice
            unexpected = [t for t in unexpected if t != their_name("head.weight", self.column)]
        if unexpected:
            raise InputError(f"{self.path} has {len(unexpected)} tensors that a {self.config.kind} model doesn't have, {unexpected[0]} among them: "
                             "is it another architecture, or quantized?")
        for t, name in theirs.items():
            if tuple(stored[t]) != self.stored_shape(name):
                raise InputError(f"{self.path}: {t} has the shape {tuple(stored[t])}, its configuration asks for {self.stored_shape(name)}: "
                                 "weights and configuration are not of the same model")

    def stored_shape(self, name):
        return self.shapes[name]

    def get(self, name):
        """The tensor, (out, in) for a matrix, in the dtype in which it is stored."""
        tensor = self.read(name, their_name(name, self.column))
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{self.path}: {name} is stored as {tensor.dtype}: get the model in float32, float16 or bfloat16")
        return tensor

    def first_rows(self, name, count):
        """The first rows of a matrix, or a whole vector, without reading more than is cheap."""
        tensor = self.get(name)
        return tensor[:count] if tensor.dim() > 1 else tensor

    def close(self):
        """Nothing stays open between two calls of get, but for a GGUF's mapping."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def require(file, settings, allowed):
    """Settings of a configuration that model.py has no counterpart for must have the value that changes nothing."""
    for key, values in allowed.items():
        if settings.get(key, values[0]) not in values:
            raise InputError(f"{file}: {key} is {settings[key]!r}; only {' or '.join(map(repr, values))} is supported")


def config_of(file, make):
    """Run make() and say which key of the file is missing, if one is."""
    try:
        return make()
    except (KeyError, TypeError) as e:
        raise InputError(f"{file} does not describe a model completely (missing or unusable: {e}): get the file again") from None


# ----------------------------------------------------------------------------- Hugging Face

def huggingface_config(file):
    """config.json -> Config. Values left out have transformers' defaults."""
    c = read_json(file)
    require(file, c, {"quantization_config": (None,)})
    if c.get("model_type") == "gpt2":
        require(file, c, {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
                          "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)})
        heads, width = c.get("n_head", 12), c.get("n_embd", 768)
        return Config("gpt2", vocab_size=c.get("vocab_size", 50257), context=c.get("n_positions", 1024), blocks=c.get("n_layer", 12), heads=heads,
                      kv_heads=heads, width=width, ffn=c.get("n_inner") or 4 * width, tied=c.get("tie_word_embeddings", True),
                      norm_eps=c.get("layer_norm_epsilon", 1e-5))
    if c.get("model_type") == "llama":
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        heads, width = c["num_attention_heads"], c["hidden_size"]
        require(file, {"rope_scaling": rope.get("rope_type", rope.get("type", "default"))}, {"rope_scaling": ("default",)})
        require(file, c, {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "head_dim": (width // heads, None)})
        return Config("llama", vocab_size=c["vocab_size"], context=c.get("max_position_embeddings", 2048), blocks=c["num_hidden_layers"],
                      heads=heads, kv_heads=c.get("num_key_value_heads") or heads, width=width, ffn=c["intermediate_size"],
                      tied=c.get("tie_word_embeddings", False), norm_eps=c.get("rms_norm_eps", 1e-6),
                      rope_base=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))))
    raise InputError(f"{file}: model_type is {c.get('model_type')!r}; only gpt2 and llama can be read")


class HuggingFaceSource(Source):
    kind = "huggingface"

    def __init__(self, folder):
        config = config_of(folder / "config.json", lambda: huggingface_config(folder / "config.json"))
        self.column = config.kind
        self.places, stored = {}, {}  # our format's name -> (file, name in it)
        for file in safetensors_files(folder):
            with opened(file) as f:
                for key in f.keys():  # noqa: SIM118 (a file, no dict)
                    plain = key.removeprefix("transformer.").removeprefix("model.")
                    self.places[plain], stored[plain] = (file, key), f.get_slice(key).get_shape()
        self.bytes = sum(file.stat().st_size for file in {file for file, _ in self.places.values()})
        super().__init__(folder, config, stored)

    def stored_shape(self, name):
        return self.shapes[name][::-1] if self.transposed(name) else self.shapes[name]

    def transposed(self, name):
        return self.column == "gpt2" and name.endswith(tuple(f".{module}.weight" for module in CONV1D))

    def read(self, name, theirs):
        file, key = self.places[theirs]
        with opened(file) as f:
            tensor = f.get_tensor(key)
        return tensor.t() if self.transposed(name) else tensor

    def tokenizer(self):
        return load_tokenizer(self.path) if any((self.path / f).is_file() for f in ("tokenizer.json", "tokenizer.model")) else None


def opened(file):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file} is damaged ({e}; it has {file.stat().st_size:,} bytes): get the file again") from None


def safetensors_files(folder):
    """One file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = [folder / name for name in sorted(set(config_of(index, lambda: read_json(index)["weight_map"].values())))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise InputError(f"{folder} lacks {len(lost)} of the {len(files)} shards in {index.name}, {lost[0]} among them: copy or download it")
    if not files and list(folder.glob("*.bin")):
        raise InputError(f"{folder} has pickled weights (*.bin): opening a pickle can run code, so it is not opened. If you trust it, convert it "
                         f"with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)")
    if not files:
        raise InputError(f"{folder} has a config.json but no *.safetensors: copy the weights there")
    return files


# ----------------------------------------------------------------------------- RoPE's two orders

def half_rotation_rows(heads, head_size):
    """Where the rows of a W^Q or W^K that pairs neighbours have to be taken from for one that pairs halves: 0 2 4 ... 1 3 5 ... in each head."""
    return torch.arange(heads * head_size).view(heads, head_size // 2, 2).transpose(1, 2).reshape(-1)  # (heads, 2, d/2) -> rows


class InterleavedSource(Source):
    """GGUF and Meta: q and k in neighbours' order."""

    def row_order(self, name):
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(name.split(".")[-2])
        return None if heads is None else half_rotation_rows(heads, self.config.head_size)


# ----------------------------------------------------------------------------- GGUF

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # kinds of values, in struct's letters
STRING, ARRAY = 8, 9


def gguf_header(file):
    """(fields, {tensor: (shape, packing, offset)}) of a GGUF: a count of each, the fields, the tensors, and then the data, aligned.

    The gguf package has a reader too; it takes seconds for the 100,000 strings of a vocabulary."""
    with open(file, "rb") as f:
        def number(letter):
            return struct.unpack("<" + letter, f.read(struct.calcsize(letter)))[0]

        def text():
            return f.read(min(number("Q"), 1 << 30)).decode("utf-8", "replace")

        def value(kind):
            if kind == ARRAY:
                inner = number("I")
                return [value(inner) for _ in range(number("Q"))]
            return text() if kind == STRING else number(SCALARS[kind])

        if f.read(4) != b"GGUF" or number("I") not in (2, 3):
            raise ValueError("it does not begin as GGUF version 2 or 3 does")
        tensors, fields = number("Q"), number("Q")
        fields = {text(): value(number("I")) for _ in range(fields)}
        tensors = {text(): ([number("Q") for _ in range(number("I"))][::-1], number("I"), number("Q")) for _ in range(tensors)}
        start = -(-f.tell() // (alignment := fields.get("general.alignment", 32))) * alignment
    return fields, {name: (tuple(shape), packing, start + offset) for name, (shape, packing, offset) in tensors.items()}


def read_gguf(file):
    """The header, with every tensor inside the file: {tensor: (shape, bytes of each row, packing, offset)}."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"{file} is a GGUF file: unpacking it needs the gguf package (pip install gguf)") from None
    places, size = {}, file.stat().st_size
    try:
        fields, tensors = gguf_header(file)
        for name, (shape, packing, offset) in tensors.items():
            packing = gguf.GGMLQuantizationType(packing)
            block, packed = gguf.GGML_QUANT_SIZES[packing]  # numbers in a block, bytes they take
            row = shape[-1] // block * packed
            if offset + math.prod(shape[:-1]) * row > size:
                raise ValueError(f"{name} would end at byte {offset + math.prod(shape[:-1]) * row:,}")
            places[name] = (shape, row, packing, offset)
    except (ValueError, KeyError, IndexError, struct.error, ZeroDivisionError) as e:
        raise InputError(f"{file} is no GGUF file, or a damaged one ({e}; it has {size:,} bytes): get the file again") from None
    return fields, places


def gguf_config(file, c, shapes):
    """The metadata of a GGUF, a dict -> Config."""
    require(file, c, {"general.architecture": ("llama",), "llama.rope.scaling.type": ("none",), "llama.expert_count": (0,)})
    width, heads = c["llama.embedding_length"], c["llama.attention.head_count"]
    require(file, c, {f"llama.{key}": (width // heads,) for key in ("rope.dimension_count", "attention.key_length", "attention.value_length")})
    return Config("llama", vocab_size=shapes["token_embd.weight"][0], context=c["llama.context_length"], blocks=c["llama.block_count"], heads=heads,
                  kv_heads=c.get("llama.attention.head_count_kv", heads), width=width, ffn=c["llama.feed_forward_length"],
                  tied="output.weight" not in shapes, norm_eps=float(f"{c['llama.attention.layer_norm_rms_epsilon']:.7g}"),  # a float32's digits
                  rope_base=float(c.get("llama.rope.freq_base", 10000.0)))


class GGUFSource(InterleavedSource):
    kind, column = "gguf", "gguf"

    def __init__(self, file):
        self.bytes = file.stat().st_size
        self.fields, self.places = read_gguf(file)
        shapes = {name: shape for name, (shape, *_) in self.places.items()}
        super().__init__(file, config_of(file, lambda: gguf_config(file, self.fields, shapes)), shapes)

    def read(self, name, theirs, count=None):
        """Rows (all, or the first `count`) are taken in the order in which they are wanted, and unpacked some at a time."""
        shape, row, packing, offset = self.places[theirs]
        packed = np.memmap(self.path, np.uint8, "r", offset, (math.prod(shape[:-1]), row))  # a vector is one row
        order = self.row_order(name)
        order = (torch.arange(len(packed)) if order is None else order)[:count]
        tensor = torch.empty(len(order), shape[-1], dtype={"F16": torch.float16, "BF16": torch.bfloat16}.get(packing.name, torch.float32))
        for rows, out in zip(order.split(1024), tensor.split(1024)):
            out.copy_(self.unpack(packed[rows.numpy()], packing, theirs).view(out.shape))
        return tensor.view(-1, *shape[1:])

    def first_rows(self, name, count):
        theirs = their_name(name, self.column)
        return self.read(name, theirs, count if len(self.places[theirs][0]) > 1 else None)

    def unpack(self, data, packing, theirs):
        import gguf
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(packing.name)
        if plain:
            return torch.from_numpy(data).view(plain)
        try:
            return torch.from_numpy(gguf.dequantize(data.reshape(1, -1), packing))  # blocks don't know of rows, and one long row is faster
        except NotImplementedError:
            raise InputError(f"{self.path}: {theirs} is packed as {packing.name}, which gguf can't unpack: get another quantization") from None

    def tokenizer(self):
        return from_gguf(self.path.stem, self.fields) if "tokenizer.ggml.model" in self.fields else None


# ----------------------------------------------------------------------------- Meta

class MetaSource(InterleavedSource):
    """params.json and consolidated.00.pth, .01 and so on: one file for each GPU it was made for, with its part of every matrix."""
    kind, column = "meta", "meta"

    def __init__(self, folder):
        self.files = sorted(folder.glob("consolidated.*.pth"))
        for number, file in enumerate(self.files or [None]):
            if file is None or file.name != f"consolidated.{number:02}.pth":
                raise InputError(f"{folder} lacks consolidated.{number:02}.pth: copy or download it")
        self.bytes = sum(file.stat().st_size for file in self.files)
        parts = {name: tuple(tensor.shape) for name, tensor in load_tensors(self.files[0]).items()}
        params = config_of(folder / "params.json", lambda: read_json(folder / "params.json"))
        config = config_of(folder / "params.json", lambda: self.config_from(folder / "params.json", params, parts))
        self.config = config
        super().__init__(folder, config, {name: self.whole_shape(name, shape) for name, shape in parts.items()})

    def config_from(self, file, p, parts):
        """The width of the feed-forward and the vocabulary are not written down (or only as factors): the tensors tell. So is the context."""
        require(file, p, {"use_scaled_rope": (False,)})
        many, eps, base = len(self.files), p.get("norm_eps", 1e-5), float(p.get("rope_theta", 10000.0))
        context = 8192 if base > 10000 else 2048 if eps < 1e-5 else 4096  # Llama 3, 1, 2
        return Config("llama", vocab_size=parts["output.weight"][0] * many, context=context, blocks=p["n_layers"], heads=p["n_heads"],
                      kv_heads=p.get("n_kv_heads") or p["n_heads"], width=p["dim"], ffn=parts["layers.0.feed_forward.w1.weight"][0] * many,
                      tied=False, norm_eps=eps, rope_base=base)

    def split_dimension(self, theirs, shape):
        """A matrix is split by what it puts out or, where it sums up (W^O, W^D; the embedding of Llama 1 and 2), by what it takes in."""
        if len(shape) == 1:
            return None
        return int(theirs.endswith(("wo.weight", "w2.weight")) or theirs == "tok_embeddings.weight" and shape[1] < self.config.width)

    def whole_shape(self, theirs, shape):
        split = self.split_dimension(theirs, shape)
        return tuple(n * len(self.files) if i == split else n for i, n in enumerate(shape))

    def read(self, name, theirs):
        whole = None
        for number, file in enumerate(self.files):
            part = load_tensors(file).get(theirs)
            split = None if part is None else self.split_dimension(theirs, part.shape)
            if part is None or self.whole_shape(theirs, part.shape) != self.shapes[name]:
                raise InputError(f"{file}: {theirs} is missing or not of the shape that it has in {self.files[0].name}: get the file again")
            if split is None or len(self.files) == 1:
                whole = part
                break
            whole = torch.empty(self.shapes[name], dtype=part.dtype) if whole is None else whole
            whole.narrow(split, number * part.shape[split], part.shape[split]).copy_(part)
        order = self.row_order(name)
        return whole if order is None else whole[order]

    def tokenizer(self):
        """It lies in the model's folder, or, as Meta hands it out, in the one above."""
        found = [folder for folder in (self.path, self.path.resolve().parent) if (folder / "tokenizer.model").is_file()]
        return load_tokenizer(found[0]) if found else None


def load_tensors(file):
    """The tensors of a .pth, mapped and not read. A pickle is a program: weights_only runs none but that which builds tensors."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError):  # OSError is how torch says that a zip file ends too early
        raise InputError(f"{file} can't be read as tensors alone: it is damaged, or holds code (which was not run); get the file again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{file} is not a table of tensors: it is no checkpoint of Meta's")
    return tensors
