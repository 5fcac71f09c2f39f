"""Models in other people's files: Hugging Face folders, read and written; common/gguf_file.py reads GGUF.

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

from common.cli import check_folder, refuse, write_atomic
from common.rope import yarn_attention
from common.storage import opened, replaced, sharded, write_tensors
from common.tokenizer import load_tokenizer, read_json
from model import Config, Transformer, dense_weight

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
    head_dim        -                     head_dim                   attention.key_length
    attention_bias  -                     attention_bias             -
    window          -                     sliding_window             attention.sliding_window
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
    attention.q_norm  -                   self_attn.q_norm           attn_q_norm
    attention.k_norm  -                   self_attn.k_norm           attn_k_norm
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
    some: tuple = ()  # of SOME, what its configuration can say
    conv1d: bool = False           # the matrices of blocks are stored transposed
    gguf_neighbours: bool = None   # RoPE's pairs in a GGUF are neighbours; None: such a GGUF is not read


LIKE_LLAMA = dict(tied=False, norm_eps=1e-6, rope_base=10000.0, head_dim=0, attention_bias=False, window=0)
SILU, NO_BIAS = dict(hidden_act=("silu", "swish")), dict(mlp_bias=(False,))
SOME = ("head_dim", "attention_bias", "window", "full", "no_rope")  # settings of some families only
FAMILIES = {
    "gpt2": Family(
        "gpt2", "transformer.", "GPT2LMHeadModel",
        dict(vocab_size=50257, context=1024, blocks=12, heads=12, width=768, tied=True, norm_eps=1e-5),
        dict(activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), scale_attn_weights=(True,),
             scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)), conv1d=True),
    "llama": Family("llama", "model.", "LlamaForCausalLM", LIKE_LLAMA | dict(context=2048), SILU | NO_BIAS,
                    SOME[:2], gguf_neighbours=True),
    "mistral": Family("llama", "model.", "MistralForCausalLM", LIKE_LLAMA | dict(context=131072),
                      SILU, ("head_dim", "window"), gguf_neighbours=True),
    "smollm3": Family("llama", "model.", "SmolLM3ForCausalLM", LIKE_LLAMA | dict(
        context=32768, tied=True, rope_base=2e6), SILU | NO_BIAS, SOME, gguf_neighbours=True),
    "qwen2": Family("llama", "model.", "Qwen2ForCausalLM", LIKE_LLAMA | dict(context=32768), SILU,
                    ("head_dim", "window", "full"), gguf_neighbours=False),
    "qwen3": Family("llama", "model.", "Qwen3ForCausalLM", LIKE_LLAMA | dict(context=32768, head_dim=128),
                    SILU, SOME[:4], gguf_neighbours=False),
}
# RoPE's scalings at Hugging Face: our settings -> theirs.
SCALINGS = {"default": {}, "linear": dict(rope_factor="factor"), "dynamic": dict(rope_factor="factor"),
            "llama3": dict(rope_factor="factor", rope_low="low_freq_factor", rope_high="high_freq_factor",
                           rope_original="original_max_position_embeddings"),
            "yarn": dict(rope_factor="factor", rope_low="beta_slow", rope_high="beta_fast",
                         rope_original="original_max_position_embeddings", rope_attention="attention_factor")}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_ONLY = dict(partial_rotary_factor=(None, 1.0), truncate=(True,), mscale=(None,), mscale_all_dim=(None,))
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


def full_name(name, family):
    """A parameter's name in the files of a whole model."""
    return ("" if name.startswith("head.") else family.prefix) + their_name(name, family.column)


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

        stored: the name there -> Stored or PackedTensor. shapes: our name -> shape there, by theirs(name).
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

    def tensors(self, forms=None):
        """(name, tensor) of all. forms: of quant.formats; a matrix that is stored so is a QuantMatrix."""
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
    from common.gguf_file import GGUFSource  # which needs the tables above
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
        right = type(value) is kind or (type(value), kind) in ((int, float), (list, tuple))
        refuse(not right or kind in (int, float) and not 0 <= value <= LARGEST[name],
               f"{file}: {(keys or {}).get(name, name)} is {str(value)[:50]}, and no model can have that")
    return Config(**{name: TYPES[name](value) for name, value in settings.items()})


def read_settings(file, kind, keys, theirs, defaults):
    """The Config of other people's settings. keys: ours -> theirs; defaults: ours, where one is left out."""
    found = {ours: theirs[key] for ours, key in keys.items() if theirs.get(key) is not None}
    settings = dict.fromkeys(keys) | dict(kind=kind, kv_heads=found.get("heads")) | defaults | found
    if settings["ffn"] is None and type(settings["width"]) is int:
        settings["ffn"] = 4 * settings["width"]
    config = make_config(file, settings, keys)
    return replace(config, head_dim=0) if config.head_dim * config.heads == config.width else config


def settings_of(family):
    """Our names of its settings -> its own."""
    keys = column(SETTINGS, family.column)
    return {ours: key for ours, key in keys.items() if ours not in SOME or ours in family.some}


