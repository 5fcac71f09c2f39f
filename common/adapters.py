"""Adapters on disk: A and B of every LoRALinear (equation 7 and section V.C), a thousandth of the base, in PEFT's own format.

    DIR/adapter_config.json          rank, alpha, and which layers have an adapter, in PEFT's words
    DIR/adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (r, in), ....lora_B.weight (out, r), ...
    DIR/BASE_ID                      a checksum of the base's configuration and weights, and the bits of the base if the factors depend on them

PEFT loads what save_adapter writes (it ignores BASE_ID), and read_adapter reads what PEFT writes. The base itself is never written: one
base serves many adapters. An adapter says nothing on any other base, so another base is refused. The checksum is of the weights as the
source has them, whatever their format and before any rounding: at 16, 8 and 4 bits a base keeps its name.

    adapter = load_adapter(model, "out/finetune", base_id("smollm2-135m"))    # attaches LoRALinear layers; a second call switches
    save_adapter("out/mine", model, "smollm2-135m", base_id("smollm2-135m"))

    python adapters.py info out/finetune
    python adapters.py merge out/finetune out/merged --bits 8      a model of its own: W + (alpha/r) B A, rounded anew
"""
import argparse
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import load_model, locate, read_config, replace_model
from common.cli import InputError, check_folder, command, write_atomic
from common.formats import ROWS, open_source, their_name
from common.storage import read_tensors, sync_folder, write_tensors
from lowrank import LoRALinear, drop_lora, is_linear, merge_lora, swap_layers
from quant import matrices

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Settings of PEFT under which y = W x + (alpha/r) B A x is not all there is, and the values that turn them off.
PLAIN = dict(peft_type=("LORA",), bias=("none",), use_dora=(False, None), modules_to_save=(None, []), rank_pattern=({}, None), alpha_pattern=({}, None),
             lora_bias=(False, None), trainable_token_indices=(None,), layer_replication=(None,), target_parameters=(None, []))


@dataclass
class Adapter:
    """What a folder holds. factors: our name of a layer -> A (r, in) and B (out, r), float32; targets: the last names of these layers."""
    rank: int
    alpha: float
    scale: float         # what B A is multiplied with: alpha / r
    targets: list
    factors: dict
    base_name: str = ""
    base_id: str = None  # None: whoever trained it left none, so nothing tells another base
    base_bits: int = 16  # less: B A also makes good what rounding the base to so many bits lost (LoftQ)
    dropout: float = 0.0
    folder: Path = field(default=None, compare=False)

    @property
    def parameters(self):
        return sum(A.numel() + B.numel() for A, B in self.factors.values())

    def __str__(self):
        unchecked = "" if self.base_id else f"; it names its base {self.base_name!r} without a checksum, which is believed"
        return f"adapter {self.folder}: r = {self.rank} on {', '.join(self.targets)}, {len(self.factors)} layers, {self.parameters:,} parameters{unchecked}"


# ----------------------------------------------------------------------------- names

def peft_name(name, kind):
    """blocks.3.attention.q of a llama -> base_model.model.model.layers.3.self_attn.q_proj"""
    theirs = their_name(name + ".weight", kind).removesuffix(".weight")
    inner = "" if name == "head" else "transformer." if kind == "gpt2" else "model."
    return f"base_model.model.{inner}{theirs}"


def peft_target(target, kind):
    """What `target_modules` calls our q: q_proj. PEFT compares ends of names, so the two c_proj of GPT-2 need more of theirs."""
    row = next(r for r in ROWS if r[0].rsplit(".", 1)[-1] == target)
    full = row[ROWS[0].index(kind)]
    return full if kind == "gpt2" else full.rsplit(".", 1)[-1]


def our_name(key):
    """(name of our layer, "A" or "B") of a tensor of PEFT's file; None if it is no factor of a layer that we know."""
    parts = key.removeprefix("base_model.model.").replace(".default.", ".").split(".")
    if len(parts) < 3 or parts[-2] not in ("lora_A", "lora_B") or parts[-1] != "weight":
        return None
    module, factor = ".".join(parts[:-2]).removeprefix("model.").removeprefix("transformer."), parts[-2][-1]
    for kind in ("llama", "gpt2"):
        theirs = {row[ROWS[0].index(kind)]: row[0] for row in ROWS[1:]}
        pieces = module.split(".", 2)
        if module in theirs:
            return theirs[module], factor
        if len(pieces) == 3 and theirs.get(pieces[0]) == "blocks" and pieces[2] in theirs:
            return f"blocks.{pieces[1]}.{theirs[pieces[2]]}", factor
    return None


