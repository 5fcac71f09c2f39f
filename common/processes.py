"""The processes of a run, as torchrun starts them, and the strategies by which they train one model.

A step's whole batch is shared out among the `replicas` of the model. One object, the strategy, stands between
a training loop and the processes. With N processes and P parameters, 4 bytes each, and AdamW's two moments:

              in each process                memory, bytes       numbers that it sends in a step
    replicas  the whole model                16 P                2 P: gradients, around a ring and back
    sharded   a share of each parameter      16 P / N, a block   3 P: parameters in both passes, gradients
    pipeline  some of the blocks, by hand    16 P / N            activations (pipeline.py)

    strategy = distribute(model, loss_of, device)
    loss = strategy.backward(batches, seed)    # the gradients of the whole batch's mean loss are in .grad now
    strategy.clip(1.0)                         # the norm of the whole gradient
    strategy.evaluate(weighted_batches)        # their mean loss
    strategy.gather(tensors)                   # whole tensors, in process 0
"""
import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

def from_torchrun(name, alone):
    """What torchrun's variable says; `alone` without torchrun: other programs set some of them too."""
    return int(os.environ[name]) if dist.is_torchelastic_launched() else alone

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

def my_share(items):
    """This process's part of some items, which are dealt out in turn."""
    return list(items)[rank()::world_size()]

def merged(own):
    """All entries of all processes' dictionaries, whose tensors are on the CPU."""
    parts = [own]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}

def any_process(flag):
    """Whether the flag is set in any process, so that all take the same branch."""
    return all_reduce(flag, dist.ReduceOp.MAX) > 0

def seed_random(*numbers):
    """Seed torch's generators with a mixture of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

class AnyForward(nn.Module):
    """A forward pass that is any function of the model's parts, a loss or a generation: forward passes are
    what DistributedDataParallel and fully_shard watch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)

class Single:
    """One process, or replicas, whose parameters may be sharded; `distribute` makes it.
    loss_of(*batch) -> mean loss; device: a common.device.Device."""

    def __init__(self, model, loss_of, device):
        self.model, self.loss_of, self.device = model, loss_of, device
        self.replica, self.replicas = rank(), world_size()  # which share of the batch this process takes
        self.module = AnyForward(model)

    def loss(self, *batch):
        """The mean loss of a batch, under autocast; None where another process has it."""
        with self.device.autocast():
            return self.module(self.loss_of, *batch)

    def backward(self, batches, seed, weights=None):
        """Add to .grad the gradients of this process's batches, in turn; returns their weighted loss.
        weights: of each batch's mean loss, 1 / len(batches) if not given; over all processes they sum to
        `replicas`. Dropout depends on the seed and on the batch's number, not on which process has it."""
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

    @torch.no_grad()
    def evaluate(self, batches):
        """The mean loss over pairs (batch, weight), in all processes; None where there are none."""
        self.model.eval()
        total = count = 0
        for batch, weight in batches:
            loss = self.loss(*batch)
            if loss is not None:  # None: another stage of a pipeline has it
                total, count = total + loss.item() * weight, count + weight
        self.model.train()
        total, count = all_reduce(total), all_reduce(count)
        return total / count if count else None

    def own_parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad and not p.is_meta]

    def clip(self, largest):
        """Scale the gradients so that their norm, over all parameters, is at most `largest`."""
        torch.nn.utils.clip_grad_norm_(self.own_parameters(), largest)

    def gather(self, tensors):
        """name -> whole tensor in process 0, {} in the others. tensors: name -> this process's part."""
        gathered = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor).detach()  # every process takes part
            if is_first():
                gathered[name] = tensor.cpu()
        return gathered

def distribute(model, loss_of, device, shard=False):
    """The strategy of one process, or of torchrun's.

    shard: fully sharded data parallelism, for a model too large for one GPU. A block's parameters are
    gathered right before it computes and let go right after, in both passes; its gradients are averaged and
    handed out in the same parts. Embedding, head and norms are one more such unit."""
    strategy = Single(model, loss_of, device)
    if shard:
        from torch.distributed.fsdp import fully_shard  # two seconds to import
        for block in model.blocks:
            fully_shard(block)
        fully_shard(strategy.module, reshard_after_forward=True)

        def gather_once():
            """Make the tensors that parameters are gathered in. Made later, under the torch.inference_mode in
            which scores are taken, they could not learn."""
            for block in model.blocks:
                block.unshard()
                block.reshard()
        strategy.module(gather_once)
    elif world_size() > 1:  # gradients are averaged while the backward pass computes others
        gpus = [device.torch_device] if device.torch_device.type == "cuda" else None
        strategy.module = DistributedDataParallel(strategy.module, gpus, broadcast_buffers=False)
    return strategy

def whole(tensor):
    """The tensor, or all of one of which fully_shard leaves a part in each process (a DTensor)."""
    return tensor if type(tensor) in (torch.Tensor, nn.Parameter) else tensor.full_tensor()

def own_part(tensor, parameter):
    """This process's part of a whole tensor that belongs to a parameter, as optimizers' moments do: every
    process has read the same file. Scalars stay whole."""
    tensor = tensor.to(parameter.device)
    if type(parameter) is nn.Parameter or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
