"""Models on disk, and back. A model is a folder that can be rebuilt from itself alone:

    config.json            the architecture, and for each swapped layer its kind, rank, bits and groups
    model.safetensors      the weights, with a checksum inside (in shards when large: config.json lists them)
    tokenizer.json or tokenizer.model

The folder of a training run is one too (common/storage.py). What others wrote is read by common/formats.py.

    python checkpoint.py info out/train                            layers, ranks, bytes
    python checkpoint.py quantize out/train out/int8 --bits 8
    python checkpoint.py merge out/finetune out/merged             the base with an adapter multiplied into it
    python checkpoint.py export out/train out/hf                   a dense Hugging Face folder
"""
import itertools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import Parser, at_least_0, check_folder, command, refuse, write_atomic
from common.data import calibration_batches
from common.device import give_back_memory, stored_bytes
from common.download import HUB, fetch_smollm2, hub_snapshot
from common.formats import HuggingFaceSource, Source, export, make_config
from common.gguf_file import GGUFSource
from common.storage import read_headers, read_tensors, replaced, write_shards
from common.tokenizer import blamed_on, read_json
from lowrank import BlendedLinear, LowRankEmbedding, LowRankLinear, merge_lora, replace_linears, swap_layers
from model import CONFIGS, Layer, Packed, Transformer, config_for, count_parameters

FORMAT = "fingpt-hpc"
MOST_LOST = 0.05  # of what an adapter adds, when its sums with the base are rounded
KINDS = {"lowrank": LowRankLinear, "blended": BlendedLinear, "lowrank embedding": LowRankEmbedding}

def describe_layers(model):
    """What config.json says of layers that are not dense: name -> kind, rank, ..."""
    kinds, layers = {cls: kind for kind, cls in KINDS.items()}, {}
    for name, m in model.named_modules():
        if not isinstance(m, Layer) or name.endswith(".lowrank"):  # a blended layer's own part
            continue
        if type(m) in kinds:
            layers[name] = dict(kind=kinds[type(m)], rank=m.rank)
        else:
            from quant import describe
            layers[name] = describe(m)
    return layers

def build(config, layers):
    """The model of a config.json, on the meta device: shapes without memory."""
    def make(name, old):
        form = layers.get(name)
        if form is None:
            return None
        if form["kind"].startswith("quant"):
            from quant import from_description
            return from_description(form, old)
        if isinstance(old, nn.Embedding):
            return LowRankEmbedding(old.num_embeddings, old.embedding_dim, form["rank"])
        return KINDS[form["kind"]](old.in_features, old.out_features, form["rank"], old.bias is not None)
    with torch.device("meta"):
        model = Transformer(config)
        swap_layers(model, make, wanted=lambda m: isinstance(m, (nn.Linear, nn.Embedding)))
        tie(model)
    return model

def tie(model):
    """One matrix for a head and an embedding that are tied, dense or quantized."""
    model.tie()
    if not isinstance(model.embed, (nn.Embedding, LowRankEmbedding)):
        from quant import tie_quantized
        tie_quantized(model)

def own_tensors(model):
    """Parameters and buffers by name, a shared one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())

def save_model(folder, model, tokenizer=None, tensors=None, **more):
    """Write a model folder, of the model's own tensors or of those given. more: for config.json."""
    folder, tensors = Path(folder), tensors or own_tensors(model)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, {name: tensors[name].nbytes for name in sorted(tensors)}, tensors.get)
    if tokenizer is not None:
        tokenizer.save(folder)
    content = dict(format=FORMAT, architecture=model.config.as_dict(), layers=describe_layers(model),
                   files=sorted({*files.values()})) | more
    write_atomic(folder / "config.json", json.dumps(content, indent=1) + "\n")  # last: it makes the model

def replace_model(folder, model, tokenizer):
    """save_model in place of what `folder` is."""
    with replaced(folder) as new:
        save_model(new, model, tokenizer)

def decomposed_from(folder):
    """The dense model that decompose.py made a folder from; None of any other model."""
    return read_json(Path(folder) / "config.json").get("decomposed_from")

class FolderSource(Source):
    """A model folder of this project, read as common/formats.py reads those of others."""

    def __init__(self, path, config):
        self.path = path
        with blamed_on(path / "config.json"):
            self.files, self.layers = [path / name for name in config["files"]], config["layers"]
            self.config = make_config(path / "config.json", config["architecture"])
            model = build(self.config, self.layers)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
        self.find(read_headers(self.files), self.shapes)

    def tensors(self, forms=None):
        """All, and their checksums are compared."""
        return itertools.chain.from_iterable(map(read_tensors, self.files))