# ----------------------------------------------------------------------------- reading

def read_adapter(folder, model=None, base_id=None):
    """The Adapter in a folder. model: its layers must fit. base_id: of the base that is at hand; an adapter of another one is refused."""
    folder = Path(folder)
    if missing := [f for f in FILES if not (folder / f).is_file()]:
        raise InputError(f"{folder} is not an adapter: it has no {' and no '.join(missing)}")
    config = read_settings(folder / FILES[0])
    rank, alpha = config["r"], config["lora_alpha"]
    factors = read_factors(folder / FILES[1], rank)
    words = ((folder / "BASE_ID").read_text().split() if (folder / "BASE_ID").is_file() else []) or [None]
    adapter = Adapter(rank, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), sorted({n.rsplit(".", 1)[-1] for n in factors}), factors,
                      config.get("base_model_name_or_path") or "", words[0], int(words[1]) if len(words) > 1 else 16, config.get("lora_dropout") or 0.0, folder)
    if base_id and adapter.base_id not in (None, base_id):
        raise InputError(f"{folder} was trained on another base: on {adapter.base_name} with BASE_ID {adapter.base_id}, not on this one with {base_id}. "
                         "Give the base that it was trained on")
    if model is not None:
        check_fits(adapter, model)
    return adapter


def read_settings(file):
    try:
        config = json.loads(file.read_text())
        rank, alpha = config["r"], config["lora_alpha"]
        if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float)):
            raise ValueError(f"r is {rank!r}, lora_alpha {alpha!r}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{file} is damaged, or not LoRA's ({type(e).__name__}: {e})") from None
    for key, plain in PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{file}: {key} is {config[key]!r}; only plain LoRA is read, where it is {plain[0]!r}")
    return config


def read_factors(file, rank):
    found = {}
    for key, tensor in read_tensors(file):
        name = our_name(key)
        if name is None:
            raise InputError(f"{file}: {key} is not a factor A or B of a layer of a gpt2 or llama model")
        found.setdefault(name[0], {})[name[1]] = tensor.float()
    for name, pair in found.items():
        shapes = {k: tuple(t.shape) for k, t in pair.items()}
        if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2 or not len(pair["A"]) == pair["B"].shape[1] == rank:
            raise InputError(f"{file}: the factors of {name} have the shapes {shapes}, of rank {rank} they must be A ({rank}, in) and B (out, {rank})")
    if not found:
        raise InputError(f"{file} holds no factors")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def check_fits(adapter, model):
    layers = adaptable(model)
    for name, (A, B) in adapter.factors.items():
        if name not in layers:
            raise InputError(f"{adapter.folder} has an adapter for {name}, which this {model.config.kind} of {model.config.blocks} blocks does not have: "
                             f"it was trained on {adapter.base_name}")
        layer = layers[name]
        if (A.shape[1], len(B)) != (layer.in_features, layer.out_features):
            raise InputError(f"{adapter.folder}: the adapter of {name} is for a {A.shape[1]}x{len(B)} layer, this model's is "
                             f"{layer.in_features}x{layer.out_features}: it was trained on {adapter.base_name}")
        if adapter.base_bits < 16 and adapter.base_bits != bits_of(layer):
            raise InputError(f"{adapter.folder} makes good what {adapter.base_bits}-bit rounding of the base lost (LoftQ), and this base has {bits_of(layer)} "
                             f"bits: give --bits {adapter.base_bits}")


def adaptable(model):
    """name -> linear layer, an adapted one as a whole."""
    layers = {}
    swap_layers(model, lambda name, layer: layers.update({name: layer}), wanted=is_linear)  # update gives None: every layer stays
    return layers


def bits_of(layer):
    """Of the base's weights."""
    base = getattr(layer, "base", layer)  # of one adapter or of many
    return min((m.bits for m in matrices(base)), default=16)


def load_adapter(model, folder, base_id=None):
    """Put the adapter of a folder around the model's layers, in place of any that is there. Returns the Adapter; str(it) says what it is."""
    adapter = read_adapter(folder, model, base_id)
    take_off(model)
    swap_layers(model, lambda name, layer: with_factors(layer, adapter, *adapter.factors[name]) if name in adapter.factors else None)
    return adapter


def take_off(model):
    """Leave the bare base."""
    def bare(name, layer):
        if layer.merged:
            layer.unmerge()
        return layer.base
    swap_layers(model, bare, wanted=lambda m: isinstance(m, LoRALinear))


