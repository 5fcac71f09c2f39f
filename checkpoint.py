"""Models on disk, and back.

A model is a folder that can be rebuilt from itself alone:

    config.json            the architecture, and for each layer that was swapped its kind and rank
    model.safetensors      the weights, with a checksum inside (model-0000i-of-0000n.safetensors when large; config.json lists them)
    tokenizer.json or tokenizer.model

The folder of a training run is one too (storage.py says how its state is kept). What others wrote is read by formats.py.

    python checkpoint.py info out/train              layers, ranks, bytes
    python checkpoint.py quantize out/train out/int8 --bits 8
    python checkpoint.py export out/train out/hf     a dense Hugging Face folder, which transformers, peft and llama.cpp's converter read
"""
import argparse
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common.cli import InputError, check_folder, command, write_atomic
from common.data import calibration_batches
from common.device import give_back_memory
from common.download import HUB, fetch_smollm2, hub_snapshot
from common.export import export
from common.formats import Source, open_source
from common.storage import SHARD_BYTES, read_tensors, replace_state, sync_folder, write_tensors
from common.tokenizer import load_tokenizer
from lowrank import BlendedLinear, LowRankEmbedding, LowRankLinear, replace_linears, swap_layers
from model import CONFIGS, Config, Transformer, config_for, count_parameters
from quant import KINDS as QUANT_KINDS
from quant import QuantEmbedding, QuantLinear, bits_and_group, describe, from_description, quantize_layer, takes
from quant import tie as tie_quantized

FORMAT = "fingpt-hpc"


# ----------------------------------------------------------------------------- the model folder

KINDS = {"lowrank": LowRankLinear, "blended": BlendedLinear, "lowrank embedding": LowRankEmbedding}


def describe_layers(model):
    """What config.json says of the layers that are not nn.Linear: name -> kind and rank; the shapes follow from the architecture."""
    kinds, layers = {cls: kind for kind, cls in KINDS.items()}, {}
    for name, m in model.named_modules():
        if type(m) in kinds and not name.endswith(".lowrank"):  # a blended layer's own part is not a layer of the model
            layers[name] = dict(kind=kinds[type(m)], rank=m.rank)
        elif type(m) in QUANT_KINDS.values():
            layers[name] = describe(m)
    return layers


def build(config, layers):
    """The model of a config.json, on the meta device: shapes without memory."""
    def make(name, old):
        d = layers.pop(name, None)
        if d is None:
            return None
        if d["kind"] in QUANT_KINDS:
            return from_description(d, old)
        if isinstance(old, nn.Embedding):
            return KINDS[d["kind"]](old.num_embeddings, old.embedding_dim, d["rank"])
        return KINDS[d["kind"]](old.in_features, old.out_features, d["rank"], old.bias is not None)
    layers = dict(layers)
    with torch.device("meta"):
        model = Transformer(config)
        swap_layers(model, make, wanted=lambda m: isinstance(m, (nn.Linear, nn.Embedding)))
        tie_quantized(model)
    if layers:
        raise InputError(f"config.json describes layers that a {config.kind} of {config.blocks} blocks does not have: {', '.join(layers)[:200]}")
    return model


def own_tensors(model):
    """Parameters and buffers by name, a shared one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def save_model(folder, model, tokenizer=None, tensors=None):
    """Write a model folder, of the model's own tensors or of those given. `folder` should be new or about to be renamed: use save_state for a run's folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = own_tensors(model) if tensors is None else tensors
    shards, size = [[]], 0
    for name in sorted(tensors):
        size += tensors[name].nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards, size = shards + [[]], tensors[name].nbytes
        shards[-1].append(name)
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        write_tensors(folder / file, {n: tensors[n] for n in names})
    if tokenizer is not None:
        tokenizer.save(folder)
    write_config(folder, model.config, describe_layers(model), files)


