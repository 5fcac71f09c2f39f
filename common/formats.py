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

A file is mapped anew for each tensor: reading needs no more memory than the largest. Nothing is unpickled.
"""
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import InputError, check_folder, refuse, write_atomic
from common.gguf_file import read_gguf, read_rows
from common.storage import opened, replaced, sharded, write_tensors
from common.tokenizer import from_gguf, load_tokenizer, read_json
from model import Config, Transformer, dense_weight, rope_frequencies

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
        dict(activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), scale_attn_weights=(True,),
             scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)), conv1d=True),
    "llama": Family(
        "llama", "model.", "LlamaForCausalLM", LIKE_LLAMA | dict(context=2048),
        dict(hidden_act=("silu", "swish"), attention_bias=(False,), mlp_bias=(False,)), gguf_neighbours=True),
    "qwen2": Family(
        "llama", "model.", "Qwen2ForCausalLM", LIKE_LLAMA | dict(context=32768),
        dict(hidden_act=("silu", "swish"), use_sliding_window=(False,)), gguf_neighbours=False),
}
# RoPE's scalings at Hugging Face: our settings -> theirs.
SCALINGS = {"default": {}, "linear": dict(rope_factor="factor"),
            "llama3": dict(rope_factor="factor", rope_low="low_freq_factor", rope_high="high_freq_factor",
                           rope_original="original_max_position_embeddings")}
GPT2_ALIASES = dict(n_positions="max_position_embeddings", n_layer="num_hidden_layers",
                    n_head="num_attention_heads", n_embd="hidden_size")
# What a model does not read: constants in old files, the head of a classifier.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "score.weight")


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


class Source:
    """The protocol of a model in files. Nothing stays open between two calls.

        path, bytes           where it is; the size of its files
        config, layers        the Config; what config.json says of layers that were swapped (in our folders)
        shapes, bits          our name of a tensor -> its shape; -> bits of a number as it is stored
        get(name, rows=None)  a tensor, (out, in) for a matrix, in the stored dtype; only its first rows
    """
    layers = {}

    def find(self, stored, shapes, theirs=str, optional=()):
        """Set `stored`, our name of a tensor -> where it is, and `bits`; refuse the files of another model.

        stored: the name there -> Stored or Packed. shapes: our name -> shape there, under theirs(our name).
        optional: ends of names that may be there."""
        wanted = {name: theirs(name) for name in shapes}
        missing = [key for key in wanted.values() if key not in stored]
        refuse(missing, f"{self.path} lacks {len(missing)} of {len(wanted)} tensors, {''.join(missing[:1])} "
               "among them: get the files again")
        other = [key for key in sorted(stored.keys() - wanted.values()) if not key.endswith(optional)]
        refuse(other, f"{self.path} has {len(other)} tensors that a {self.config.kind} model doesn't have, "
               f"{''.join(other[:1])} among them: is it another, or quantized?")
        for name, key in wanted.items():
            refuse(stored[key].shape != shapes[name],
                   f"{self.path}: {key} has the shape {stored[key].shape}, its configuration asks for "
                   f"{shapes[name]}: weights and configuration are not of one model")
        self.stored = {name: stored[key] for name, key in wanted.items()}
        self.bits = {name: tensor.bits for name, tensor in self.stored.items()}

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
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    refuse(len(files) != 1, f"{path} is no model that can be read: neither a folder with config.json and "
           f"model.safetensors, nor a .gguf file or a folder with one (it has {len(files)})")
    return GGUFSource(files[0])


def shapes_of(config):
    """name -> shape of every parameter of the dense network."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


TYPES = {field.name: field.type for field in fields(Config)}
LARGEST = dict.fromkeys(TYPES, 1 << 26) | dict(blocks=1 << 12, rope_base=1e12)


def make_config(file, settings, keys=None):
    """Config(**settings), each of the type that its field has. keys: our names -> theirs, for the error."""
    for name, value in settings.items():
        kind = TYPES.get(name)
        right = type(value) is kind or kind is float and type(value) is int
        refuse(not right or kind in (int, float) and not 0 <= value <= LARGEST[name],
               f"{file}: {(keys or {}).get(name, name)} is {str(value)[:50]}, and no model can have that")
    return Config(**{name: TYPES[name](value) for name, value in settings.items()})


def read_settings(file, kind, keys, theirs, defaults):
    """The Config of other people's settings. keys: ours -> theirs; defaults: ours, where one is left out."""
    found = {ours: theirs[key] for ours, key in keys.items() if theirs.get(key) is not None}
    settings = dict.fromkeys(keys) | dict(kind=kind, kv_heads=found.get("heads")) | defaults | found
    if settings["ffn"] is None and type(settings["width"]) is int:
        settings["ffn"] = 4 * settings["width"]
    return make_config(file, settings, keys)


