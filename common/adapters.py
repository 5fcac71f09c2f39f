"""Adapters on disk, in PEFT's format: A and B of every LoRALinear (equation 7, section V.C).

    DIR/adapter_config.json          rank, alpha, and which layers have an adapter, in PEFT's words
    DIR/adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...
    DIR/BASE_ID                      a checksum of the base's configuration and weights; PEFT ignores it

The base itself, a thousand times as large, is never written: one serves many adapters. On another base an
adapter says nothing, so that is refused. The checksum is of the weights as the source has them, whatever
their format and before any rounding: at 16, 8 and 4 bits a base keeps its name.

    adapter = load_adapter(model, "out/finetune", base_id("smollm2-135m"))    # a second call switches
    save_adapter("out/mine", model, "smollm2-135m", base_id("smollm2-135m"))
"""
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint import open_model
from common.cli import InputError, write_atomic
from common.formats import FAMILIES, NAMES, column, their_name
from common.storage import read_tensors, sync_folder, write_tensors
from lowrank import LoRALinear, swap_layers

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Settings of PEFT that change y = W x + (alpha/r) B A x, and the values that turn them off.
PLAIN = dict(peft_type=("LORA",), bias=("none",), use_dora=(False, None), modules_to_save=(None, []),
             rank_pattern=({}, None), alpha_pattern=({}, None), lora_bias=(False, None),
             trainable_token_indices=(None,), layer_replication=(None,), target_parameters=(None, []))
SAMPLED_ROWS = 4  # of each matrix of a base, for its checksum


@dataclass
class Adapter:
    """What a folder holds. factors: our name of a layer -> A (r, in) and B (out, r), float32."""
    rank: int
    alpha: float
    scale: float         # what B A is multiplied with: alpha / r
    factors: dict
    base_name: str = ""
    base_id: str = None  # None: whoever trained it left none, so nothing tells another base
    dropout: float = 0.0
    folder: Path = field(default=None, compare=False)

    @property
    def targets(self):
        """The last names of the adapted layers."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.factors})

    @property
    def parameters(self):
        return sum(A.numel() + B.numel() for A, B in self.factors.values())

    def __str__(self):
        unchecked = f"; it names its base {self.base_name!r} without a checksum, which is believed"
        return (f"adapter {self.folder}: r = {self.rank} on {', '.join(self.targets)}, {len(self.factors)} "
                f"layers, {self.parameters:,} parameters{'' if self.base_id else unchecked}")


# --------------------------------------------------------------------------------------------------- names

def peft_name(name, kind):
    """blocks.3.attention.q of a llama -> base_model.model.model.layers.3.self_attn.q_proj"""
    family = FAMILIES[kind]
    theirs = their_name(name + ".weight", family.column).removesuffix(".weight")
    return f"base_model.model.{'' if name == 'head' else family.prefix}{theirs}"


def peft_target(target, kind):
    """PEFT's word for our q: q_proj. It compares ends of names, so GPT-2's two c_proj need more of theirs."""
    names = column(NAMES, FAMILIES[kind].column)
    full = next(theirs for ours, theirs in names.items() if ours.rsplit(".", 1)[-1] == target)
    return full if kind == "gpt2" else full.rsplit(".", 1)[-1]


def our_name(key):
    """(our name of a layer, "A" or "B") of a tensor in PEFT's file; None if it is no such factor."""
    parts = key.removeprefix("base_model.model.").replace(".default.", ".").split(".")
    if len(parts) < 3 or parts[-2] not in ("lora_A", "lora_B") or parts[-1] != "weight":
        return None
    factor = parts[-2][-1]
    module = ".".join(parts[:-2]).removeprefix("model.").removeprefix("transformer.")
    for table in ("llama", "gpt2"):
        ours = {theirs: name for name, theirs in column(NAMES, table).items()}
        pieces = module.split(".", 2)
        if module in ours:
            return ours[module], factor
        if len(pieces) == 3 and ours.get(pieces[0]) == "blocks" and pieces[2] in ours:
            return f"blocks.{pieces[1]}.{ours[pieces[2]]}", factor
    return None


# ------------------------------------------------------------------------------------------------- reading

def read_adapter(folder, model=None, base_id=None):
    """The Adapter in a folder. model: which it must fit. base_id: of the base at hand, which must be its."""
    folder = Path(folder)
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise InputError(f"{folder} is not an adapter: it has no {' and no '.join(missing)}")
    config = read_settings(folder / FILES[0])
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    own_id = (folder / "BASE_ID").read_text().strip() if (folder / "BASE_ID").is_file() else None
    base_name = config.get("base_model_name_or_path") or ""
    if base_id and own_id not in (None, base_id):
        raise InputError(f"{folder} was trained on another base: on {base_name} with BASE_ID {own_id}, "
                         f"not on this one with {base_id}. Give the base that it was trained on")
    adapter = Adapter(rank, alpha, scale, read_factors(folder / FILES[1], rank), base_name, own_id,
                      config.get("lora_dropout") or 0.0, folder)
    if model is not None:
        check_fits(adapter, model)
    return adapter


