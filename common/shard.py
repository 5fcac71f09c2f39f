"""Sharded data parallelism: for a model of which no GPU can hold a whole replica.

Data parallelism keeps parameters, gradients and AdamW's two moments, 16 bytes a parameter, in every process. Here each of N processes keeps
1/N of all four. A block's parameters are gathered from all processes right before it computes and let go right after, forward and backward;
its gradients are summed and handed out in the same parts. It costs half as many bytes again on the wire as plain data parallelism:

                         memory a process    sent a process and step
    replicas (DDP)       16 P                 2 P numbers (gradients, a ring: there and back)
    sharded              16 P / N + a block   3 P numbers (parameters twice, gradients once)

The gathering is torch's own, torch.distributed.fsdp.fully_shard; this file says what is a unit and takes whole tensors in and out.

    torchrun --nproc_per_node 8 train.py --model gpt2-xl --rank 384 --shard
    torchrun --nproc_per_node 8 finetune.py --base llama2-13b --bits 16 --shard
"""
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model, loss_of, device_type):
    """Spread the parameters of `model` over all processes, in place: each block is a unit, what is outside the blocks (W^E, W^H, norms) another.

    loss_of: the module whose forward pass calls the model; embedding and head are gathered for as long as it computes. Every process must
    hold the same values. On a GPU each block moves there as it is cut, so that the whole model never has to fit.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(loss_of, mesh=mesh, reshard_after_forward=True)  # else W^E and W^H would stay gathered after an evaluation, apart from their moments


class Within(nn.Module):
    """Within(model)(function, ...) calls a function that reads a model's parts, as one forward pass: for so long embedding and head are gathered."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)


def gather_once(model):
    """To be called within the sharded model before anything else is, if any of that is under torch.inference_mode (generation, scores): the tensors
    that a block's parameters are gathered in are made the first time, and made there they could not learn later."""
    for block in model.blocks:
        block.unshard()
        block.reshard()


def whole(tensors):
    """name -> whole tensor on the CPU, from the parts of all processes (each must call it); one at a time, kept in process 0 alone."""
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            result[name] = tensor.cpu()
    return result


def part_like(tensor, parameter):
    """This process's part of a whole tensor that belongs to `parameter`, as its moments do; scalars (AdamW's step) stay whole.

    Every process has read the same file, so each cuts (and copies) its own part, nothing is sent.
    """
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor.to(parameter.device)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
