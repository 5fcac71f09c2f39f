"""Models in other people's files: Hugging Face folders, read and written; common/gguf_file.py reads GGUF.

They differ from ours in four things, which the tables below say:

    settings   what a configuration calls the width, the heads, ...
    names      of the tensors
    layout     y = W x everywhere but in GPT-2's Hugging Face files, whose Conv1D stores W transposed
    RoPE       turns pairs of a head's coordinates: here and at Hugging Face (0, d/2) (1, d/2 + 1) ..., in a
               Llama's GGUF neighbours (0, 1) (2, 3) ...: there the rows of W^Q and W^K have another order

    source = HuggingFaceSource(Path("Llama-2-7b-hf"))
    for name, tensor in source.tensors(): ...       # "blocks.0.attention.q.weight", in the dtype of the file
    export(model, tokenizer, "out/hf")              # dense, for transformers, peft and llama.cpp's converter
"""
import json
import math
from dataclasses import fields, replace
from typing import NamedTuple

import torch
import torch.nn as nn

from common.cli import check_folder, refuse, write_atomic
from common.storage import read_headers, replaced, write_shards
from common.tokenizer import blamed_on, load_tokenizer, read_json
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
    window          -                     sliding_window             -
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
# RoPE's scalings: our settings -> Hugging Face's.
SCALINGS = {"default": {}, "linear": dict(rope_factor="factor"), "dynamic": dict(rope_factor="factor"),
            "llama3": dict(rope_factor="factor", rope_low="low_freq_factor", rope_high="high_freq_factor",
                           rope_original="original_max_position_embeddings"),
            "yarn": dict(rope_factor="factor", rope_low="beta_slow", rope_high="beta_fast",
                         rope_original="original_max_position_embeddings", rope_attention="attention_factor")}
ROPE_ONLY = dict(partial_rotary_factor=(None, 1.0), truncate=(True,), mscale=(None,), mscale_all_dim=(None,))
LIKE_LLAMA = dict(tied=False, rope_base=10000.0, head_dim=0, attention_bias=False, window=0)
LLAMA_ONLY = dict(hidden_act=("silu", "swish"), mlp_bias=(False,), use_sliding_window=(False,))
GPT2_ALIASES = dict(n_positions="max_position_embeddings", n_layer="num_hidden_layers",
                    n_head="num_attention_heads", n_embd="hidden_size")
GPT2_ONLY = dict(activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
                 scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                 add_cross_attention=(False,))
TYPES = {field.name: field.type for field in fields(Config)}  # of our settings
LARGEST = dict.fromkeys(TYPES, 1 << 26) | dict(blocks=1 << 12, rope_base=1e12)
# What a model does not read: constants in old files, the head of a classifier.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "score.weight")

class Family(NamedTuple):
    """How others write down an architecture of model.py."""
    network: str                  # transformers' class
    column: str = "llama"         # of the tables
    prefix: str = "model."        # of their tensors, the head's aside
    defaults: dict = LIKE_LLAMA   # our settings where their configuration leaves them out
    only: dict = LLAMA_ONLY       # others: the values with which model.py computes the same, the usual first
    conv1d: bool = False          # the matrices of blocks are stored transposed
    gguf_neighbours: bool = True  # RoPE's pairs in a GGUF are neighbours

FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", "gpt2", "transformer.", dict(tied=True), GPT2_ONLY, conv1d=True),
    "llama": Family("LlamaForCausalLM"), "mistral": Family("MistralForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM", defaults=LIKE_LLAMA | dict(tied=True, rope_base=2e6)),
    "qwen2": Family("Qwen2ForCausalLM", gguf_neighbours=False),
    "qwen3": Family("Qwen3ForCausalLM", gguf_neighbours=False)}