def replace_model(folder, model, tokenizer):
    """save_model beside `folder`, then in its place."""
    partial = Path(folder).with_name(Path(folder).name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, model, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save_state(out_dir, model, tokenizer, optimizer_tensors, state, tensors=None):
    """Replace the training state of a run by that of now. tensors: of a model that is spread over processes, gathered."""
    replace_state(out_dir, lambda folder: save_model(folder, model, tokenizer, tensors), optimizer_tensors, state)


def write_config(folder, architecture, layers, files, **more):
    """config.json, which makes a folder a model; written last."""
    config = dict(format=FORMAT, version=1, architecture=architecture.as_dict(), layers=layers, files=files, **more)
    write_atomic(Path(folder) / "config.json", json.dumps(config, indent=1) + "\n")
    sync_folder(folder)


def read_config(folder):
    """config.json of a model folder of this project, or None if it is somebody else's."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is damaged ({e})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if config.get("version") != 1:
        raise InputError(f"{path} is of version {config.get('version')}, this program reads version 1: use the program that wrote it")
    return config


def decomposed_from(folder):
    """The dense model that decompose.py made a folder from; None of any other model."""
    return (read_config(folder) or {}).get("decomposed_from") if Path(folder).is_dir() else None


GIVE_BACK = 1 << 28  # bytes of layers that were quantized, after which free memory goes back to the system


def fill(model, tensors, device, dtype, where, quantizer=None):
    """Give a meta model its memory, a tensor (name, tensor) at a time; every name must fit, none may be left.

    quantizer(layer) -> its quantized form: called as soon as a layer is complete, so that the model never stands there whole in 16 or 32 bit.
    """
    own, freed = {name: p.shape for name, p in own_tensors(model).items()}, 0
    for name, tensor in tensors:
        if name not in own:
            raise InputError(f"{where}: unexpected tensor {name} {tuple(tensor.shape)}")
        if own[name] != tensor.shape:
            raise InputError(f"{where}: {name} is {tuple(tensor.shape)}, the architecture needs {tuple(own[name])}")
        own.pop(name)
        place(model, name, tensor, device, dtype)
        del tensor
        layer_name = name.rsplit(".", 1)[0]
        if quantizer and takes(model, layer := model.get_submodule(layer_name)) and not any(p.is_meta for p in layer.parameters()):
            freed += sum(p.nbytes for p in layer.parameters())
            model.set_submodule(layer_name, quantizer(layer))
            del layer
            if freed > GIVE_BACK:  # else the heap fills with holes that are too small for the next layer
                give_back_memory()
                freed = 0
    if own:
        raise InputError(f"{where}: {len(own)} tensors are missing, first {min(own)}: a shard may be missing")
    if model.config.tied and isinstance(model.embed, QuantEmbedding) and isinstance(model.head, nn.Linear):
        model.head = QuantLinear(model.embed.W)
    model.tie()
    tie_quantized(model)
    return model


def place(model, name, tensor, device, dtype):
    """Put a copy of a tensor where the meta model has one of that name; floating-point parameters in `dtype`, buffers as they are."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        copy = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        module._parameters[leaf] = nn.Parameter(copy, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)


def load_model(name, device="cpu", dtype=torch.float32, bits=16, group=None):
    """(model, tokenizer) of a known name, a folder or a file, in eval mode; tokenizer None if there is none beside the weights.

    bits 8 or 4: quantized while loading, a layer at a time; a folder that is quantized already must have these bits.
    """
    if bits not in (4, 8, 16):
        raise InputError(f"--bits must be 4, 8 or 16, got {bits}")
    path = locate(name)
    config = read_config(path) if path.is_dir() else None
    if config is None:
        with open_source(path) as source:
            with torch.device("meta"):
                model = Transformer(source.config)
            model = fill(model, ((n, source.get(n)) for n in source.names), device, dtype, path, quantizer_of(model, bits, group))
            return model.eval(), source.tokenizer()
    try:
        model = build(Config(**config["architecture"]), config["layers"])
    except (TypeError, KeyError) as e:
        raise InputError(f"{path}/config.json is damaged or of another version ({e})") from None
    stored = min((layer["bits"] for layer in config["layers"].values() if "bits" in layer), default=bits)
    if bits < 16 and stored != bits:
        raise InputError(f"{path} has {stored}-bit weights already: leave --bits {bits} out, or give the model that it was made from")
    tensors = itertools.chain.from_iterable(read_tensors(path / file) for file in config["files"])
    model = fill(model, tensors, device, dtype, path, quantizer_of(model, bits, group))
    has_tokenizer = any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model"))
    return model.eval(), load_tokenizer(path) if has_tokenizer else None


class FolderSource(Source):
    """A dense model folder of ours, read as formats.py reads those of others: a tensor at a time."""

    def __init__(self, path, config):
        self.path, self.config, self.files = Path(path), Config(**config["architecture"]), {}
        try:
            for file in config["files"]:
                with safe_open(self.path / file, framework="pt") as f:
                    self.files |= dict.fromkeys(f.keys(), self.path / file)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{self.path / file} is missing, truncated or not a safetensors file ({e})") from None
        with torch.device("meta"):
            self.shapes = {name: tuple(p.shape) for name, p in Transformer(self.config).named_parameters()}
        self.names = list(self.shapes)
        if missing := self.shapes.keys() - self.files.keys():
            raise InputError(f"{path}: {len(missing)} tensors are missing, first {min(missing)}: a shard may be missing")

    def get(self, name):
        with safe_open(self.files[name], framework="pt") as f:
            return f.get_tensor(name)

    def tokenizer(self):
        return load_tokenizer(self.path) if any((self.path / f).exists() for f in ("tokenizer.json", "tokenizer.model")) else None


def open_dense(name):
    """The dense model of a known name, a folder or a file, to be read a tensor at a time."""
    path = locate(name)
    config = read_config(path) if path.is_dir() else None
    if config is None:
        return open_source(path)
    if config["layers"]:
        first, layer = next(iter(config["layers"].items()))
        raise InputError(f"{name} is not dense: {first} is {layer['kind']}. Give the model that it was made from")
    return FolderSource(path, config)


def quantizer_of(model, bits, group):
    """What turns a complete layer of the model into integers; None for 16 bit."""
    if bits == 16:
        return None
    forms = {id(m): bits_and_group(model, m, bits, group) for m in model.modules() if takes(model, m)}
    return lambda layer: quantize_layer(layer, *forms[id(layer)])


def locate(name):
    """The folder or file that --model means: a path, or a known name that is fetched."""
    path, name = Path(name), str(name)
    if path.exists():
        return path
    if name == "smollm2-135m":
        return fetch_smollm2()
    is_repository = name.count("/") == 1 and not name.startswith((".", "/"))
    if name in HUB or is_repository:
        return hub_snapshot(name)
    raise InputError(f"{name}: no such folder or file, nor a known model ({', '.join(CONFIGS)})")


# ----------------------------------------------------------------------------- random and quantized models

def random_model(name, rank=0, bits=16, group=None, device="cpu", dtype=torch.bfloat16):
    """A model of a known name with random weights, made and quantized a layer at a time: to measure sizes and speeds where weights can't be had."""
    with torch.device("meta"):
        model = Transformer(config_for(name))
        if rank:
            replace_linears(model, rank)

    def values():
        for key, p in own_tensors(model).items():
            value = torch.empty(p.shape, device=device)
            yield key, value.normal_(std=0.02) if p.dim() > 1 else value.fill_(float(key.endswith("weight")))
    return fill(model, values(), device, dtype, name, quantizer_of(model, bits, group)).eval()


def quantized(args):
    """(model, tokenizer) for `checkpoint.py quantize`."""
    if args.random_init and args.calibration:
        raise InputError("--calibration rounds trained weights, and --random-init has none: leave one of them out")
    if args.random_init:
        return random_model(args.model, args.rank, args.bits, args.group), None
    if args.rank:
        raise InputError("--rank goes with --random-init; a model's own ranks stay as they are")
    if not args.calibration:
        return load_model(args.model, bits=args.bits, group=args.group)
    model, tokenizer = load_model(args.model)
    batches = calibration_batches(args.calibration, tokenizer, model.config.context)
    bar = functools.partial(tqdm, desc="rounding", unit=" blocks", disable=None, leave=False)
    from beyond.rounding import quantize_calibrated
    quantize_calibrated(model, args.bits, batches, args.group, progress=bar)
    return model, tokenizer


def save_quantized(folder, model, tokenizer):
    """Integers, scales in float16, and what is not quantized in bfloat16."""
    check_folder(folder, new=True)
    replace_model(folder, model.bfloat16(), tokenizer)


# ----------------------------------------------------------------------------- python checkpoint.py

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I8": 8, "U8": 8}  # of a number, by its name in a safetensors file


def stored_bits(files):
    """name -> bits of a number, of everything in these safetensors files."""
    bits = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                bits |= {name: BITS.get(f.get_slice(name).get_dtype(), 0) for name in f.keys()}  # noqa: SIM118 (a file, no dict)
        except SafetensorError as e:
            raise InputError(f"{file} is truncated or not a safetensors file ({e}): copy or save it again") from None
    return bits


def info(path):
    """The table of a model's layers; the same layer of all blocks is one line."""
    path = locate(path)
    config = read_config(path) if path.is_dir() else None
    if config is None:
        with open_source(path) as source:
            a, layers, size, bits = source.config, {}, source.bytes, {}
        with torch.device("meta"):
            model = Transformer(a)
    else:
        a, layers, files = Config(**config["architecture"]), config["layers"], [path / f for f in config["files"]]
        if lost := [f.name for f in files if not f.exists()]:
            raise InputError(f"{path} lacks {', '.join(lost)}: copy or save the model again")
        model, size, bits = build(a, layers), sum(f.stat().st_size for f in files), stored_bits(files)
    rows = {}
    for name, p in own_tensors(model).items():
        owner = name.rsplit(".", 1)[0]
        layer = next((layers[o] for o in (owner, owner.rsplit(".", 1)[0]) if o in layers), {})
        key = ".".join("*" if part.isdigit() else part for part in name.split("."))
        row = rows.setdefault(key, dict(shape="x".join(map(str, p.shape)), kind=layer.get("kind", "dense"), rank=layer.get("rank", ""), count=0, bytes=0,
                                        bits=layer["bits"] if name.endswith(".q") else bits.get(name, "")))
        row["count"] += 1
        row["bytes"] += p.numel() * bits.get(name, 0) // 8
    print(f"{a.kind}: {a.blocks} blocks, width {a.width}, {a.heads} heads ({a.kv_heads} key/value), context {a.context}, vocabulary {a.vocab_size}"
          + (", head tied to the embedding" if a.tied and "head" not in layers else ""))
    print(f"{'tensor':34}{'count':>6}{'shape':>13}{'kind':>16}{'rank':>5}{'bits':>5}{'MB':>9}")
    for key, r in rows.items():
        mb = f"{r['bytes'] / 1e6:,.2f}" if r["bytes"] else ""
        print(f"{key:34}{r['count']:6}{r['shape']:>13}{r['kind']:>16}{r['rank']:>5}{r['bits']:>5}{mb:>9}")
    total = count_parameters(model)
    print(f"{total / 1e6:,.1f}M parameters, {size / 1e6:,.1f} MB on disk, {8 * size / total:.1f} bits a parameter")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("info", help="a table of layers, ranks and bytes")
    p.add_argument("model", help="a folder, a file, or a known name")
    p = sub.add_parser("export", help="write a dense Hugging Face folder")
    p.add_argument("model", help="a folder, a file, or a known name")
    p.add_argument("out", help="the new folder")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the written weights (default: %(default)s)")
    p = sub.add_parser("quantize", help="write a folder of int8 or int4 weights")
    p.add_argument("model", help="a folder, a file, or a known name")
    p.add_argument("out", help="the new folder")
    p.add_argument("--bits", type=int, default=8, choices=[4, 8], help="of a weight (default: %(default)s)")
    p.add_argument("--group", type=int, help="numbers of a row that share a scale; 0: the whole row (default: 0 for 8 bit, 64 for 4 bit)")
    p.add_argument("--calibration", metavar="TEXT", help="round so that the outputs for this text change least (GPTQ); a file, a folder or builtin")
    p.add_argument("--random-init", action="store_true", help="random weights of a known name's shapes, to measure sizes and speeds")
    p.add_argument("--rank", type=int, default=0, help="with --random-init: the rank of every linear layer; 0 is full rank (default: 0)")
    args = parser.parse_args(argv)
    if args.command == "info":
        info(args.model)
        return 0
    check_folder(args.out, new=True)  # before anything slow
    if args.command == "quantize":
        model, tokenizer = quantized(args)
        save_quantized(args.out, model, tokenizer)
        size = sum(f.stat().st_size for f in Path(args.out).iterdir())
        print(f"{args.out}: {count_parameters(model) / 1e6:,.1f}M parameters at {args.bits} bit, {size / 1e6:,.1f} MB")
    else:
        model, tokenizer = load_model(args.model)
        export(model, tokenizer, args.out, getattr(torch, args.dtype))
        print(f"{args.out}: {args.model} as a dense {model.config.kind} for transformers: AutoModelForCausalLM.from_pretrained({args.out!r})")
    return 0


if __name__ == "__main__":
    command(main)