def read_settings(file):
    try:
        config = json.loads(file.read_text())
        rank, alpha = config["r"], config["lora_alpha"]
        if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float)):
            raise ValueError(f"r is {rank!r}, lora_alpha {alpha!r}")
    except (UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{file} is damaged, or not LoRA's ({type(e).__name__}: {e})") from None
    for key, plain in PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{file}: {key} is {config[key]!r}; only plain LoRA is read: {plain[0]!r}")
    return config


def read_factors(file, rank):
    found = {}
    for key, tensor in read_tensors(file):
        name = our_name(key)
        if name is None:
            raise InputError(f"{file}: {key} is not a factor A or B of a layer of a model that is read here")
        found.setdefault(name[0], {})[name[1]] = tensor.float()
    if not found:
        raise InputError(f"{file} holds no factors")
    for name, pair in found.items():
        shapes = {letter: tuple(t.shape) for letter, t in pair.items()}
        a, b = shapes.get("A", ()), shapes.get("B", ())
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise InputError(f"{file}: the factors of {name} have the shapes {shapes}, of rank {rank} they "
                             f"must be A ({rank}, in) and B (out, {rank})")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def check_fits(adapter, model):
    layers, trained = adaptable(model), f"it was trained on {adapter.base_name}"
    for name, (A, B) in adapter.factors.items():
        if name not in layers:
            raise InputError(f"{adapter.folder} has an adapter for {name}, which this {model.config.kind} of "
                             f"{model.config.blocks} blocks does not have: {trained}")
        layer = layers[name]
        if (A.shape[1], len(B)) != (layer.in_features, layer.out_features):
            raise InputError(f"{adapter.folder}: the adapter of {name} is for a {A.shape[1]}x{len(B)} layer, "
                             f"this model's is {layer.in_features}x{layer.out_features}: {trained}")


def adaptable(model):
    """name -> linear layer, an adapted one as a whole."""
    layers = {}

    def note(name, layer):
        layers[name] = layer  # and returns None: it stays
    swap_layers(model, note)
    return layers


def bits_of(layer):
    """Of the weights of a base's layer."""
    from quant import matrices
    return min((m.bits for m in matrices(layer)), default=16)


def load_adapter(model, folder, base_id=None):
    """Put a folder's adapter around the model's layers, in place of any other. Returns the Adapter."""
    adapter = read_adapter(folder, model, base_id)
    take_off(model)

    def make(name, layer):
        return with_factors(layer, adapter, *adapter.factors[name]) if name in adapter.factors else None
    swap_layers(model, make)
    return adapter


def take_off(model):
    """Leave the bare base."""
    swap_layers(model, lambda name, layer: layer.base, wanted=lambda m: isinstance(m, LoRALinear))


def with_factors(base, adapter, A, B):
    layer = LoRALinear(base, adapter.rank, adapter.alpha, adapter.dropout)
    layer.scale = adapter.scale
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
    return layer


# ------------------------------------------------------------------------------------------------- writing

def save_adapter(folder, model, base_name, base_id, learned=None):
    """Write the model's LoRALinear layers; the factors, without which it is no adapter, come last.

    folder: should be new or about to be renamed. learned: name -> value of the factors, where the model holds
    parts of them.
    """
    folder, kind = Path(folder), model.config.kind
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise InputError(f"the model has no adapter that could be saved in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    one, targets = next(iter(layers.values())), sorted({name.rsplit(".", 1)[-1] for name in layers})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_name), r=one.r,
                  lora_alpha=one.scale * one.r, lora_dropout=one.dropout.p,
                  target_modules=[peft_target(target, kind) for target in targets], bias="none",
                  fan_in_fan_out=FAMILIES[kind].conv1d, inference_mode=True, init_lora_weights=True,
                  use_rslora=False, use_dora=False, modules_to_save=None)
    write_atomic(folder / "BASE_ID", base_id + "\n")
    write_atomic(folder / FILES[0], json.dumps(config, indent=2) + "\n")
    learned = learned or dict(model.named_parameters())
    factors = {}
    for name in layers:
        for letter in "AB":
            value = learned[f"{name}.{letter}"].detach().float().cpu()
            factors[f"{peft_name(name, kind)}.lora_{letter}.weight"] = value
    write_tensors(folder / FILES[1], factors)
    sync_folder(folder)


def base_id(name):
    """A checksum of a base: of its architecture, its vectors, and the first rows of each of its matrices.

    The rows are compared as float32, so that the same weights in another format are the same base. Reading
    all of a large base would take minutes; a base that was trained further differs in every row.
    """
    source, digest = open_model(name), hashlib.sha256()
    architecture = source.config.as_dict()
    del architecture["dropout"]
    for key, value in architecture.items():
        if isinstance(value, float):
            architecture[key] = float(f"{value:.5g}")  # a GGUF has float32
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for key in sorted(source.shapes):
        digest.update(key.encode())
        digest.update(source.get(key, SAMPLED_ROWS).float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