def with_factors(base, adapter, A, B):
    layer = LoRALinear(base, adapter.rank, adapter.alpha, adapter.dropout)
    layer.scale = adapter.scale
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
    return layer


# ----------------------------------------------------------------------------- writing

def save_adapter(folder, model, base_name, base_id, base_bits=16, learned=None):
    """Write the model's LoRALinear layers. `folder` should be new or about to be renamed; the factors, without which it is no adapter, come last.

    learned: name -> value of the parameters A and B, where the model itself holds parts of them (shard.py)."""
    folder, kind = Path(folder), model.config.kind
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise InputError(f"the model has no adapter that could be saved in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(layers.values()))
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_name), r=one.r, lora_alpha=one.scale * one.r,
                  lora_dropout=one.dropout.p, target_modules=[peft_target(t, kind) for t in targets], fan_in_fan_out=kind == "gpt2", bias="none",
                  inference_mode=True, init_lora_weights=True, use_rslora=False, use_dora=False, modules_to_save=None)
    write_atomic(folder / "BASE_ID", base_id + (f" {base_bits}" if base_bits < 16 else "") + "\n")
    write_atomic(folder / FILES[0], json.dumps(config, indent=2) + "\n")
    learned = learned or dict(model.named_parameters())
    factors = {f"{peft_name(name, kind)}.lora_{letter}.weight": learned[f"{name}.{letter}"] for name in layers for letter in "AB"}
    write_tensors(folder / FILES[1], {name: t.detach().float().cpu() for name, t in factors.items()})
    sync_folder(folder)


# ----------------------------------------------------------------------------- which base

SAMPLED_ROWS = 4


def base_id(name):
    """A checksum of a base (a known name, a folder or a file): of its architecture, its vectors, and the first rows of each of its matrices.

    The rows are compared as float32, so that the same weights in another format are the same base. Reading all of a large base would take
    minutes; a base that was trained further differs in every row.
    """
    path, digest = locate(name), hashlib.sha256()
    own = read_config(path) if path.is_dir() else None
    if own is not None:
        architecture, rows = own["architecture"], own_rows([path / f for f in own["files"]])
    else:
        with open_source(path) as source:
            architecture, rows = source.config.as_dict(), [(n, source.first_rows(n, SAMPLED_ROWS)) for n in source.names]
    architecture = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in architecture.items() if k != "dropout"}  # GGUF keeps float32
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for key, tensor in sorted(rows):
        digest.update(key.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def own_rows(files):
    """(name, first rows) of every tensor of a model folder of this project."""
    rows = []
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():  # noqa: SIM118 (a file, no dict)
                    matrix = len(f.get_slice(key).get_shape()) > 1
                    rows.append((key, f.get_tensor(key)[:SAMPLED_ROWS] if matrix else f.get_tensor(key)))
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} is missing, truncated or not a safetensors file ({e})") from None
    return rows


# ----------------------------------------------------------------------------- python adapters.py

def merge(folder, out, base, bits):
    """Write the base with the adapter multiplied into it, as a model folder."""
    check_folder(out, new=True)
    base = base or read_adapter(folder).base_name
    model, tokenizer = load_model(base, bits=bits)
    print(load_adapter(model, folder, base_id(base)))
    error = merge_lora(model)
    drop_lora(model)
    replace_model(out, model.bfloat16() if bits < 16 else model, tokenizer)
    rounding = f"; rounding the sums to {bits} bits changed them by {error:.1%} of what the adapter adds" if bits < 16 else ""
    print(f"{out}: {base} with the adapter merged{rounding}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("info", help="rank, layers, base")
    p.add_argument("adapter", help="a folder in PEFT's format")
    p = sub.add_parser("merge", help="write the base with the adapter multiplied into it")
    p.add_argument("adapter", help="a folder in PEFT's format")
    p.add_argument("out", help="the new model folder")
    p.add_argument("--base", help="the base, where it is not what the adapter's folder names")
    p.add_argument("--bits", type=int, default=16, help="of the base and of the result: 16, 8 or 4 (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "merge":
        merge(args.adapter, args.out, args.base, args.bits)
    else:
        adapter = read_adapter(args.adapter)
        print(f"{adapter}, alpha = {adapter.alpha:g}; base {adapter.base_name or 'not named'}, BASE_ID {adapter.base_id or 'none'}")
    return 0


if __name__ == "__main__":
    command(main)
