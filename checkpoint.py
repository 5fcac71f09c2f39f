"""Models on disk, and back. A model is a folder that can be rebuilt from itself alone:

    config.json            the architecture, and for each swapped layer its kind, rank, bits and groups
    model.safetensors      the weights, with a checksum inside (in shards when large: config.json lists them)
    tokenizer.json or tokenizer.model

The folder of a training run is one too (common/storage.py keeps its state). What others wrote is read by
common/formats.py, a tensor at a time as well.

    python checkpoint.py info out/train                            layers, ranks, bytes
    python checkpoint.py quantize out/train out/int8 --bits 8
    python checkpoint.py merge out/finetune out/merged             the base with an adapter multiplied into it
    python checkpoint.py export out/train out/hf                   a dense Hugging Face folder
"""
import itertools
import json
import re
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import InputError, Parser, at_least_0, check_folder, command, refuse, write_atomic
from common.data import calibration_batches
from common.device import give_back_memory
from common.download import HUB, fetch_smollm2, hub_snapshot
from common.formats import Source, export, make_config, open_source, read_headers
from common.storage import read_tensors, replaced, sharded, sync_folder, write_tensors
from common.tokenizer import read_json
from lowrank import BlendedLinear, LowRankEmbedding, LowRankLinear, merge_lora, replace_linears, swap_layers
from model import CONFIGS, Layer, Packed, Transformer, config_for, count_parameters

FORMAT = "fingpt-hpc"
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
        swapped = swap_layers(model, make, wanted=lambda m: isinstance(m, (nn.Linear, nn.Embedding)))
        tie(model)
    unknown = ", ".join(layers.keys() - set(swapped))
    refuse(unknown, f"config.json describes layers that a {config.kind} of {config.blocks} blocks does not "
           f"have: {unknown[:200]}")
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


def save_model(folder, model, tokenizer=None, tensors=None):
    """Write a model folder, new or about to be renamed, of the model's own tensors or of those given."""
    folder, tensors = Path(folder), tensors or own_tensors(model)
    folder.mkdir(parents=True, exist_ok=True)
    files = sharded({name: tensors[name].nbytes for name in sorted(tensors)})
    for file, names in files.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    if tokenizer is not None:
        tokenizer.save(folder)
    write_config(folder, model.config, describe_layers(model), list(files))


def replace_model(folder, model, tokenizer):
    """save_model in place of what `folder` is."""
    with replaced(folder) as new:
        save_model(new, model, tokenizer)


def write_config(folder, config, layers, files, **more):
    """config.json, which makes a folder a model; written last."""
    content = dict(format=FORMAT, version=1, architecture=config.as_dict(), layers=layers, files=files) | more
    write_atomic(Path(folder) / "config.json", json.dumps(content, indent=1) + "\n")
    sync_folder(folder)


def read_config(folder):
    """config.json of a model folder of this project; None of any other path."""
    config = read_json(Path(folder) / "config.json")
    if config.get("format") != FORMAT:
        return None
    refuse(config.get("version") != 1, f"{folder} is of version {config.get('version')}, this program reads "
           "version 1: use the program that wrote it")
    return config


def decomposed_from(folder):
    """The dense model that decompose.py made a folder from; None of any other model."""
    return (read_config(folder) or {}).get("decomposed_from")


class FolderSource(Source):
    """A model folder of this project, read as common/formats.py reads those of others."""

    def __init__(self, path, config):
        self.path, file = path, path / "config.json"
        try:
            self.files, self.layers = [path / name for name in config["files"]], config["layers"]
            self.config = make_config(file, config["architecture"])
            model = build(self.config, self.layers)
        except (AttributeError, KeyError, TypeError, RuntimeError) as e:
            raise InputError(f"{file} is damaged ({type(e).__name__}: {e}): get the folder again") from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
        self.find(read_headers(self.files), self.shapes)
        self.bytes = sum(file.stat().st_size for file in self.files)

    def get(self, name, rows=None):
        tensor = self.stored[name].read()
        return tensor if tensor.dim() < 2 else tensor[:rows]

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
    """The Source of a known name, a folder or a file."""
    path = locate(name)
    config = read_config(path)
    return open_source(path) if config is None else FolderSource(path, config)


def open_dense(name):
    """The Source of a model that has none but dense layers."""
    source = open_model(name)
    for layer, form in source.layers.items():
        raise InputError(f"{name} is not dense: {layer} is {form['kind']}. Give what it was made from")
    return source


def load_model(name, device="cpu", dtype=torch.float32, bits=16, group=None):
    """(model, tokenizer) of a known name, a folder or a file, in eval mode; the tokenizer may be None.

    bits 8 or 4: quantized while loading, a layer at a time; a folder that is quantized must have these bits.
    """
    refuse(bits not in (4, 8, 16), f"--bits must be 4, 8 or 16, got {bits}")
    source = open_model(name)
    stored = min((form["bits"] for form in source.layers.values() if "bits" in form), default=bits)
    refuse(bits < 16 and stored != bits, f"{source.path} has {stored}-bit weights already: leave "
           f"--bits {bits} out, or give the model that it was made from")
    model = fill(build(source.config, source.layers), source.tensors, device, dtype, bits, group)
    return model, source.tokenizer()


GIVE_BACK = 1 << 28  # bytes of layers that were quantized, after which free memory goes back to the system