def locate(name):
    """The folder or file that --model means: a path, or a known name that is fetched."""
    path, name = Path(name), str(name)
    if path.exists():
        return path
    if name == "smollm2-135m":
        return fetch_smollm2()
    is_repository = name.count("/") == 1 and not name.startswith((".", "/"))
    refuse(name not in HUB and not is_repository,
           f"{name}: no such folder or file, nor a known model ({', '.join(CONFIGS)})")
    return hub_snapshot(name)

def open_model(name):
    """The Source of a known name, a folder or a GGUF file."""
    path = locate(name)
    config = read_json(path / "config.json")
    if config.get("format") == FORMAT:
        return FolderSource(path, config)
    if path.is_file():
        return GGUFSource(path)
    refuse(not config, f"{path} is no model that can be read: give a folder with config.json and "
           "model.safetensors, or a .gguf file")
    return HuggingFaceSource(path)

def open_dense(name):
    """The Source of a model that has none but dense layers."""
    source = open_model(name)
    refuse(source.layers, f"{name} is not dense: {len(source.layers)} of its layers are low-rank or "
           "quantized. Give what it was made from")
    return source

def load_model(name, device="cpu", dtype=torch.float32, bits=16, group=None):
    """(model, tokenizer) of a known name, a folder or a file, in eval mode; the tokenizer may be None."""
    refuse(bits not in (4, 8, 16), f"--bits must be 4, 8 or 16, got {bits}")
    source = open_model(name)
    stored = min((form["bits"] for form in source.layers.values() if "bits" in form), default=bits)
    refuse(bits < 16 and stored != bits, f"{source.path} has {stored}-bit weights already: leave "
           f"--bits {bits} out, or give the model that it was made from")
    model = fill(build(source.config, source.layers), source.tensors, device, dtype, bits, group)
    return model, source.tokenizer()

def fill(model, tensors, device, dtype, bits=16, group=None):
    """Give a meta model its memory, a (name, tensor) of tensors(forms) at a time.

    bits 8 or 4: a layer is quantized when it is complete, so that the model never is whole in 16 bit."""
    forms = {}
    if bits < 16:
        import quant
        forms = quant.formats(model, bits, group)
    for name, tensor in tensors(forms):
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(tensor, Packed):  # a QuantMatrix, as the file has it
            model.set_submodule(owner, quant.holding(layer, tensor.to(device)))
            del forms[owner]
        else:
            place(layer, leaf, tensor, device, dtype)
            if owner in forms and not any(p.is_meta for p in layer.parameters()):
                model.set_submodule(owner, quant.quantize_layer(layer, *forms[owner], name=owner))
        del tensor, layer  # before the next one comes
        if bits < 16 and owner.endswith("mlp.up"):  # once a block
            give_back_memory()  # else the heap fills with holes too small for the next layer
    tie(model)
    return model.eval()

def place(layer, name, tensor, device, dtype):
    """Copy a tensor into a meta layer; a parameter in `dtype`, a buffer as it is."""
    old = getattr(layer, name)
    is_parameter = isinstance(old, nn.Parameter)
    dtype = dtype if is_parameter else tensor.dtype
    copy = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    setattr(layer, name, nn.Parameter(copy, old.requires_grad) if is_parameter else copy)

# ------------------------------------------------------------------------------------ python checkpoint.py

def random_model(name, rank=0, bits=16, group=None, device="cpu", dtype=torch.bfloat16):
    """A known name with random weights, made and quantized a layer at a time: to measure sizes and speeds."""
    def values(forms):
        for key, shape in shapes.items():
            value = torch.full(shape, float(key.endswith("weight")), device=device)
            yield key, value if len(shape) == 1 else value.normal_(std=0.02)
    with torch.device("meta"):
        model = Transformer(config_for(name))
        if rank:
            replace_linears(model, rank)
    shapes = {key: tensor.shape for key, tensor in own_tensors(model).items()}
    return fill(model, values, device, dtype, bits, group)

