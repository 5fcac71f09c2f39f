"""Models in other people's files: Hugging Face folders, read and written, and GGUF files, read.

They differ from ours in four things, which the tables below say:

    settings   what a configuration calls the width, the heads, ...
    names      of the tensors
    layout     y = W x everywhere but in GPT-2's Hugging Face files, whose Conv1D stores W transposed
    RoPE       turns pairs of a head's coordinates: here and at Hugging Face (0, d/2) (1, d/2 + 1) ..., in a
               Llama's GGUF neighbours (0, 1) (2, 3) ...: there the rows of W^Q and W^K have another order

    source = open_source("Llama-2-7b-hf")           # or a .gguf file
    for name, tensor in source.tensors(): ...       # "blocks.0.attention.q.weight", in the dtype of the file
    export(model, tokenizer, "out/hf")              # dense, for transformers, peft and llama.cpp's converter

A file is mapped into memory anew for each tensor, and the mapping goes when the tensor does: reading needs no
more than the largest tensor above what the reader keeps. Nothing is unpickled.
"""
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from common.cli import InputError, check_folder, write_atomic
from common.gguf_file import read_gguf, read_rows
from common.storage import sharded, write_tensors
from common.tokenizer import from_gguf, load_tokenizer, read_json
from model import Config, Transformer, dense_weight

# ------------------------------------------------------------------------------------------------ the tables

SETTINGS = """
    ours            gpt2                  llama                      gguf
    vocab_size      vocab_size            vocab_size                 -
    context         n_positions           max_position_embeddings    context_length
    blocks          n_layer               num_hidden_layers          block_count
    heads           n_head                num_attention_heads        attention.head_count
    kv_heads        -                     num_key_value_heads        attention.head_count_kv
    width           n_embd                hidden_size                embedding_length
    ffn             n_inner               intermediate_size          feed_forward_length
    tied            tie_word_embeddings   tie_word_embeddings        -
    norm_eps        layer_norm_epsilon    rms_norm_eps               attention.layer_norm_rms_epsilon
    rope_base       -                     rope_theta                 rope.freq_base
"""
NAMES = """
    ours            gpt2                  llama                      gguf
    embed           wte                   embed_tokens               token_embd
    positions       wpe                   -                          -
    blocks          h                     layers                     blk
    norm1           ln_1                  input_layernorm            attn_norm
    attention.qkv   attn.c_attn           -                          -
    attention.q     -                     self_attn.q_proj           attn_q
    attention.k     -                     self_attn.k_proj           attn_k
    attention.v     -                     self_attn.v_proj           attn_v
    attention.o     attn.c_proj           self_attn.o_proj           attn_output
    norm2           ln_2                  post_attention_layernorm   ffn_norm
    mlp.gate        -                     mlp.gate_proj              ffn_gate
    mlp.up          mlp.c_fc              mlp.up_proj                ffn_up
    mlp.down        mlp.c_proj            mlp.down_proj              ffn_down
    norm            ln_f                  norm                       output_norm
    head            lm_head               lm_head                    output
"""


def column(table, name):
    """A column of a table: ours -> theirs."""
    header, *rows = [line.split() for line in table.strip().splitlines()]
    at = header.index(name)
    return {row[0]: row[at] for row in rows if row[at] != "-"}


@dataclass(frozen=True)
class Family:
    """How others write down an architecture of model.py."""
    column: str       # of the tables
    prefix: str       # of their tensors, the head's aside
    network: str      # transformers' class
    defaults: dict    # our settings where their configuration leaves them out
    only: dict        # other settings: the values for which model.py computes the same, the default first
    conv1d: bool = False           # the matrices of blocks are stored transposed
    gguf_neighbours: bool = None   # RoPE's pairs in a GGUF are neighbours; None: such a GGUF is not read