def require(file, settings, allowed):
    for key, values in allowed.items():
        value, known = settings.get(key, values[0]), " or ".join(map(repr, values))
        refuse(value not in values, f"{file}: {key} is {value!r}; only {known} is supported")


# ------------------------------------------------------------------------------------ Hugging Face: reading

def huggingface_config(file):
    """config.json -> Config. Values left out have transformers' defaults."""
    theirs = {"model_type": None} | read_json(file)
    require(file, theirs, {"model_type": list(FAMILIES)})
    kind = theirs["model_type"]
    family = FAMILIES[kind]
    for key, alias in GPT2_ALIASES.items() if kind == "gpt2" else ():
        require(file, theirs, {alias: (theirs.setdefault(key, theirs.get(alias)),)})
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    refuse(not isinstance(rope, dict), f"{file}: rope_scaling or rope_parameters is no object: get it again")
    theirs["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta"))
    scaling, original = rope.get("rope_type", rope.get("type", "default")), "original_max_position_embeddings"
    require(file, {"rope_scaling": scaling}, {"rope_scaling": list(SCALINGS)})
    require(file, theirs | rope, ROPE_ONLY)
    require(file, theirs, {original: (rope.get(original),)})
    theirs |= {key: rope.get(key) for key in SCALINGS[scaling].values()}
    defaults = family.defaults | dict(rope_scaling="linear" if scaling == "default" else scaling)
    if "rope_original" in SCALINGS[scaling]:
        defaults |= dict(rope_original=theirs.get("max_position_embeddings"))
    if scaling == "yarn":
        defaults |= dict(rope_low=1.0, rope_high=32.0, rope_attention=yarn_attention(rope.get("factor")))
    slides = kind == "mistral" or theirs.get("use_sliding_window")
    theirs["sliding_window"] = theirs.get("sliding_window", 0 if kind == "smollm3" else 4096) if slides else 0
    config = read_settings(file, kind, settings_of(family) | SCALINGS[scaling], theirs, defaults)
    require(file, theirs, family.only | dict(quantization_config=(None,), is_causal=(True,)))
    return config if kind == "mistral" else with_uneven_blocks(file, theirs, config)


def with_uneven_blocks(file, theirs, config):
    """The Config with the blocks that have no RoPE, and those that have no window."""
    blocks, smollm3 = range(config.blocks), config.kind == "smollm3"
    step, first = theirs.get("no_rope_layer_interval", 4), theirs.get("max_window_layers", 28)
    refuse(type(step) is not int or step < 1 or type(first) is not int, f"{file}: no_rope_layer_interval is "
           f"{step!r}, max_window_layers is {first!r}: get it again")

    def listed(key, usual, known):
        values = usual if theirs.get(key) is None else theirs[key]
        fits = type(values) is list and len(values) >= len(blocks) and all(value in known for value in values)
        refuse(not fits, f"{file}: {key} is {str(values)[:80]}; only {len(blocks)} of {known} are supported")
        return values
    turns = listed("no_rope_layers", [int((i + 1) % step > 0) for i in blocks], (0, 1)) if smollm3 else []
    config = replace(config, no_rope=tuple(i for i, turned in zip(blocks, turns) if not turned))
    slides = [config.window > 0 and (i in config.no_rope if smollm3 else i >= first) for i in blocks]
    kinds = listed("layer_types", [LAYER_TYPES[s] for s in slides], LAYER_TYPES[:2 if config.window else 1])
    full = tuple(i for i in blocks if kinds[i] == LAYER_TYPES[False])
    return replace(config, full=full if config.window else ())


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
                key = full_name(name, family)
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
    family, blocks = FAMILIES[config.kind], range(config.blocks)
    lost = config.as_dict().keys() & set(SOME) - set(family.some)
    refuse(lost, f"a {family.network} of transformers has no {', '.join(sorted(lost))}: no export can say it")
    values = vars(config) | dict(head_dim=config.head_size, window=config.window or None)
    settings = {key: values[ours] for ours, key in settings_of(family).items()}
    settings |= {key: allowed[0] for key, allowed in family.only.items()}
    if "no_rope" in family.some:
        settings["no_rope_layers"] = [int(i not in config.no_rope) for i in blocks]
    if "full" in family.some:
        types = [LAYER_TYPES[config.window > 0 and i not in config.full] for i in blocks]
        settings |= dict(use_sliding_window=config.window > 0, layer_types=types)
    if config.rope_factor != 1:
        rope = {key: values[ours] for ours, key in SCALINGS[config.rope_scaling].items()}
        settings["rope_scaling"] = rope | dict(rope_type=config.rope_scaling)
    ends = tokenizer and dict(bos_token_id=tokenizer.begin, eos_token_id=sorted(tokenizer.stop_ids))
    return dict(model_type=config.kind, architectures=[family.network], torch_dtype=str(dtype)[6:],
                pad_token_id=None, **settings, **(ends or dict(bos_token_id=None, eos_token_id=None)))
