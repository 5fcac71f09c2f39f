"""Pipeline parallelism by hand: GPipe and 1F1B (section IV.B, "Pipeline model-parallel method", and Fig. 3).

A model too large for one GPU is cut into N stages of neighbouring blocks, each in a process of its own. A
stage sends its activations to the next one and the gradient of its input to the one before. With the whole
batch at once, Fig. 3(a), one stage computes while N - 1 wait. So the batch is split into M microbatches that
follow each other through the stages, Fig. 3(b). Fm, Bm: forward and backward pass of microbatch m.

           gpipe, N = 4, M = 4                               1f1b, N = 4, M = 4

    clock   0  1  2  3  4  5  6  7  8  9  10 11 12 13         0  1  2  3  4  5  6  7  8  9  10 11 12 13
    stage 0 F0 F1 F2 F3 .  .  .  .  .  .  B3 B2 B1 B0         F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
    stage 1 .  F0 F1 F2 F3 .  .  .  .  B3 B2 B1 B0 .          .  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
    stage 2 .  .  F0 F1 F2 F3 .  .  B3 B2 B1 B0 .  .          .  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
    stage 3 .  .  .  F0 F1 F2 F3 B3 B2 B1 B0 .  .  .          .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .

A stage is busy in 2M of 2(N + M - 1) clocks: its utilization is M / (N + M - 1), and the dots are the bubble.
Gradients add up over the microbatches: the result is that of one process and the whole batch (dropout, where
there is any, is drawn for each microbatch). GPipe keeps the activations of all M microbatches, and so goes
with recomputation (recompute.py). 1F1B has the same bubble, but a backward pass runs as soon as it can: stage
s holds at most N - s microbatches.

    python pipeline.py --stages 4 --microbatches 8 --schedule gpipe    the clock table
    torchrun --nproc_per_node 4 train.py --rank 192 --pipeline 4 --microbatches 8 --schedule 1f1b
    torchrun --nproc_per_node 4 train.py --pipeline 2                  2 stages x 2 replicas
    python bench.py pipeline                                           utilization, measured
"""
from collections import ChainMap, deque
from datetime import timedelta
from functools import cache, partial
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn as nn

from common.cli import InputError, Parser, at_least_1, command, refuse
from common.loss import head_loss
from common.processes import Single, seed_random
from model import matmul_weights

SCHEDULES = ("gpipe", "1f1b")
TIMEOUT = timedelta(minutes=10)  # the longest that a process may wait: compiling and evaluating take minutes


# ----------------------------------------------------------------------------- the schedule, as data

def schedule(kind, stages, microbatches):
    """For each stage the list of its steps, ("F", m) or ("B", m), in order."""
    if kind not in SCHEDULES:
        raise InputError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {kind}")
    forward, backward = [("F", m) for m in range(microbatches)], [("B", m) for m in range(microbatches)]
    if kind == "gpipe":
        return [forward + backward[::-1] for _ in range(stages)]
    lists = []
    for s in range(stages):
        ahead = min(stages - 1 - s, microbatches)  # forward passes before the first gradient can be there
        pairs = [step for pair in zip(forward[ahead:], backward) for step in pair]
        lists.append(forward[:ahead] + pairs + backward[microbatches - ahead:])
    return lists


def input_of(kind, m, stage, stages):
    """The step (kind, m, stage) that must end before this one can begin; None: the batch is its input."""
    source = stage - 1 if kind == "F" else stage + 1
    if 0 <= source < stages:
        return kind, m, source
    return None if kind == "F" else ("F", m, stage)


def simulate(lists, forward=1, backward=1):
    """When steps of these lengths run, if messages take no time: [(stage, kind, m, start, end)]."""
    N, cost = len(lists), {"F": forward, "B": backward}
    queues = [deque(steps) for steps in lists]
    free = [0] * N                # when each stage has ended what it computes
    ends, rows = {None: 0}, []    # when each step ends; the batch is there from the start
    while any(queues):
        ready = [s for s in range(N) if queues[s] and input_of(*queues[s][0], s, N) in ends]
        if not ready:
            raise InputError("the schedule can't run: stages wait for each other at "
                             f"{[queue[0] for queue in queues if queue]}")
        for s in ready:
            kind, m = queues[s].popleft()
            start = max(free[s], ends[input_of(kind, m, s, N)])
            free[s] = ends[kind, m, s] = start + cost[kind]
            rows.append((s, kind, m, start, free[s]))
    return rows