LIKE_LLAMA = dict(tied=False, norm_eps=1e-6, rope_base=10000.0)
FAMILIES = {
    "gpt2": Family(
        "gpt2", "transformer.", "GPT2LMHeadModel",
        dict(vocab_size=50257, context=1024, blocks=12, heads=12, width=768, tied=True, norm_eps=1e-5),
        dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
             scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)), conv1d=True),
    "llama": Family(
        "llama", "model.", "LlamaForCausalLM", LIKE_LLAMA | dict(context=2048),
        dict(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,)), gguf_neighbours=True),
    "qwen2": Family(
        "llama", "model.", "Qwen2ForCausalLM", LIKE_LLAMA | dict(context=32768),
        dict(hidden_act=("silu",), use_sliding_window=(False,)), gguf_neighbours=False),
}
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # constants in old files


def their_name(name, column_name):
    """A parameter's name elsewhere: blocks.3.attention.q.weight -> layers.3.self_attn.q_proj.weight."""
    theirs = column(NAMES, column_name)
    module, parameter = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{theirs[module]}.{parameter}"
    _, number, module = module.split(".", 2)
    return f"{theirs['blocks']}.{number}.{theirs[module]}.{parameter}"


def is_transposed(name, family):
    return family.conv1d and name.startswith("blocks.") and name.endswith(".weight") and ".norm" not in name


# ------------------------------------------------------------------------------------------------- a source

class Source:
    """The protocol of a model in files. Nothing stays open between two calls.

        path, bytes           where it is; the size of its files
        config, layers        the Config; what config.json says of layers that were swapped (in our folders)
        shapes, bits          our name of a tensor -> its shape; -> bits of a number as it is stored
        get(name, rows=None)  a tensor, (out, in) for a matrix, in the stored dtype; only its first rows
    """
    layers = {}

    def tensors(self):
        """(name, tensor) of all."""
        for name in self.shapes:
            yield name, self.get(name)

    def tokenizer(self):
        """The one beside the weights, or None."""
        files = [self.path / name for name in ("tokenizer.json", "tokenizer.model")]
        return load_tokenizer(self.path) if any(file.is_file() for file in files) else None


def open_source(path):
    """The Source of a Hugging Face folder, a GGUF file, or a folder with one in it."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path)
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder nor a .gguf file: give a model's folder")
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return GGUFSource(found[0])
    raise InputError(f"{path} is no model that can be read: it has neither config.json and *.safetensors, "
                     f"nor one .gguf file (it has {len(found)})")


def check_tensors(where, wanted, stored, kind, optional=()):
    """Refuse files of another model. wanted: name -> shape; stored: name -> Stored or Packed."""
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise InputError(f"{where} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]} among them: "
                         "get the files again")
    unexpected = [name for name in stored if name not in wanted and not name.endswith(optional)]
    if unexpected:
        raise InputError(f"{where} has {len(unexpected)} tensors that a {kind} model doesn't have, "
                         f"{unexpected[0]} among them: is it another architecture, or quantized?")
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise InputError(f"{where}: {name} has the shape {stored[name].shape}, its configuration asks "
                             f"for {shape}: weights and configuration are not of the same model")


def shapes_of(config):
    """name -> shape of every parameter of the dense network."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def require(file, settings, allowed):
    for key, values in allowed.items():
        if settings.get(key, values[0]) not in values:
            raise InputError(f"{file}: {key} is {settings[key]!r}; "
                             f"only {' or '.join(map(repr, values))} is supported")


def make_config(file, kind, keys, theirs, **known):
    """The Config of other people's settings. keys: ours -> theirs; known: ours, where theirs is left out."""
    values = known | {ours: theirs[key] for ours, key in keys.items() if theirs.get(key) is not None}
    try:
        values.setdefault("kv_heads", values["heads"])
        values.setdefault("ffn", 4 * values["width"])
        values |= {name: float(values[name]) for name in ("norm_eps", "rope_base") if name in values}
        return Config(kind, **{ours: values[ours] for ours in {*keys, *known, "kv_heads"}})
    except (KeyError, TypeError) as e:
        raise InputError(f"{file} does not describe a model completely (missing or unusable: {e}): "
                         "get the file again") from None


