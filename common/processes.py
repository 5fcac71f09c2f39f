"""The processes of a run, as torchrun starts them, and the strategies by which they train one model.

A step's whole batch is shared out among the `replicas` of the model. One object, the strategy, stands between
a training loop and the processes:

    Single        one process
    Replicas      every process has the whole model and a share of the batch (torch's DistributedDataParallel)
    Sharded       the same, but parameters, gradients and moments are spread over the processes (fully_shard)
    Pipeline      every process has some of the blocks; by hand, in pipeline.py

What data parallelism costs with N processes and P parameters, 4 bytes each, and AdamW's two moments:

                  memory of a process          sent by a process in a step
    Replicas      16 P                         2 P numbers: the gradients, around a ring and back
    Sharded       16 P / N, and one block      3 P numbers: parameters forward and backward, gradients once

    strategy = distribute(model, loss_of, device)
    loss = strategy.backward(batches, seed)    # the gradients of the whole batch's mean loss are in .grad now
    strategy.clip(1.0)                         # the norm of the whole gradient
    strategy.loss(*batch)                      # without a gradient
    strategy.gather(tensors)                   # whole tensors, in process 0
"""
import math
import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def from_torchrun(name, alone):
    """What torchrun's variable says; `alone` unless all are there: other programs leave some of them set."""
    return int(os.environ[name]) if all(os.environ.get(variable) for variable in TORCHRUN) else alone


def rank():
    return from_torchrun("RANK", 0)


def is_first():
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def world_size():
    return from_torchrun("WORLD_SIZE", 1)


@contextmanager
def process_group():
    """Inside, torchrun's processes can send tensors: on a CPU by gloo, on a GPU by NCCL."""
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier():
    if world_size() > 1:
        dist.barrier()


def in_turn(function, *args):
    """function(*args) in every process, the first one before all others: it prepares, they find."""
    result = function(*args) if is_first() else None
    barrier()
    return result if is_first() else function(*args)


def all_reduce(value, op=dist.ReduceOp.SUM):
    """The sum (or maximum) of a number over all processes."""
    value = torch.as_tensor(float(value), dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(value, op)
    return value.item()


def any_process(flag):
    """Whether the flag is set in any process, so that all take the same branch."""
    return all_reduce(flag, dist.ReduceOp.MAX) > 0


def seed_random(*numbers):
    """Seed torch's generators with a mixture of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class AnyForward(nn.Module):
    """A forward pass that calls any function of the model's parts, a loss or a generation: what
    DistributedDataParallel and fully_shard watch are forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)


class Single:
    """One process. loss_of(*batch) -> mean loss; device: a common.device.Device."""
    replica, replicas = 0, 1   # which share of the batch this process takes

    def __init__(self, model, loss_of, device):
        self.model, self.loss_of, self.device = model, loss_of, device
        self.module = AnyForward(model)

    def run(self, function, *args):
        """function(*args), which may use the model's parts."""
        return self.module(function, *args)

    def loss(self, *batch):
        """The mean loss of a batch, under autocast; None where another process has it."""
        with self.device.autocast():
            return self.run(self.loss_of, *batch)

    def backward(self, batches, seed, weights=None):
        """Add the gradients of this process's batches, one after the other; returns their weighted loss.

        weights: of each batch's mean loss, 1 / len(batches) if not given; over all processes they sum to
        `replicas`. Dropout depends on the seed and on the batch's number, not on which process has it.
        """
        weights = weights or [1 / len(batches)] * len(batches)
        total = torch.zeros((), device=self.device.torch_device)
        for i, (batch, weight) in enumerate(zip(batches, weights)):
            seed_random(*seed, self.replica * len(batches) + i)
            # DistributedDataParallel's: gradients travel once, with the last batch
            self.module.require_backward_grad_sync = i == len(batches) - 1
            loss = self.loss(*batch) * weight
            loss.backward()
            total += loss.detach()
        return total

    def own_parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad and not p.is_meta]

    def clip(self, largest):
        """Scale the gradients so that their norm, over all parameters, is at most `largest`."""
        torch.nn.utils.clip_grad_norm_(self.own_parameters(), largest)

    def is_finite(self):
        """Whether all parameters that this process keeps, or knows of, are finite."""
        return self.whole(nn.utils.get_total_norm(self.own_parameters(), math.inf)).isfinite().item()

    def gather(self, tensors):
        """name -> whole tensor in process 0, {} in the others. tensors: name -> this process's part."""
        return {name: t.detach() for name, t in tensors.items()} if is_first() else {}

    @staticmethod
    def whole(tensor):
        """The tensor of which this process may keep a part only."""
        return tensor

    @staticmethod
    def own_part(tensor, parameter):
        """This process's part of a whole tensor that belongs to a parameter, as optimizers' moments do."""
        return tensor.to(parameter.device)


class Replicas(Single):
    """Data parallelism: gradients are averaged over the processes while the backward pass computes others."""

    def __init__(self, model, loss_of, device):
        super().__init__(model, loss_of, device)
        self.replica, self.replicas = rank(), world_size()
        devices = [device.torch_device] if device.torch_device.type == "cuda" else None
        self.module = nn.parallel.DistributedDataParallel(self.module, devices, broadcast_buffers=False)


class Sharded(Single):
    """Fully sharded data parallelism, for a model of which no GPU can hold a whole replica. A block's
    parameters are gathered right before it computes and let go right after, in both passes; its gradients are
    averaged and handed out in the same parts. Embedding, head and norms are one more such unit."""

    def __init__(self, model, loss_of, device):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # two seconds to import
        super().__init__(model, loss_of, device)
        self.replica, self.replicas = rank(), world_size()
        mesh = init_device_mesh(device.torch_device.type, (world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh, reshard_after_forward=True)
        self.run(self.gather_once)

    def gather_once(self):
        """Make the tensors that parameters are gathered in. Made later, under the torch.inference_mode in
        which scores are taken, they could not learn."""
        for block in self.model.blocks:
            block.unshard()
            block.reshard()

    def gather(self, tensors):
        gathered = {}
        for name, tensor in tensors.items():
            tensor = self.whole(tensor)  # every process must take part
            if is_first():
                gathered[name] = tensor.detach().cpu()
        return gathered

    @staticmethod
    def whole(tensor):
        from torch.distributed.tensor import DTensor
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @staticmethod
    def own_part(tensor, parameter):
        """Every process has read the same file, so each cuts its own part. Scalars stay whole."""
        from torch.distributed.tensor import DTensor, distribute_tensor
        tensor = tensor.to(parameter.device)
        if not isinstance(parameter, DTensor) or tensor.dim() == 0:
            return tensor
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def distribute(model, loss_of, device, shard=False):
    """The one of these that fits the number of processes."""
    if world_size() == 1:
        return Single(model, loss_of, device)
    return Sharded(model, loss_of, device) if shard else Replicas(model, loss_of, device)