def require(file, settings, allowed):
    for key, values in allowed.items():
        value, known = settings.get(key, values[0]), " or ".join(map(repr, values))
        refuse(value not in values, f"{file}: {key} is {value!r}; only {known} is supported")


# ------------------------------------------------------------------------------------ Hugging Face: reading

def huggingface_config(file):
    """config.json -> Config. Values left out have transformers' defaults."""
    theirs = {"model_type": None} | read_json(file)
    require(file, theirs, {"model_type": [*FAMILIES, "mistral"]})
    kind = theirs["model_type"]
    if kind == "mistral":  # a Llama whose attention looks back no farther than its window
        require(file, {"sliding_window": 4096} | theirs, {"sliding_window": (None,)})
        kind = "llama"
    family = FAMILIES[kind]
    for key, alias in GPT2_ALIASES.items() if kind == "gpt2" else ():
        require(file, theirs, {alias: (theirs.setdefault(key, theirs.get(alias)),)})
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    refuse(not isinstance(rope, dict), f"{file}: rope_scaling or rope_parameters is no object: get it again")
    theirs["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta"))
    scaling, original = rope.get("rope_type", rope.get("type", "default")), "original_max_position_embeddings"
    require(file, {"rope_scaling": scaling}, {"rope_scaling": list(SCALINGS)})
    require(file, theirs, {original: (rope.get(original),)})
    theirs |= {key: rope.get(key) for key in SCALINGS[scaling].values()}
    keys = column(SETTINGS, family.column) | SCALINGS[scaling]
    config = read_settings(file, kind, keys, theirs, family.defaults)
    only = dict(quantization_config=(None,), is_causal=(True,), head_dim=(config.head_size, None),
                layer_types=(None, ["full_attention"] * config.blocks))
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
        with opened(self.file) as file:
            return file.get_tensor(self.key)


def read_headers(files):
    """name in the file -> Stored, of all tensors of safetensors files."""
    found = {}
    for path in files:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (a file, no dict)
                part = file.get_slice(key)
                bits = dict(F64=64, F32=32, F16=16, BF16=16).get(part.get_dtype(), 8)
                found[key] = Stored(path, key, tuple(part.get_shape()), bits)
    return found


class HuggingFaceSource(Source):
    def __init__(self, folder):
        self.path, self.config = folder, huggingface_config(folder / "config.json")
        self.family = FAMILIES[self.config.kind]
        files, stored = safetensors_files(folder), {}
        for key, tensor in read_headers(files).items():
            name = key.removeprefix("_orig_mod.").removeprefix("transformer.").removeprefix("model.")
            other = stored.setdefault(name, tensor).key
            refuse(other != key, f"{folder} has both {other} and {key}: remove one of them")
        embed, head = self.theirs("embed.weight"), self.theirs("head.weight")
        if self.config.tied and head in stored:  # too, or alone; one that differs is not tied
            same = embed not in stored or torch.equal(stored[embed].read(), stored[head].read())
            self.config = replace(self.config, tied=same)
            stored[embed if same else head] = stored.pop(head)
        self.shapes = shapes_of(self.config)
        there = {name: shape[::-1] if is_transposed(name, self.family) else shape
                 for name, shape in self.shapes.items()}
        self.find(stored, there, self.theirs, NOT_WEIGHTS)
        self.bytes = sum(file.stat().st_size for file in files)

    def theirs(self, name):
        return their_name(name, self.family.column)

    def get(self, name, rows=None):
        tensor = self.stored[name].read()
        refuse(not tensor.is_floating_point(), f"{self.path}: {name} is stored as {tensor.dtype}")
        tensor = tensor.t() if is_transposed(name, self.family) else tensor
        return tensor if tensor.dim() == 1 else tensor[:rows]