def utilization(rows):
    """The share of the stages' time, from the first start to the last end, in which they compute."""
    stages = 1 + max(s for s, *_ in rows)
    span = max(end for *_, end in rows) - min(start for *_, start, _ in rows)
    return sum(end - start for *_, start, end in rows) / stages / span


def most_held(steps):
    """The most microbatches that a stage holds activations of: through forward, not yet through backward."""
    return max(accumulate(1 if kind == "F" else -1 for kind, _ in steps))


def clock_table(lists):
    """The simulation with steps of one clock, as text."""
    rows = simulate(lists)
    clocks, width = max(end for *_, end in rows), 1 + max(len(f"{kind}{m}") for _, kind, m, *_ in rows)
    table = {"clock": list(range(clocks))} | {f"stage {s}": ["."] * clocks for s in range(len(lists))}
    for s, kind, m, start, _ in rows:
        table[f"stage {s}"][start] = f"{kind}{m}"
    names = max(map(len, table))
    lines = [name.ljust(names + 1) + "".join(str(c).ljust(width) for c in row) for name, row in table.items()]
    return "\n".join(line.rstrip() for line in lines)


# ----------------------------------------------------------------------------- where to cut

def costs(model, length):
    """FLOPs a token of each piece: the embedding, each block, the head. GPT-2's head costs as 5 blocks do."""
    attention = 2 * length * model.config.heads * model.config.head_size  # a token sees half of the sequence
    blocks = [2 * matmul_weights(block) + attention for block in model.blocks]
    return [2 * matmul_weights(model.embed), *blocks, 2 * matmul_weights(model.head)]


def balance(costs, count):
    """Cut the pieces into a range for each stage, so that the costliest stage costs least, then the next."""
    refuse(count > len(costs) - 2,
           f"{count} stages are more than the model's {len(costs) - 2} blocks: choose fewer")
    total = [0, *accumulate(costs)]

    @cache
    def best(end, stages):
        """(costs of the stages, the largest first; where they begin) for the first `end` pieces."""
        if stages == 1:
            return (total[end],), (0,)
        options = []
        for start in range(stages - 1, end):
            loads, cuts = best(start, stages - 1)
            loads = sorted((*loads, total[end] - total[start]), reverse=True)
            options.append((tuple(loads), (*cuts, start)))
        return min(options)

    cuts = (*best(len(costs), count)[1], len(costs))
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


