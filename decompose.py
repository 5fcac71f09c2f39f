"""Decompose a pretrained model in parallel: W -> B A for every linear layer of the blocks (section IV).

    python decompose.py --model smollm2-135m --rank 128                      the truncated SVD of every matrix
    python decompose.py --model smollm2-135m --ratio 0.6 --calibration TEXT  keep 60%, fitted to a text
    torchrun --nproc_per_node 4 decompose.py --model llama2-7b --ratio 0.5   divided among processes or GPUs
    python train.py --method 2 --init-from out/decomposed                    recover what was lost

The output is a model folder (eval.py, sample.py and train.py --init-from read it) with summary.json. `python
serve.py --model OUT --teach` shows the spectra on its page.

Plain: every matrix is replaced by the nearest one of its rank (lowrank.svd_factors). With --calibration: by
the one whose outputs for a text are nearest, block by block (beyond/activations.py). Each process has the
whole model, in float32, and a share of the matrices to decompose.

Ranks (--ratio): one budget of parameters for all matrices, spent where a parameter saves most. Without a text
each matrix counts the same: its eigenvalues are taken relative to their sum.
"""
import json
import re
import time
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import build, fill, open_dense, own_tensors, save_model
from common import cli
from common.cli import Parser, at_least_1, check_folder, command, refuse, say, share, write_atomic
from common.data import calibration_batches
from common.device import find_device, peak_memory
from common.processes import barrier, in_turn, is_first, merged, my_share, process_group, world_size
from common.storage import replaced
from lowrank import eigenvalues, from_factors, gram, millions, svd_factors
from model import count_parameters, is_linear

def linears(model):
    """The layers of the blocks: name -> layer."""
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and is_linear(m)}

class Plain:
    """Decompose the weights of a model as they are."""

    def __init__(self, model):
        self.model, self.layers = model, linears(model)

    def losses(self):
        """What it costs to cut off each eigenvalue of each matrix: name -> (m,), largest first."""
        found = {}
        mine = my_share(self.layers)
        for name in tqdm(mine, "eigenvalues", disable=None if is_first() else True, leave=False):
            values = eigenvalues(gram(self.layers[name].weight.double()))
            found[name] = values / values.sum().clamp_min(1e-300)
        return merged(found)

    def decompose(self, ranks):
        """Put factors in the place of each layer whose rank is not 0."""
        found = {}
        mine = my_share(name for name, r in ranks.items() if r)
        for name in tqdm(mine, "decomposing", disable=None if is_first() else True, leave=False):
            found[name] = [factor.cpu() for factor in svd_factors(self.layers[name].weight, ranks[name])]
        for name, (B, A) in merged(found).items():
            self.model.set_submodule(name, from_factors(self.layers[name], B, A))

# ----------------------------------------------------------------------------- ranks under one budget

