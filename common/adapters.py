"""Adapters on disk, in PEFT's format: A and B of every LoRALinear (equation 7, section V.C).

    DIR/adapter_config.json          rank, alpha, and which layers have an adapter, in PEFT's words
    DIR/adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...
    DIR/BASE_ID                      a checksum of the base's configuration and weights; PEFT ignores it

The base itself, a thousand times as large, is never written: one serves many adapters. On another base an
adapter is refused. The checksum is of the weights before any rounding: at 16, 8 and 4 bits it is the same.

    adapter = load_adapter(model, "out/finetune", base_id("smollm2-135m"))    # a second call switches
    save_adapter("out/mine", model, "smollm2-135m", base_id("smollm2-135m"))
"""
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from checkpoint import open_model
from common.cli import refuse, write_atomic
from common.formats import FAMILIES, NAMES, column, full_name
from common.storage import read_tensors, write_tensors
from common.tokenizer import blamed_on, read_json
from lowrank import LoRALinear, swap_layers

FILES = ("adapter_config.json", "adapter_model.safetensors")
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # of A and B, that leave W as it is
# Others that are read, then those that change nothing once an adapter is trained (which layers have one, the
# names of the factors say). Any other must be off.
KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", "task_type",
         "rank_pattern", "alpha_pattern", "auto_mapping", "peft_version", "revision", "inference_mode",
         "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
         "eva_config", "megatron_core", "qalora_group_size"}
OURS = {theirs: name for table in ("llama", "gpt2") for name, theirs in column(NAMES, table).items()}
SAMPLED_ROWS = 4  # of each matrix of a base, for its checksum

@dataclass
class Adapter:
    """What a folder holds: y = W x + scale B A x. Where a layer has a scale of its own, B is multiplied."""
    folder: Path
    rank: int
    scale: float
    dropout: float
    factors: dict  # our name of a layer -> A (r, in) and B (out, r), float32
    base_name: str
    base_id: str   # None: whoever trained it left none, so nothing tells another base

    def __str__(self):
        targets = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in self.factors}))
        parameters = sum(A.numel() + B.numel() for A, B in self.factors.values())
        unchecked = f"; it names its base {self.base_name!r} without a checksum, which is believed"
        return (f"adapter {self.folder}: r = {self.rank} on {targets}, {len(self.factors)} layers, "
                f"{parameters:,} parameters{'' if self.base_id else unchecked}")

def our_name(key):
    """(our name of a layer, "A" or "B") of a tensor in PEFT's file; None if it is no such factor."""
    found = re.fullmatch(r"base_model\.model\.(?:model\.|transformer\.)?(?:(?:layers|h)\.(\d+)\.)?(.+)"
                         r"\.lora_([AB])\.weight", key)
    if found is None or found[2] not in OURS:
        return None
    block = f"blocks.{found[1]}." if found[1] else ""
    return block + OURS[found[2]], found[3]

def read_adapter(folder, model=None, base_id=None):
    """The Adapter in a folder. model: which it must fit. base_id: of the base at hand, which must be its."""
    folder = Path(folder)
    missing = [file for file in FILES if not (folder / file).is_file()]
    refuse(missing, f"{folder} is not an adapter: it has no {' and no '.join(missing)}")
    with blamed_on(folder):
        config, id_file = read_settings(folder / FILES[0]), folder / "BASE_ID"
        own_id = id_file.read_text().strip() if id_file.is_file() else None
        base_name, dropout = config.get("base_model_name_or_path") or "", config.get("lora_dropout") or 0.0
        refuse(base_id and own_id not in (None, base_id), f"{folder} was trained on another base: on "
               f"{base_name} with BASE_ID {own_id}, not on this one with {base_id}. Give that one")
        rank, scale = rank_and_scale(config)
        factors, layers = {}, model and adaptable(model)
        for name, (A, B, own_scale) in read_factors(folder / FILES[1], config).items():
            if layers:
                layer, size = layers.get(name), (A.shape[1], len(B))
                fits = layer is not None and size == (layer.in_features, layer.out_features)
                refuse(not fits, f"{folder}: its adapter for {name}, {size}, fits no layer of this model: it "
                       f"was trained on {base_name}")
                A, B = without_start(config.get("init_lora_weights"), layer, A, B, own_scale)
            factors[name] = A, B if own_scale == scale else B * (own_scale / scale)
        return Adapter(folder, rank, scale, nn.Dropout(dropout).p, factors, base_name, own_id)

def read_settings(file):
    """adapter_config.json: every setting in it is understood, or off."""
    config = read_json(file)
    starts = (*STARTS, "pissa") if config.get("fan_in_fan_out") else (*STARTS, "pissa", "olora")
    only = dict(peft_type=("LORA", None), bias=("none", None), init_lora_weights=starts)
    for key, value in config.items():
        known = value in only[key] if key in only else not value or key in KNOWN
        refuse(not known, f"{file}: {key} is {value!r}, which is not read here: let PEFT merge this adapter "
               "into its base, or convert it to plain LoRA")
    return config