def column(table, name):
    """A column of a table: ours -> theirs."""
    header, *rows = [line.split() for line in table.strip().splitlines()]
    at = header.index(name)
    return {row[0]: row[at] for row in rows if row[at] != "-"}

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

        path             where it is
        config, layers   the Config; what config.json says of layers that were swapped (in our folders)
        shapes, stored   our name of a tensor -> its shape; -> what has .bits, of a number as it is stored"""
    layers, transposed = {}, ()  # transposed: names of what is stored as (in, out)

    def find(self, there, shapes, theirs=str, optional=()):
        """Set `stored`; refuse the files of another model. there: theirs(name) -> Stored or PackedTensor.

        shapes: our name -> shape there. optional: ends of names that may be there, too."""
        wanted = {name: theirs(name) for name in shapes}
        missing = [key for key in wanted.values() if key not in there]
        refuse(missing, f"{self.path} lacks {len(missing)} of {len(wanted)} tensors, {''.join(missing[:1])} "
               "among them: get the files again")
        other = [key for key in sorted(there.keys() - wanted.values()) if not key.endswith(optional)]
        refuse(other, f"{self.path} has {len(other)} tensors that a {self.config.kind} model doesn't have, "
               f"{''.join(other[:1])} among them: is it another, or quantized?")
        for name, key in wanted.items():
            refuse(there[key].shape != shapes[name],
                   f"{self.path}: {key} has the shape {there[key].shape}, its configuration asks for "
                   f"{shapes[name]}: weights and configuration are not of one model")
        self.stored = {name: there[key] for name, key in wanted.items()}

    def get(self, name, rows=None):
        """A tensor, (out, in) for a matrix, in the stored dtype; of a matrix the first rows only."""
        tensor = self.stored[name].read()
        tensor = tensor.t() if name in self.transposed else tensor
        return tensor if tensor.dim() < 2 else tensor[:rows]

    def tensors(self, forms=None):
        """(name, tensor) of all. forms: of quant.formats; a matrix that is stored so is a QuantMatrix."""
        for name in self.shapes:
            yield name, self.get(name)

    def tokenizer(self):
        """The one beside the weights, or None."""
        files = [self.path / name for name in ("tokenizer.json", "tokenizer.model")]
        return load_tokenizer(self.path) if any(file.is_file() for file in files) else None

def shapes_of(config):
    """name -> shape of every parameter of the dense network."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}

def make_config(file, settings, keys=None):
    """Config(**settings), each of the type that its field has. keys: our names -> theirs, for the error."""
    for name, value in settings.items():
        kind = TYPES.get(name)
        right = type(value) is kind or (type(value), kind) in ((int, float), (list, tuple))
        refuse(not right or kind in (int, float) and not 0 <= value <= LARGEST[name],
               f"{file}: {(keys or {}).get(name, name)} is {str(value)[:50]}, and no model can have that")
    return Config(**{name: TYPES[name](value) for name, value in settings.items()})

def read_settings(file, kind, column_name, theirs, defaults, scaling, rope):
    """The Config of other people's settings. defaults: ours, where one is left out. scaling: one of SCALINGS,
    whose numbers, in Hugging Face's words, are in `rope`."""
    keys = column(SETTINGS, column_name) | SCALINGS[scaling]
    theirs = theirs | {key: rope.get(key) for key in SCALINGS[scaling].values()}
    found = {ours: theirs[key] for ours, key in keys.items() if theirs.get(key) is not None}
    settings = dict.fromkeys(keys) | dict(kind=kind, kv_heads=found.get("heads")) | defaults
    settings["rope_scaling"] = scaling.replace("default", "linear")
    if scaling == "yarn":
        factor = rope.get("factor")
        longer = 1 + 0.1 * math.log(factor) if isinstance(factor, (int, float)) and factor > 1 else 1.0
        settings |= dict(rope_low=1.0, rope_high=32.0, rope_attention=longer)
    settings |= found
    if settings["ffn"] is None and type(settings["width"]) is int:
        settings["ffn"] = 4 * settings["width"]
    config = make_config(file, settings, keys)
    return replace(config, head_dim=0) if config.head_dim * config.heads == config.width else config

def require(file, settings, allowed):
    for key, values in allowed.items():
        value, known = settings.get(key, values[0]), " or ".join(map(repr, values))
        refuse(value not in values, f"{file}: {key} is {value!r}; only {known} is supported")

# ------------------------------------------------------------------------------------ Hugging Face: reading

def huggingface_config(file):
    """config.json -> Config. The few values that files leave out have transformers' defaults."""
    theirs = {"model_type": None} | read_json(file)
    require(file, theirs, {"model_type": list(FAMILIES)})
    kind = theirs["model_type"]
    family = FAMILIES[kind]
    for key, alias in GPT2_ALIASES.items() if kind == "gpt2" else ():
        require(file, theirs, {alias: (theirs.setdefault(key, theirs.get(alias)),)})
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    refuse(not isinstance(rope, dict), f"{file}: rope_scaling or rope_parameters is no object: get it again")
    theirs["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta"))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    require(file, {"rope_scaling": scaling}, {"rope_scaling": list(SCALINGS)})
    require(file, theirs | rope, ROPE_ONLY)
    original = "original_max_position_embeddings"
    require(file, {original: rope.get(original)} | theirs, {original: (rope.get(original),)})
    rope = {original: theirs.get("max_position_embeddings")} | rope
    theirs["sliding_window"] = theirs.get("sliding_window", 4096) if kind == "mistral" else 0
    config = read_settings(file, kind, family.column, theirs, family.defaults, scaling, rope)
    require(file, theirs, family.only | dict(quantization_config=(None,), is_causal=(True,)))
    refuse(kind != "mistral" and "sliding" in str(theirs.get("layer_types")), f"{file}: layer_types has "
           "blocks with a window, and only in a mistral, in all blocks, one is supported")
    if kind != "smollm3":
        return config
    turns, blocks = theirs.get("no_rope_layers"), range(config.blocks)
    refuse(type(turns) is not list or len(turns) < len(blocks) or not all(turn in (0, 1) for turn in turns),
           f"{file}: no_rope_layers is {str(turns)[:80]}; only a 0 or 1 for each block is supported")
    return replace(config, no_rope=tuple(i for i in blocks if not turns[i]))