def quantize(args):
    """Write a folder of int8 or int4 weights, scales in float16, and what is not quantized in bfloat16."""
    refuse(args.rank and not args.random_init, "--rank goes with --random-init; a model keeps its own ranks")
    if args.random_init:
        model, tokenizer = random_model(args.model, args.rank, args.bits, args.group), None
    elif args.calibration:
        from beyond.rounding import quantize_calibrated
        model, tokenizer = load_model(args.model)
        batches = calibration_batches(args.calibration, tokenizer, model.config.context)
        quantize_calibrated(model, args.bits, batches, args.group)
    else:
        model, tokenizer = load_model(args.model, bits=args.bits, group=args.group)
    replace_model(args.out, model.bfloat16(), tokenizer)
    print(f"{args.out}: {count_parameters(model) / 1e6:,.1f}M parameters at {args.bits} bit, "
          f"{stored_bytes(model) / 1e6:,.1f} MB")

def merge(args):
    """Write an adapter's base with the adapter multiplied into it."""
    from common.adapters import base_id, bits_of, load_adapter, read_adapter
    base = read_adapter(args.adapter).base_name
    model, tokenizer = load_model(base)
    print(load_adapter(model, args.adapter, base_id(base)))
    error = merge_lora(model)
    replace_model(args.out, model.bfloat16() if bits_of(model) < 16 else model, tokenizer)
    print(f"{args.out}: {base} with the adapter merged; rounding changed sums by {error:.1%} of what it adds")
    if error > MOST_LOST:
        print("much of the adapter is lost: keep it beside its base, or merge it into the base in 16 bit")

def export_command(args):
    """Write a dense Hugging Face folder."""
    model, tokenizer = load_model(args.model)
    export(model, tokenizer, args.out)
    print(f"{args.out}: {args.model} as a dense {model.config.kind} for transformers: "
          f"AutoModelForCausalLM.from_pretrained({args.out!r})")

def info(args):
    """A table of layers, ranks and bytes; the same layer of all blocks is one line."""
    source, groups, size = open_model(args.model), {}, 0
    for name in source.shapes:
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    print(", ".join(f"{key} {value}" for key, value in source.config.as_dict().items()))
    print(f"{'tensor':34}{'count':>6}{'shape':>13}{'kind':>16}{'rank':>5}{'bits':>5}{'MB':>9}")
    for key, names in groups.items():
        name, owner = names[0], names[0].rpartition(".")[0]
        layer = source.layers.get(owner, source.layers.get(owner.rpartition(".")[0], {}))  # up, also of up.A
        bits = layer["bits"] if name.endswith(".q") else source.stored[name].bits
        stored = sum(math.prod(source.shapes[name]) * source.stored[name].bits for name in names) / 8
        size += stored
        print(f"{key:34}{len(names):6}{'x'.join(map(str, source.shapes[name])):>13}"
              f"{layer.get('kind', 'dense'):>16}{layer.get('rank', ''):>5}{bits:>5g}{stored / 1e6:9,.2f}")
    total = count_parameters(build(source.config, source.layers))
    print(f"{total / 1e6:,.1f}M parameters, {size / 1e6:,.1f} MB, {8 * size / total:.1f} bits a parameter")

def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in dict(info=info, export=export_command, merge=merge, quantize=quantize).items():
        p = commands.add_parser(name, help=run.__doc__)
        p.set_defaults(run=run)
        what = "adapter" if name == "merge" else "model"
        p.add_argument(what, help="a folder; of a model also a file or a known name")
        if name != "info":
            p.add_argument("out", help="the new folder")
    p = commands.choices["quantize"]
    p.add_argument("--bits", type=int, default=8, choices=[4, 8], help="of a weight")
    p.add_argument("--group", type=at_least_0, metavar="N", help="numbers of a row that share a scale; 0: "
                   "whole rows (default: a GGUF's blocks, else 0 at 8 bit, 64 at 4)")
    weights = p.add_mutually_exclusive_group()
    weights.add_argument("--calibration", metavar="TEXT", help="round so that the outputs for this text "
                         "change least; a file, a folder or builtin")
    weights.add_argument("--random-init", action="store_true", help="random weights of a known name's "
                         "shapes, to measure sizes and speeds")
    p.add_argument("--rank", type=at_least_0, default=0, metavar="R", help="with --random-init: of every "
                   "linear layer; 0 is full rank")
    args = parser.parse_args(argv)
    if args.command != "info":
        check_folder(args.out, new=True)  # before anything slow
    args.run(args)
    return 0

if __name__ == "__main__":
    command(main)