# ------------------------------------------------------------------------------------ Hugging Face: reading

def huggingface_config(file):
    """config.json -> Config. Values left out have transformers' defaults."""
    theirs = read_json(file)
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{file}: model_type is {kind!r}; only {', '.join(FAMILIES)} can be read")
    family = FAMILIES[kind]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theirs["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta"))
    theirs["rope_scaling"] = rope.get("rope_type", rope.get("type", "default"))
    theirs["layer_types"] = set(theirs.get("layer_types") or ["full_attention"])
    config = make_config(file, kind, column(SETTINGS, family.column), theirs, **family.defaults)
    only = dict(quantization_config=(None,), rope_scaling=("default",), layer_types=({"full_attention"},),
                head_dim=(config.head_size, None))
    require(file, theirs, family.only | only)
    return config


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""
    file: Path
    key: str
    shape: tuple
    bits: int   # of a number

    def read(self):
        with opened(self.file) as f:
            return f.get_tensor(self.key)


def opened(file):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file} is missing, truncated or not a safetensors file ({e}): "
                         "copy or save it again") from None


def read_headers(files):
    """name in the file -> Stored, of all tensors of safetensors files."""
    found = {}
    for file in files:
        with opened(file) as f:
            for key in f.keys():  # noqa: SIM118 (a file, no dict)
                part = f.get_slice(key)
                bits = dict(F64=64, F32=32, F16=16, BF16=16).get(part.get_dtype(), 8)
                found[key] = Stored(file, key, tuple(part.get_shape()), bits)
    return found


class HuggingFaceSource(Source):
    def __init__(self, folder):
        self.path, self.config = folder, huggingface_config(folder / "config.json")
        self.family = FAMILIES[self.config.kind]
        self.shapes, files = shapes_of(self.config), safetensors_files(folder)
        wanted = {self.theirs(name): shape[::-1] if is_transposed(name, self.family) else shape
                  for name, shape in self.shapes.items()}
        self.stored = {key.removeprefix("transformer.").removeprefix("model."): stored
                       for key, stored in read_headers(files).items()}
        head = ("lm_head.weight",) if self.config.tied else ()  # some files write the shared matrix twice
        check_tensors(folder, wanted, self.stored, self.config.kind, NOT_WEIGHTS + head)
        self.bytes = sum(file.stat().st_size for file in files)
        self.bits = {name: self.stored[self.theirs(name)].bits for name in self.shapes}

    def theirs(self, name):
        return their_name(name, self.family.column)

    def get(self, name, rows=None):
        stored = self.stored[self.theirs(name)]
        tensor = stored.read()
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{stored.file}: {stored.key} is stored as {tensor.dtype}: "
                             "get the model in float32, float16 or bfloat16")
        tensor = tensor.t() if is_transposed(name, self.family) else tensor
        return tensor if tensor.dim() == 1 else tensor[:rows]