def fill(model, tensors, device, dtype, bits=16, group=None):
    """Give a meta model its memory, a (name, tensor) of tensors(forms) at a time.

    bits 8 or 4: a layer is quantized when it is complete, so that the model never is whole in 16 bit.
    """
    forms, freed = {}, 0
    if bits < 16:
        import quant
        forms = quant.formats(model, bits, group)
    for name, tensor in tensors(forms):
        owner = name.rpartition(".")[0]
        layer = model.get_submodule(owner)
        if isinstance(tensor, Packed):  # a QuantMatrix, as the file has it
            model.set_submodule(owner, quant.holding(layer, tensor.to(device)))
            del forms[owner], layer
            continue
        place(model, name, tensor, device, dtype)
        del tensor
        if owner in forms and not any(p.is_meta for p in layer.parameters()):
            freed += sum(p.nbytes for p in layer.parameters())
            model.set_submodule(owner, quant.quantize_layer(layer, *forms[owner], name=owner))
            del layer
            if freed > GIVE_BACK:  # else the heap fills with holes too small for the next layer
                give_back_memory()
                freed = 0
    tie(model)
    return model.eval()


def place(model, name, tensor, device, dtype):
    """Copy a tensor into a meta model; a floating-point parameter in `dtype`, a buffer as it is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        copy = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        trains = module._parameters[leaf].requires_grad
        module._parameters[leaf] = nn.Parameter(copy, requires_grad=trains)
    else:
        module._buffers[leaf] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)


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
    """Integers, scales in float16, and what is not quantized in bfloat16."""
    refuse(args.random_init and args.calibration,
           "--calibration rounds trained weights, and --random-init has none: leave one out")
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
    megabytes = sum(file.stat().st_size for file in Path(args.out).iterdir()) / 1e6
    millions = count_parameters(model) / 1e6
    print(f"{args.out}: {millions:,.1f}M parameters at {args.bits} bit, {megabytes:,.1f} MB")


MOST_LOST = 0.05  # of what an adapter adds, when its sums with the base are rounded


def merge(args):
    """The base of an adapter with the adapter multiplied into it, as a model folder."""
    from common.adapters import base_id, load_adapter, read_adapter
    base = read_adapter(args.adapter).base_name
    model, tokenizer = load_model(base, bits=args.bits)
    print(load_adapter(model, args.adapter, base_id(base)))
    error = merge_lora(model)
    quantized = any("quant" in form["kind"] for form in describe_layers(model).values())
    replace_model(args.out, model.bfloat16() if quantized else model, tokenizer)
    print(f"{args.out}: {base} with the adapter merged; rounding changed sums by {error:.1%} of what it adds")
    if error > MOST_LOST:
        print("much of the adapter is lost: keep it beside its base, or merge it at --bits 16, into the base "
              "before that was quantized")


def export_command(args):
    model, tokenizer = load_model(args.model)
    export(model, tokenizer, args.out)
    print(f"{args.out}: {args.model} as a dense {model.config.kind} for transformers: "
          f"AutoModelForCausalLM.from_pretrained({args.out!r})")


def info(args):
    """The table of a model's layers; the same layer of all blocks is one line."""
    source, groups = open_model(args.model), {}
    config, layers, model = source.config, source.layers, build(source.config, source.layers)
    for name, p in own_tensors(model).items():
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append((name, p))
    tied = ", head tied to the embedding" if config.tied and "head" not in layers else ""
    print(f"{config.kind}: {config.blocks} blocks, width {config.width}, {config.heads} heads "
          f"({config.kv_heads} key/value), context {config.context}, vocabulary {config.vocab_size}{tied}")
    print(f"{'tensor':34}{'count':>6}{'shape':>13}{'kind':>16}{'rank':>5}{'bits':>5}{'MB':>9}")
    for key, alike in groups.items():
        name, p = alike[0]
        owner = name.rpartition(".")[0]
        layer = layers.get(owner) or layers.get(owner.rpartition(".")[0], {})  # of a quantized factor, up.A
        bits = layer["bits"] if name.endswith(".q") else source.bits[name]
        megabytes = sum(p.numel() * source.bits[name] for name, p in alike) / 8e6
        print(f"{key:34}{len(alike):6}{'x'.join(map(str, p.shape)):>13}{layer.get('kind', 'dense'):>16}"
              f"{layer.get('rank', ''):>5}{bits:>5g}{megabytes:9,.2f}")
    total = count_parameters(model)
    print(f"{total / 1e6:,.1f}M parameters, {source.bytes / 1e6:,.1f} MB on disk, "
          f"{8 * source.bytes / total:.1f} bits a parameter")


COMMANDS = {"info": (info, "a table of layers, ranks and bytes"),
            "export": (export_command, "write a dense Hugging Face folder"),
            "merge": (merge, "write an adapter's base with the adapter multiplied into it"),
            "quantize": (quantize, "write a folder of int8 or int4 weights")}


def parse(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        p = commands.add_parser(name, help=what)
        source = "a folder in PEFT's format" if name == "merge" else "a folder, a file, or a known name"
        p.add_argument("adapter" if name == "merge" else "model", help=source)
        if name != "info":
            p.add_argument("out", help="the new folder")
        if name == "merge":
            p.add_argument("--bits", type=int, default=16, choices=[4, 8, 16], help="of a weight")
        if name == "quantize":
            p.add_argument("--bits", type=int, default=8, choices=[4, 8], help="of a weight")
            p.add_argument("--group", type=at_least_0, metavar="N", help="numbers of a row that share a "
                           "scale; 0: whole rows (default: a GGUF's blocks, else 0 at 8 bit, 64 at 4)")
            p.add_argument("--calibration", metavar="TEXT", help="round so that the outputs for this text "
                           "change least; a file, a folder or builtin")
            p.add_argument("--random-init", action="store_true",
                           help="random weights of a known name's shapes, to measure sizes and speeds")
            p.add_argument("--rank", type=at_least_0, default=0, metavar="R",
                           help="with --random-init: of every linear layer; 0 is full rank")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.command != "info":
        check_folder(args.out, new=True)  # before anything slow
    COMMANDS[args.command][0](args)
    return 0


if __name__ == "__main__":
    command(main)