class HuggingFaceSource(Source):
    def __init__(self, folder):
        self.path, self.config = folder, huggingface_config(folder / "config.json")
        family, there = FAMILIES[self.config.kind], read_headers(safetensors_files(folder))

        def theirs(name):  # old files have no prefix, a compiled model's have one more
            full = full_name(name, family)
            others = their_name(name, family.column), f"_orig_mod.{full}"
            return next((key for key in others if key in there), full)
        embed, head = theirs("embed.weight"), theirs("head.weight")
        if self.config.tied and head in there:  # too, or alone; one that differs is not tied
            same = embed not in there or torch.equal(there[embed].read(), there[head].read())
            self.config = replace(self.config, tied=same)
            there[embed if same else head] = there.pop(head)
        self.shapes = shapes_of(self.config)
        self.transposed = {name for name in self.shapes if is_transposed(name, family)}
        turned = {name: self.shapes[name][::-1] for name in self.transposed}
        self.find(there, self.shapes | turned, theirs, NOT_WEIGHTS)

def safetensors_files(folder):
    """model.safetensors, or else the shards that its index names; others in the folder are not the model."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    refuse(not index.is_file(), f"{folder} has neither {single.name} nor {index.name}: copy them there. "
           "Pickled weights (*.bin) can run code; if you trust them: transformers' AutoModelForCausalLM."
           f"from_pretrained({str(folder)!r}).save_pretrained(OUT)")
    with blamed_on(index):
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]

# ------------------------------------------------------------------------------------ Hugging Face: writing

@torch.no_grad()
def export(model, tokenizer, out):
    """Write a dense Hugging Face folder in float32, which appears when it is complete.

    Every layer is multiplied out: B A of a low-rank one, W + s B A of an adapted one, s q + o of integers."""
    check_folder(out, new=True)
    tied = model.config.tied and isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    config = replace(model.config, tied=tied)
    family, shapes = FAMILIES[config.kind], shapes_of(config)
    ours = {full_name(name, family): name for name in shapes}

    def tensor_of(key):
        module, _, parameter = ours[key].rpartition(".")
        module = model.get_submodule(module)
        tensor = dense_weight(module) if parameter == "weight" else module.bias
        return (tensor.T if is_transposed(ours[key], family) else tensor).float()
    with replaced(out) as folder:
        sizes = {key: 4 * math.prod(shapes[name]) for key, name in ours.items()}
        files = write_shards(folder, sizes, tensor_of)
        if len(set(files.values())) > 1:
            index = json.dumps(dict(metadata={}, weight_map=files), indent=1) + "\n"
            write_atomic(folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(folder)
        write_atomic(folder / "config.json", json.dumps(their_config(config, tokenizer), indent=2) + "\n")

def their_config(config, tokenizer):
    """transformers' config.json."""
    family = FAMILIES[config.kind]
    values = vars(config) | dict(head_dim=config.head_size, window=config.window or None)
    settings = {key: values[ours] for ours, key in column(SETTINGS, family.column).items()}
    settings |= {key: allowed[0] for key, allowed in family.only.items()}
    if config.kind == "smollm3":
        settings["no_rope_layers"] = [int(i not in config.no_rope) for i in range(config.blocks)]
    if config.rope_factor != 1:
        rope = {key: values[ours] for ours, key in SCALINGS[config.rope_scaling].items()}
        settings["rope_scaling"] = rope | dict(rope_type=config.rope_scaling)
    begin, ends = (tokenizer.begin, sorted(tokenizer.stop_ids)) if tokenizer else (None, None)
    return dict(model_type=config.kind, architectures=[family.network], torch_dtype="float32",
                pad_token_id=None, bos_token_id=begin, eos_token_id=ends, **settings)