def safetensors_files(folder):
    """model.safetensors, or else the shards that its index names; others in the folder are not the model."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    refuse(not index.is_file() and list(folder.glob("*.bin")),
           f"{folder} has pickled weights (*.bin), and opening a pickle can run code. If you trust it: "
           f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)")
    refuse(not index.is_file(), f"{folder} has neither {single.name} nor {index.name}: copy them there")
    names = read_json(index).get("weight_map")
    whole = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    refuse(not whole, f"{index} has no weight_map, which says where the weights are: get it again")
    files = [folder / name for name in sorted(set(names.values()))]
    lost = [file.name for file in files if not file.is_file()]
    refuse(lost, f"{folder} lacks {len(lost)} of the {len(files)} shards in {index.name}: get {lost[:1]}")
    return files


@torch.no_grad()
def export(model, tokenizer, out, dtype=torch.float32):
    """Write a dense Hugging Face folder, which appears when it is complete, a file of tensors at a time.

    Every layer is multiplied out: B A of a low-rank one, W + s B A of an adapted one, s q + o of integers."""
    check_folder(out, new=True)
    tied = model.config.tied and isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    config = replace(model.config, tied=tied)
    family, weight_map = FAMILIES[config.kind], {}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes_of(config).items()}
    with replaced(out) as folder:
        for file, names in sharded(sizes).items():
            tensors = {}
            for name in names:
                key = ("" if name.startswith("head.") else family.prefix) + their_name(name, family.column)
                module, _, parameter = name.rpartition(".")
                module = model.get_submodule(module)
                tensor = dense_weight(module) if parameter == "weight" else module.bias
                tensors[key] = (tensor.T if is_transposed(name, family) else tensor).to(dtype).contiguous()
            write_tensors(folder / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
        if file != "model.safetensors":
            index = json.dumps(dict(metadata={}, weight_map=weight_map), indent=1) + "\n"
            write_atomic(folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(folder)
        settings = json.dumps(their_config(config, dtype, tokenizer), indent=2) + "\n"
        write_atomic(folder / "config.json", settings)


def their_config(config, dtype, tokenizer):
    """transformers' config.json."""
    family, values = FAMILIES[config.kind], config.as_dict()
    settings = {key: values[ours] for ours, key in column(SETTINGS, family.column).items()}
    plain = {key: allowed[0] for key, allowed in family.only.items()}
    if config.rope_factor != 1:
        scaling = "llama3" if config.rope_original else "linear"
        rope = {key: values[ours] for ours, key in SCALINGS[scaling].items()}
        plain["rope_scaling"] = dict(rope_type=scaling) | rope
    ends = tokenizer and dict(bos_token_id=tokenizer.begin, eos_token_id=sorted(tokenizer.stop_ids))
    return dict(model_type=config.kind, architectures=[family.network], torch_dtype=str(dtype)[6:],
                **settings, **plain, **(ends or dict(bos_token_id=None, eos_token_id=None)))


# ------------------------------------------------------------------------------------------------------ GGUF

# Settings that change the network, and the values with which they don't.
GGUF_ONLY = {"rope.scaling.type": ("linear", "none"), "rope.scaling.attn_factor": (1.0,),
             "attention.clamp_kqv": (0.0,), "attention.causal": (True,), "logit_scale": (0.0, 1.0),
             "expert_count": (0,), "split.count": (0, 1)}


def gguf_config(file, fields, packed):
    known = [kind for kind, family in FAMILIES.items() if family.gguf_neighbours is not None]
    require(file, fields, {"general.architecture": known})
    kind = fields.get("general.architecture", known[0])
    theirs = {}
    for key, value in fields.items():  # a list has a value for each block
        alike = isinstance(value, list) and value and value.count(value[0]) == len(value)
        theirs[key.removeprefix(f"{kind}.")] = value[0] if alike else value
    embed, tied = packed.get("token_embd.weight"), "output.weight" not in packed
    defaults = dict(vocab_size=embed and embed.shape[0], tied=tied, rope_base=10000.0)
    if theirs.get("rope.scaling.type") != "none":  # as llama.cpp does, where the type is left out
        factor = theirs.get("rope.scaling.factor") or theirs.get("rope.scale_linear") or 1.0
        defaults |= dict(rope_factor=factor)
    config = read_settings(file, kind, column(SETTINGS, "gguf"), theirs, defaults)
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    require(file, theirs, GGUF_ONLY | dict.fromkeys(sizes, (config.head_size,)))
    return replace(config, norm_eps=float(f"{config.norm_eps:.7g}"))  # the digits that a float32 has


def scaled(file, config, factors):
    """The Config with Llama 3's scaling, of which a GGUF has only what RoPE's frequencies are divided by."""
    plain, known = rope_frequencies(config), [config]
    if config.rope_factor == 1:
        known += [replace(config, rope_factor=factor, rope_original=8192) for factor in (8.0, 32.0)]
    for other in known:
        if factors.shape == plain.shape and torch.allclose(plain / rope_frequencies(other), factors, 1e-3):
            return other
    raise InputError(f"{file}: rope_freqs.weight scales RoPE's frequencies as no Llama 3 does")


class GGUFSource(Source):
    def __init__(self, file):
        self.path, self.bytes = file, file.stat().st_size
        self.fields, packed = read_gguf(file)
        self.config = gguf_config(file, self.fields, packed)
        self.shapes = shapes_of(self.config)
        self.find(packed, self.shapes, lambda name: their_name(name, "gguf"), "rope_freqs.weight")
        if "rope_freqs.weight" in packed:
            self.config = scaled(file, self.config, read_rows(file, packed["rope_freqs.weight"]))

    def get(self, name, rows=None):
        """Its rows in our order: of RoPE's neighbours 0 2 4 ... 1 3 5 ... of each head."""
        packed = self.stored[name]
        order = torch.arange(packed.rows)
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(name.split(".")[-2])
        if heads and FAMILIES[self.config.kind].gguf_neighbours:
            order = order.view(heads, -1, 2).transpose(1, 2).reshape(-1)  # (heads, d/2, 2) -> (heads, 2, d/2)
        return read_rows(self.path, packed, order[:rows])

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