def safetensors_files(folder):
    """One file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file() and not (folder / "model.safetensors").is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise InputError(f"{index} has no weight_map, which says where the weights are: get it again")
        files = [folder / name for name in sorted(set(names.values()))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise InputError(f"{folder} lacks {len(lost)} of the {len(files)} shards in {index.name}, "
                             f"{lost[0]} among them: copy or download it")
    if not files and list(folder.glob("*.bin")):
        raise InputError(f"{folder} has pickled weights (*.bin), and opening a pickle can run code. If you "
                         "trust it, convert it with transformers: "
                         f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)")
    if not files:
        raise InputError(f"{folder} has a config.json but no *.safetensors: copy the weights there")
    return files


# ------------------------------------------------------------------------------------ Hugging Face: writing

def export(model, tokenizer, out, dtype=torch.float32):
    """Write a dense Hugging Face folder; it appears when it is complete.

    Every layer is multiplied out: B A of a low-rank one, W + s B A of an adapted one, s q + o of a quantized
    one; a file of them at a time, so that memory never holds the dense model.
    """
    out = Path(out)
    check_folder(out, new=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tied = model.config.tied and isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    config = replace(model.config, tied=tied)
    family, shapes = FAMILIES[config.kind], shapes_of(config)
    files = sharded({name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()})
    weight_map = {}
    for file, names in files.items():
        tensors = {}
        for name in names:
            key = ("" if name.startswith("head.") else family.prefix) + their_name(name, family.column)
            tensor = dense_tensor(model, name)
            tensors[key] = (tensor.T if is_transposed(name, family) else tensor).to(dtype).contiguous()
        write_tensors(partial / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = dict(metadata={}, weight_map=weight_map)
        write_atomic(partial / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    write_atomic(partial / "config.json", json.dumps(their_config(config, dtype, tokenizer), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)


@torch.no_grad()
def dense_tensor(model, name):
    """A parameter of the dense model that computes the same, by its name there."""
    module, parameter = name.rsplit(".", 1)
    module = model.get_submodule(module)
    return dense_weight(module) if parameter == "weight" else module.bias


def their_config(config, dtype, tokenizer):
    """transformers' config.json."""
    family, values = FAMILIES[config.kind], config.as_dict()
    settings = {key: values[ours] for ours, key in column(SETTINGS, family.column).items()}
    plain = {key: allowed[0] for key, allowed in family.only.items()}
    ends = tokenizer and dict(bos_token_id=tokenizer.begin, eos_token_id=sorted(tokenizer.stop_ids))
    return dict(model_type=config.kind, architectures=[family.network], torch_dtype=str(dtype)[6:],
                **settings, **plain, **(ends or dict(bos_token_id=None, eos_token_id=None)))


# ------------------------------------------------------------------------------------------------------ GGUF

def neighbour_rows(heads, head_size):
    """The rows of a W^Q or W^K for neighbours that one for halves takes: 0 2 4 ... 1 3 5 ... of each head."""
    rows = torch.arange(heads * head_size).view(heads, head_size // 2, 2)
    return rows.transpose(1, 2).reshape(-1)  # (heads, d/2, 2) -> (heads, 2, d/2) -> rows


def gguf_config(file, fields, packed):
    known = [kind for kind, family in FAMILIES.items() if family.gguf_neighbours is not None]
    require(file, fields, {"general.architecture": known})
    kind = fields.get("general.architecture", known[0])
    theirs = {key.removeprefix(f"{kind}."): value for key, value in fields.items()}
    embed = packed.get("token_embd.weight")
    config = make_config(file, kind, column(SETTINGS, "gguf"), theirs, vocab_size=embed and embed.shape[0],
                         tied="output.weight" not in packed, rope_base=10000.0)
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    require(file, theirs, {"rope.scaling.type": ("none",), "expert_count": (0,)}
            | dict.fromkeys(sizes, (config.head_size,)))
    return replace(config, norm_eps=float(f"{config.norm_eps:.7g}"))  # the digits that a float32 has


class GGUFSource(Source):
    def __init__(self, file):
        self.path, self.bytes = file, file.stat().st_size
        self.fields, self.packed = read_gguf(file)
        self.config = gguf_config(file, self.fields, self.packed)
        self.shapes = shapes_of(self.config)
        wanted = {their_name(name, "gguf"): shape for name, shape in self.shapes.items()}
        check_tensors(file, wanted, self.packed, self.config.kind)
        self.bits = {name: self.packed[their_name(name, "gguf")].bits for name in self.shapes}

    def get(self, name, rows=None):
        packed = self.packed[their_name(name, "gguf")]
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(name.split(".")[-2])
        order = torch.arange(packed.rows)
        if heads and FAMILIES[self.config.kind].gguf_neighbours:
            order = neighbour_rows(heads, self.config.head_size)
        return read_rows(self.path, packed, order[:rows])

    def tokenizer(self):
        return from_gguf(self.path.stem, self.fields) if "tokenizer.ggml.model" in self.fields else None