def rank_and_scale(config, module=""):
    """r, and alpha / r or alpha / sqrt(r), of a layer by PEFT's name; of all whose end no pattern matches."""
    def own(key, patterns):
        table = config.get(patterns) or {}
        return next((table[p] for p in table if re.match(rf"(.*\.)?({p})$", module)), config[key])
    rank, alpha = own("r", "rank_pattern"), own("lora_alpha", "alpha_pattern")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

def without_start(start, layer, A, B, scale):
    """PiSSA (2404.02948) and OLoRA (2406.01775) take what B A is at first off W and train the rest of W with
    A and B. Here W stays whole: that product, made from W again, is taken off B A, at twice the rank."""
    if start in STARTS:
        return A, B
    base, rank = dict(layer.named_children()).get("base", layer), len(A)
    refuse(not isinstance(base, nn.Linear),
           f"an adapter that began as {start} changes its base's weights: give those in 16 bit")
    W = base.weight.detach().float().cpu()
    if start == "pissa":
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        return torch.cat((A, V[:rank])), torch.cat((B, -U[:, :rank] * (S[:rank] / scale)), dim=1)
    Q, R = torch.linalg.qr(W)
    return torch.cat((A, R[:rank])), torch.cat((B, -Q[:, :rank]), dim=1)

def read_factors(file, config):
    """Our name of a layer -> its (A, B, scale)."""
    pairs = {}
    for key, tensor in read_tensors(file):
        found, shape = our_name(key), tuple(tensor.shape)
        refuse(found is None, f"{file}: {key} is no factor A or B of a layer that is known here")
        name, letter = found
        rank, scale = rank_and_scale(config, key.removeprefix("base_model.model.").split(".lora_")[0])
        refuse(len(shape) != 2 or shape["AB".index(letter)] != rank, f"{file}: {key} has the shape {shape}; "
               f"of rank {rank} A must be ({rank}, in) and B (out, {rank})")
        pairs.setdefault(name, dict(scale=scale))[letter] = tensor.float()
    refuse(not pairs, f"{file} holds no factors")
    return {name: (pair["A"], pair["B"], pair["scale"]) for name, pair in pairs.items()}

def adaptable(model):
    """name -> linear layer, an adapted one as a whole."""
    layers = {}
    swap_layers(model, layers.__setitem__)  # which returns None: every layer stays
    return layers

def bits_of(model):
    """Of the weights of a base, the fewest."""
    from quant import matrices
    return min((m.bits for m in matrices(model)), default=16)

def load_adapter(model, folder, base_id=None):
    """Put a folder's adapter around the model's layers, in place of any other. Returns the Adapter."""
    take_off(model)
    adapter = read_adapter(folder, model, base_id)

    def make(name, base):
        if name not in adapter.factors:
            return None
        A, B = adapter.factors[name]
        layer = LoRALinear(base, len(A), 1, adapter.dropout)
        layer.scale = adapter.scale
        for parameter, factor in ((layer.A, A), (layer.B, B)):
            parameter.data.copy_(factor)
        return layer
    swap_layers(model, make)
    return adapter

def take_off(model):
    """Leave the bare base."""
    swap_layers(model, lambda name, layer: layer.base, wanted=lambda m: isinstance(m, LoRALinear))

def save_adapter(folder, model, base_name, base_id, tensors=None):
    """Write the model's LoRALinear layers. tensors: name -> whole factor, where the model holds parts."""
    folder, family = Path(folder), FAMILIES[model.config.kind]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(layers.values()))  # all have its scale
    modules = {name: full_name(f"{name}.weight", family).removesuffix(".weight") for name in layers}
    ranks = {modules[name]: m.r for name, m in layers.items() if m.r != one.r}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_name), r=one.r,
                  lora_alpha=one.scale * one.r, lora_dropout=one.dropout.p, bias="none",
                  rank_pattern=ranks, alpha_pattern={module: one.scale * r for module, r in ranks.items()},
                  target_modules=sorted({re.sub(r"^.*\.\d+\.", "", module) for module in modules.values()}),
                  fan_in_fan_out=family.conv1d, inference_mode=True)
    write_atomic(folder / "BASE_ID", base_id + "\n")
    write_atomic(folder / FILES[0], json.dumps(config, indent=2) + "\n")
    tensors, factors = tensors or dict(model.named_parameters()), {}
    for name, module in modules.items():
        for letter in "AB":
            value = tensors[f"{name}.{letter}"].detach().float().cpu()
            factors[f"base_model.model.{module}.lora_{letter}.weight"] = value
    write_tensors(folder / FILES[1], factors)

def base_id(name):
    """A checksum of a base: of its architecture, its vectors, and the first rows of each matrix, in float32.

    Reading a large base whole would take minutes; one that was trained further differs in every row."""
    source, digest = open_model(name), hashlib.sha256()
    architecture = source.config.as_dict()
    del architecture["dropout"]
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for key in sorted(source.shapes):
        digest.update(key.encode())
        digest.update(source.get(key, SAMPLED_ROWS).float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