def cut(model, pieces):
    """Move all parameters but those of `pieces` to the meta device: names and shapes without memory."""
    ends = [nn.ModuleList(pair) for pair in ((model.embed, model.positions), (model.norm, model.head))]
    modules = [ends[0], *model.blocks, ends[1]]
    own = {p for i in pieces for p in modules[i].parameters()}  # a tied matrix stays in both
    empty = {p: nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in own:
                setattr(module, name, empty[p])


# ----------------------------------------------------------------------------- processes and messages

class Grid:
    """Process = stage * replicas + replica. So neighbours, as a rule on one machine, are replicas of a stage:
    they exchange its gradients, which are more than the activations that go from stage to stage."""

    def __init__(self, stages):
        world = dist.get_world_size() if dist.is_initialized() else 1
        refuse(world % stages, f"{world} processes can't form {stages} stages: torchrun --nproc_per_node "
               f"{stages} train.py ..., or a multiple")
        self.stages, self.replicas = stages, world // stages
        self.stage, self.replica = divmod(dist.get_rank() if world > 1 else 0, self.replicas)
        self.first, self.last = self.stage == 0, self.stage == stages - 1
        if world > 1:  # every process takes part in making every group, and gets its own
            pipes = [[s * self.replicas + r for s in range(stages)] for r in range(self.replicas)]
            ends = [[pipe[0], pipe[-1]] for pipe in pipes] if stages > 1 else pipes
            group_of = partial(dist.new_subgroups_by_enumeration, timeout=TIMEOUT)
            self.pipe, self.ends = group_of(pipes)[0], group_of(ends)[0]
            self.data = group_of([list(row) for row in zip(*pipes)])[0]
            # NCCL keeps the order of messages within a group, and activations must not wait for gradients
            self.wires = {"F": group_of(pipes)[0], "B": group_of(pipes)[0]}


class Wires:
    """The messages of one stage: activations from stage - 1 and to stage + 1 ("F"), gradients back ("B").

    Why no stage waits forever: a send returns at once (unless N earlier ones are still under way), and
    messages on a wire have the order of the steps on both of its ends. So a step waits only for the step that
    sends its input, which `simulate` runs through. Each receive is posted a step ahead: data travels while
    the stage computes. Shapes and dtypes are known, so nothing else has to travel.
    """

    def __init__(self, grid, device):
        self.grid, self.device = grid, device
        up, down = grid.stage + 1, grid.stage - 1
        self.sources = {"F": None if grid.first else down, "B": None if grid.last else up}
        self.targets = {"F": None if grid.last else up, "B": None if grid.first else down}
        self.sent = {"F": deque(), "B": deque()}

    def begin(self, steps, shape, dtype):
        """Post the first receive on each wire."""
        self.shape, self.dtype, self.posted = shape, dtype, {}
        self.awaited = {wire: deque(m for kind, m in steps if kind == wire) for wire in "FB"}
        for wire in "FB":
            self.post(wire)

    def post(self, wire):
        if self.sources[wire] is not None and self.awaited[wire]:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            work = dist.irecv(buffer, group=self.grid.wires[wire], group_src=self.sources[wire])
            self.posted[wire] = self.awaited[wire].popleft(), work, buffer

    def receive(self, wire, m):
        """The activation or gradient of microbatch m; None where none comes. Posts the next receive."""
        if self.sources[wire] is None:
            return None
        posted, work, buffer = self.posted.pop(wire)
        if posted != m:
            raise InputError(f"stage {self.grid.stage} expects {wire}{m} while {wire}{posted} is on its way: "
                             "the schedules of two stages differ")
        work.wait()
        self.post(wire)
        return buffer

    def send(self, wire, tensor):
        """Start sending. The tensor is kept until it has left; beyond N sends the oldest is waited for."""
        if self.targets[wire] is None:
            return
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, group=self.grid.wires[wire], group_dst=self.targets[wire])
        self.sent[wire].append((work, tensor))
        if len(self.sent[wire]) > self.grid.stages:
            self.sent[wire].popleft()[0].wait()

    def finish(self):
        for sent in self.sent.values():
            while sent:
                sent.popleft()[0].wait()


def execute(steps, forward, wires):
    """Run one stage's steps. forward(m, x) -> y, in the last stage the scaled loss; x is None in the first.

    Returns the most microbatches whose activations were held at once.
    """
    held, most = {}, 0
    for kind, m in steps:
        arrived = wires.receive(kind, m)
        if kind == "F":
            x = arrived if arrived is None else arrived.requires_grad_()
            y = forward(m, x)
            held[m] = x, y
            most = max(most, len(held))
            wires.send("F", y)
        else:
            x, y = held.pop(m)
            torch.autograd.backward(y, arrived)  # the last stage's y is the loss, and nothing arrives
            wires.send("B", None if x is None else x.grad)
    wires.finish()
    return most


# ----------------------------------------------------------------------------- a model's stage