def dense_from(shape):
    """The rank from which on a factorization is not smaller than the matrix."""
    return -(-shape[0] * shape[1] // sum(shape))

def size(shape, r):
    """Parameters of a matrix kept at rank r; rank 0 means that it stays dense."""
    return r * sum(shape) if r else shape[0] * shape[1]

def same_ranks(shapes, r):
    """One rank for all, where that makes a matrix smaller; 0 elsewhere."""
    largest = max(map(dense_from, shapes.values())) - 1
    refuse(r > largest, f"--rank {r} would make no matrix smaller: the largest rank that does is {largest}")
    return {name: r if r < dense_from(shape) else 0 for name, shape in shapes.items()}

def choose_ranks(losses, shapes, ratio):
    """The ranks (0: dense) within ratio x all parameters that lose least. losses: as of Plain.losses.

    Every matrix begins at rank 1. What saves most for each parameter that it adds is bought first, as long as
    it fits the budget: one more rank of a matrix, which saves an eigenvalue, or the whole matrix. That is
    bought at the rank from which it is the better bargain: near it B A is hardly smaller than W."""
    purchases = []  # (saved by a parameter, name, the new rank)
    for name, shape in shapes.items():
        loss = losses[name].double()
        saved = loss[:dense_from(shape) - 1]  # by rank 1, 2, ...
        paid = torch.arange(1, len(saved) + 1) * sum(shape)
        by_all = (loss.sum() - saved.cumsum(0)) / (size(shape, 0) - paid)  # at rank 1, 2, ...
        purchases += [(s, name, r) for r, s in enumerate((saved / sum(shape)).tolist(), 1)]
        purchases.append((by_all.min().item(), name, 0))
    ranks = dict.fromkeys(shapes, 1)
    left = ratio * sum(size(shape, 0) for shape in shapes.values()) - sum(map(sum, shapes.values()))
    for _, name, r in sorted(purchases, key=itemgetter(0), reverse=True):
        price = size(shapes[name], r) - size(shapes[name], ranks[name])
        if ranks[name] and price <= left:
            ranks[name], left = r, left - price
    return ranks

# ----------------------------------------------------------------------------- the command

def parse(argv):
    p = Parser(__doc__)
    p.add_argument("--model", required=True, help="a known name, a folder or a file; dense")
    kept = p.add_mutually_exclusive_group(required=True)
    kept.add_argument("--rank", type=at_least_1, help="of all matrices of the blocks that it makes smaller")
    kept.add_argument("--ratio", type=share, help="or: the share of these matrices to keep, by chosen ranks")
    p.add_argument("--calibration", metavar="TEXT", help="keep the outputs for this text, not the weights: a "
                   "file, a folder or builtin (default: none, plain SVD)")
    p.add_argument("--out-dir", default="out/decomposed", help="the new model folder (default: %(default)s)")
    args = p.parse_args(argv)
    check_folder(args.out_dir, new=True)
    return args

def decompose(args, source, device):
    began, model = time.perf_counter(), build(source.config, {})
    shapes = {name: layer.weight.shape for name, layer in linears(model).items()}
    whole = sum(size(shape, 0) for shape in shapes.values())
    least = sum(map(sum, shapes.values())) / whole
    refuse(args.ratio and args.ratio < least,
           f"--ratio {args.ratio} is less than rank 1 everywhere, which is {least:.4f}")
    ranks = same_ranks(shapes, args.rank) if args.rank else None
    dtypes, method = {name: source.get(name, 1).dtype for name in source.shapes}, Plain(model)
    if args.calibration:
        from beyond.activations import Calibrated
        windows = calibration_batches(args.calibration, source.tokenizer(), source.config.context)
        method = Calibrated(model, windows, dtypes)
    fill(model, source.tensors, device, torch.float32).requires_grad_(False)
    for name, p in model.named_parameters():
        refuse(not p.isfinite().all(), f"{source.path}: {name} has numbers that are not finite: get it again")
    ranks = ranks or choose_ranks(method.losses(), shapes, args.ratio)
    method.decompose(ranks)
    if is_first():
        now, low = count_parameters(model), sum(r > 0 for r in ranks.values())
        kept = sum(size(shape, ranks[name]) for name, shape in shapes.items())
        full, kept = now - kept + whole, kept / whole
        summary = dict(parameters=now, parameters_full_rank=full, compression=full / now, block_share=kept,
                       ranks=ranks, seconds=time.perf_counter() - began, processes=world_size(),
                       peak_memory_bytes=peak_memory(device), device=str(device), arguments=vars(args))
        write(model, source, dtypes, args, summary)
        say(f"{low} of {len(ranks)} matrices low-rank, {millions(full)} -> {millions(now)} parameters "
            f"({full / now:.2f}x), {kept:.1%} of the blocks' matrices: {args.out_dir}")
    barrier()

def write(model, source, dtypes, args, summary):
    """The model folder, each tensor in the dtype that it has in the model's files (A and B: their weight)."""
    path, tensors = Path(args.model), own_tensors(model)
    dense = str(path.resolve()) if path.exists() else args.model  # train.py finds it wherever it is started
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtypes[re.sub(r"\.[AB]$", ".weight", name)])
    with replaced(args.out_dir) as folder:
        save_model(folder, model, source.tokenizer(), tensors, decomposed_from=dense)
        write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")

@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    device = find_device("float32")
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the small eigenvalues
    say(f"device {device.name}, processes: {world_size()}")
    with cli.alone_in(args.out_dir), process_group():
        decompose(args, in_turn(open_dense, args.model), device.torch_device)
    return 0

if __name__ == "__main__":
    command(main)