class Pipeline(Single):
    """The stage of a model that this process computes, with the interface of common/processes.py.

    It cuts the model in place. microbatches: of this replica's part of a step, over all its batches; length:
    of a sequence in tokens, to balance the stages; device: a common.device.Device.
    """

    def __init__(self, model, stages, kind, microbatches, length, device):
        self.grid = grid = Grid(stages)
        self.model, self.kind, self.microbatches, self.device = model, kind, microbatches, device
        self.replica, self.replicas = grid.replica, grid.replicas
        self.pieces = balance(costs(model, length), stages)[grid.stage]
        self.steps = schedule(kind, stages, microbatches)[grid.stage]
        with torch.no_grad(), device.autocast():  # activations have the dtype that the embedding gives them
            tokens = torch.zeros(1, 1, dtype=torch.long, device=device.torch_device)
            self.dtype = model.begin(tokens)[0].dtype
        dense = isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
        self.tied = stages > 1 and dense and model.head.weight is model.embed.weight
        cut(model, self.pieces)
        self.wires, self.most_held = Wires(grid, device.torch_device), 0

    def __str__(self):
        N, M = self.grid.stages, self.microbatches
        return (f"pipeline {self.kind}: {N} stages x {self.replicas} replicas, {M} microbatches, "
                f"utilization at most {M / (N + M - 1):.3f}")

    def run_blocks(self, tokens, x, seed=()):
        """This stage's blocks: tokens (b, T) or activations x (b, T, C) to activations.

        seed: of a microbatch. Each piece draws its own dropout from it, whichever process computes it.
        """
        if self.grid.first:
            seed_random(*seed, 0)
            x, rope, masks = self.model.begin(tokens)
        else:
            _, rope, masks = self.model.layout(tokens)
        for i, block in enumerate(self.model.blocks, 1):
            if i in self.pieces:
                seed_random(*seed, i)
                x = block(x, rope, None, masks)
        return x

    def backward(self, batches, seed):
        """Gradients of the mean loss over the batches of all replicas. batches: those of this one, pairs of
        tokens x and targets y (B, T). Returns their mean loss in the last stage, 0 elsewhere."""
        M, losses = self.microbatches, []
        inputs, targets = (torch.cat(parts) for parts in zip(*batches))
        tokens, targets = inputs.chunk(M), targets.chunk(M)

        def forward(m, h):
            with self.device.autocast():
                h = self.run_blocks(tokens[m], h, (*seed, self.replica * M + m))
                if not self.grid.last:
                    return h
                losses.append(head_loss(self.model.head, self.model.norm(h), targets[m]))
            return losses[-1] / (M * self.replicas)  # of the mean over the whole batch

        self.wires.begin(self.steps, (*tokens[0].shape, self.model.config.width), self.dtype)
        self.most_held = execute(self.steps, forward, self.wires)
        self.sum_gradients()
        return torch.stack(losses).detach().mean() if losses else inputs.new_zeros((), dtype=torch.float32)

    def sum_gradients(self):
        """Over the two copies of a tied matrix, then over the replicas."""
        if self.tied and (self.grid.first or self.grid.last):
            dist.all_reduce(self.model.embed.weight.grad, group=self.grid.ends)
        if self.replicas > 1:
            gradients = [p.grad for p in self.own_parameters() if p.grad is not None]
            for work in [dist.all_reduce(g, group=self.grid.data, async_op=True) for g in gradients]:
                work.wait()

    @torch.no_grad()
    def loss(self, x, y):
        """Of one batch, in the last stage; None elsewhere, at once, so that the next batch can follow."""
        self.wires.begin([("F", 0)], (*x.shape, self.model.config.width), self.dtype)
        with self.device.autocast():
            h = self.run_blocks(x, self.wires.receive("F", 0))
            if self.grid.last:
                return head_loss(self.model.head, self.model.norm(h), y)
        self.wires.send("F", h)

    @torch.no_grad()
    def clip(self, largest):
        """Scale all gradients so that their norm over all stages is at most `largest`; returns the norm."""
        second = self.model.embed.weight if self.tied and self.grid.last else None  # the first counts it
        gradients = [p.grad for p in self.own_parameters() if p.grad is not None and p is not second]
        square = nn.utils.get_total_norm(gradients).to(self.device.torch_device) ** 2
        if self.grid.stages > 1:
            dist.all_reduce(square, group=self.grid.pipe)
        nn.utils.clip_grads_with_norm_(self.own_parameters(), largest, square.sqrt())
        return square.sqrt()

    def gather(self, tensors):
        """The tensors (name -> tensor) of all stages in process 0, on the CPU; {} elsewhere."""
        own = {name: t.detach().cpu() for name, t in tensors.items() if not t.is_meta}
        if self.grid.stages == 1 or self.replica:
            return {} if self.replica else own
        stages = [{}] * self.grid.stages
        dist.gather_object(own, stages if self.grid.first else None, group=self.grid.pipe, group_dst=0)
        return dict(ChainMap(*stages))  # a tied matrix comes twice


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--stages", type=at_least_1, default=4, help="stages N")
    parser.add_argument("--microbatches", type=at_least_1, default=8, help="microbatches M; 1 is Fig. 3(a)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="gpipe", help="the order of the steps")
    args = parser.parse_args(argv)
    N, M, lists = args.stages, args.microbatches, schedule(args.schedule, args.stages, args.microbatches)
    rows = simulate(lists)
    print(clock_table(lists))
    print(f"microbatches held by each stage: {[most_held(steps) for steps in lists]}")
    print(f"utilization {utilization(rows):.3f} = M / (N + M - 1) = {M}/{N + M - 1} = {M / (N + M - 1):.3f}")
    return 0


if __name__ == "__main__":
    command(main)
