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
s holds at most N - s microbatches. beyond/zero_bubble.py has two schedules with a smaller bubble.

    python pipeline.py --stages 4 --microbatches 8 --schedule gpipe    the clock table
    torchrun --nproc_per_node 4 train.py --rank 192 --pipeline 4 --microbatches 8 --schedule 1f1b
    torchrun --nproc_per_node 4 train.py --pipeline 2                  2 stages x 2 replicas
    python bench.py pipeline                                           utilization, measured
"""
from collections import ChainMap, Counter, defaultdict, deque
from contextlib import nullcontext
from datetime import timedelta
from functools import cache, partial
from itertools import accumulate, chain

import torch
import torch.distributed as dist
import torch.nn as nn

from common.cli import Parser, at_least_1, command, refuse
from common.loss import head_loss
from common.processes import Single, seed_random
from model import matmul_weights

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v")
TIMEOUT = timedelta(minutes=10)  # the longest that a process may wait: compiling and evaluating take minutes

# ----------------------------------------------------------------------------- the schedule, as data

def schedule(kind, processes, microbatches):
    """For each of N processes the list of its steps (kind, m, stage), in order. Kinds: F, B, and W where B
    is the gradient of x alone. Process s has stage s, in zb-v also stage 2N - 1 - s."""
    refuse(kind not in SCHEDULES, f"--schedule must be one of {', '.join(SCHEDULES)}, got {kind}")
    if kind == "zb-v":
        from beyond.zero_bubble import v_shaped
        return v_shaped(processes, microbatches)
    lists = []
    for s in range(processes):
        forward, backward, weights = ([(letter, m, s) for m in range(microbatches)] for letter in "FBW")
        ahead = min(processes - 1 - s, microbatches)  # forward passes before the first gradient can be there
        steps = forward[:ahead]
        for m in range(microbatches):
            steps += forward[ahead + m:ahead + m + 1] + backward[m:m + 1]
            if kind == "zb-h1" and m >= s:
                steps.append(weights[m - s])
        if kind == "zb-h1":
            steps += weights[max(microbatches - s, 0):]
        lists.append(forward + backward[::-1] if kind == "gpipe" else steps)
    return lists

def process_of(stage, processes):
    return min(stage, 2 * processes - 1 - stage)

def count_stages(lists):
    return 1 + max(stage for steps in lists for *_, stage in steps)

def input_of(kind, m, stage, stages):
    """The step that must end before the step (kind, m, stage) can begin; None: the batch is its input."""
    if kind == "W":
        return "B", m, stage
    source = stage - 1 if kind == "F" else stage + 1
    if 0 <= source < stages:
        return kind, m, source
    return None if kind == "F" else ("F", m, stage)

def simulate(lists, forward=1, backward=1, weights=1):
    """When steps of these lengths run, if messages take no time: [(process, kind, m, stage, start, end)]."""
    stages, cost = count_stages(lists), {"F": forward, "B": backward, "W": weights}
    queues = [deque(steps) for steps in lists]
    free = [0] * len(lists)       # when each process has ended what it computes
    ends, rows = {None: 0}, []    # when each step ends; the batch is there from the start
    while any(queues):
        ready = [p for p, queue in enumerate(queues) if queue and input_of(*queue[0], stages) in ends]
        refuse(not ready, "the schedule can't run: stages wait for each other at "
               f"{[queue[0] for queue in queues if queue]}")
        for p in ready:
            step = queues[p].popleft()
            start = max(free[p], ends[input_of(*step, stages)])
            free[p] = ends[step] = start + cost[step[0]]
            rows.append((p, *step, start, free[p]))
    return rows

def utilization(rows):
    """The share of the processes' time, from the first start to the last end, in which they compute."""
    processes = 1 + max(p for p, *_ in rows)
    span = max(end for *_, end in rows) - min(start for *_, start, _ in rows)
    return sum(end - start for *_, start, end in rows) / processes / span

def most_held(steps):
    """The most microbatches that a process holds activations of: through F, not yet through B, or W."""
    last = "W" if any(kind == "W" for kind, *_ in steps) else "B"
    return max(accumulate((kind == "F") - (kind == last) for kind, *_ in steps))

def clock_table(lists):
    """The simulation with steps of one clock, as text; a process's second stage in small letters."""
    rows, word = simulate(lists), "stage" if count_stages(lists) == len(lists) else "process"
    clocks, width = max(end for *_, end in rows), 1 + max(len(f"{kind}{m}") for _, kind, m, *_ in rows)
    table = {"clock": list(range(clocks))} | {f"{word} {p}": ["."] * clocks for p in range(len(lists))}
    for p, kind, m, stage, start, _ in rows:
        table[f"{word} {p}"][start] = f"{kind if stage < len(lists) else kind.lower()}{m}"
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
            # NCCL keeps the order of messages within a group: activations must not wait for gradients, nor
            # what goes to the first N stages for what goes to the others
            self.wires = {(kind, turned): group_of(pipes)[0] for kind in "FB" for turned in (False, True)}

class Wires:
    """The messages of one process: activations from stage s - 1 and to stage s + 1 (F), gradients back (B).

    Why no process waits forever: a send returns at once (unless N earlier ones are still under way), and
    messages on a wire have the order of the steps on both of its ends. So a step waits only for the step that
    sends its input, which `simulate` runs through. Each receive is posted a step ahead: data travels while
    the process computes. Shapes and dtypes are known, so nothing else has to travel."""

    def __init__(self, grid, device, stages):
        self.grid, self.device, self.stages = grid, device, stages
        self.sent, self.own = defaultdict(deque), {}  # own: what goes to this process's other stage

    def begin(self, steps, shape, dtype):
        """Post the first receive on each wire (kind, stage)."""
        self.shape, self.dtype, self.posted, self.awaited = shape, dtype, {}, Counter()
        for kind, m, stage in steps:
            before = input_of(kind, m, stage, self.stages)
            if before and before[0] == kind and process_of(before[2], self.grid.stages) != self.grid.stage:
                self.awaited[kind, stage] += 1
        for wire in self.awaited:
            self.post(*wire)

    def wire(self, kind, stage):
        return self.grid.wires[kind, stage >= self.grid.stages]

    def post(self, kind, stage):
        if self.awaited[kind, stage]:
            self.awaited[kind, stage] -= 1
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            source = process_of(stage - 1 if kind == "F" else stage + 1, self.grid.stages)
            work = dist.irecv(buffer, group=self.wire(kind, stage), group_src=source)
            self.posted[kind, stage] = work, buffer

    def receive(self, kind, m, stage):
        """The activation or gradient for a step; None where none comes. Posts the next receive."""
        if (kind, stage) not in self.posted:
            return self.own.pop((kind, m, stage), None)
        work, buffer = self.posted.pop((kind, stage))
        work.wait()
        self.post(kind, stage)
        return buffer

    def send(self, kind, m, stage, tensor):
        """Start sending. The tensor is kept until it has left; beyond N sends the oldest is waited for."""
        after = stage + 1 if kind == "F" else stage - 1
        if not 0 <= after < self.stages:
            return
        tensor, target = tensor.detach().contiguous(), process_of(after, self.grid.stages)
        if target == self.grid.stage:
            self.own[kind, m, after] = tensor
            return
        sent = self.sent[kind, stage]
        sent.append((dist.isend(tensor, group=self.wire(kind, after), group_dst=target), tensor))
        if len(sent) > self.grid.stages:
            sent.popleft()[0].wait()

    def finish(self):
        for work, _ in chain(*self.sent.values()):
            work.wait()
        self.sent.clear()

def execute(steps, forward, wires):
    """Run one process's steps.

    forward(m, stage, x, part) -> y, in the last stage the scaled loss; x is None in the first. part: a
    context for the blocks; where there are steps W, their weights get no gradient before W."""
    part, held = nullcontext, {}
    if any(kind == "W" for kind, *_ in steps):
        from beyond.zero_bubble import WeightsLater as part
    for kind, m, stage in steps:
        arrived = wires.receive(kind, m, stage)
        if kind == "F":
            x, later = arrived if arrived is None else arrived.requires_grad_(), part()
            y = forward(m, stage, x, later)
            held[m, stage] = x, y, later
            wires.send(kind, m, stage, y)
        elif kind == "B":
            x, y, later = held.pop((m, stage))
            torch.autograd.backward(y, arrived)  # the last stage's y is the loss, and nothing arrives
            wires.send(kind, m, stage, None if x is None else x.grad)
            if part is not nullcontext:
                held[m, stage] = later
        else:
            held.pop((m, stage)).run()
    wires.finish()

class Pipeline(Single):
    """The stage of a model that this process computes, with the interface of common/processes.py.

    It cuts the model in place. microbatches: of this replica's part of a step, over all its batches; length:
    of a sequence in tokens, to balance the stages; device: a common.device.Device."""

    def __init__(self, model, stages, kind, microbatches, length, device):
        self.lists, blocks = schedule(kind, stages, microbatches), len(model.blocks)
        self.stages = count_stages(self.lists)
        refuse(self.stages > blocks, f"{kind} of {stages} processes has {self.stages} stages, more than the "
               f"model's {blocks} blocks: choose fewer")
        self.grid = grid = Grid(stages)
        self.model, self.kind, self.microbatches, self.device = model, kind, microbatches, device
        self.replica, self.replicas, self.steps = grid.replica, grid.replicas, self.lists[grid.stage]
        divide = balance
        if self.stages > stages:
            from beyond.zero_bubble import pieces_of_v as divide
        pieces = enumerate(divide(costs(model, length), stages))
        self.pieces = {s: own for s, own in pieces if process_of(s, stages) == grid.stage}
        dense = isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
        self.tied = self.stages == stages > 1 and dense and model.head.weight is model.embed.weight
        cut(model, chain(*self.pieces.values()))
        self.wires = Wires(grid, device.torch_device, self.stages)

    def __str__(self):
        return (f"pipeline {self.kind}: {self.stages} stages x {self.replicas} replicas, {self.microbatches} "
                f"microbatches, utilization at most {utilization(simulate(self.lists)):.3f}")

    def run_blocks(self, stage, tokens, x, seed=()):
        """A stage's blocks: tokens (b, T) or activations x (b, T, C) to activations.

        seed: of a microbatch. Each piece draws its own dropout from it, whichever process computes it."""
        if stage == 0:
            seed_random(*seed, 0)
            x, rope, mask = self.model.begin(tokens)
        else:
            _, rope, mask = self.model.layout(tokens)
        for i, block in enumerate(self.model.blocks, 1):
            if i in self.pieces[stage]:
                seed_random(*seed, i)
                x = block(x, rope, None, mask)
        return x

    def compute(self, steps, tokens, targets, seed=()):
        """Execute the steps over microbatches (b, T). Returns their losses, in the last stage."""
        losses = []

        def forward(m, stage, h, part):
            with self.device.autocast():
                with part:
                    h = self.run_blocks(stage, tokens[m], h, (*seed, self.replica * len(tokens) + m))
                if stage < self.stages - 1:
                    return h
                losses.append(head_loss(self.model.head, self.model.norm(h), targets[m]))
            return losses[-1] / (len(tokens) * self.replicas)  # of the mean over the whole batch

        dtype = self.model.norm.weight.dtype  # as model.begin casts, and no block changes it
        self.wires.begin(steps, (*tokens[0].shape, self.model.config.width), dtype)
        execute(steps, forward, self.wires)
        return losses

    def backward(self, batches, seed):
        """Gradients of the mean loss over the batches of all replicas. batches: those of this one, pairs of
        tokens x and targets y (B, T). Returns their mean loss in the last stage, 0 elsewhere."""
        inputs, targets = (torch.cat(parts) for parts in zip(*batches))
        M = self.microbatches
        losses = self.compute(self.steps, inputs.chunk(M), targets.chunk(M), seed)
        if self.tied and (self.grid.first or self.grid.last):  # the two copies of the matrix
            dist.all_reduce(self.model.embed.weight.grad, group=self.grid.ends)
        if self.replicas > 1:
            gradients = [p.grad for p in self.own_parameters() if p.grad is not None]
            for work in [dist.all_reduce(g, group=self.grid.data, async_op=True) for g in gradients]:
                work.wait()
        return torch.stack(losses).detach().mean() if losses else inputs.new_zeros((), dtype=torch.float32)

    @torch.no_grad()
    def loss(self, x, y):
        """Of one batch, in the last stage; None elsewhere, so that the next batch can follow."""
        losses = self.compute([("F", 0, stage) for stage in self.pieces], [x], [y])
        return losses[0] if losses else None

    @torch.no_grad()
    def clip(self, largest):
        """Scale all gradients so that their norm over all stages is at most `largest`."""
        second = self.model.embed.weight if self.tied and self.grid.last else None  # the first counts it
        gradients = [p.grad for p in self.own_parameters() if p.grad is not None and p is not second]
        square = nn.utils.get_total_norm(gradients).to(self.device.torch_device) ** 2
        if self.grid.stages > 1:
            dist.all_reduce(square, group=self.grid.pipe)
        nn.utils.clip_grads_with_norm_(self.own_parameters(), largest, square.sqrt())

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
    print(f"microbatches held by each process: {[most_held(steps) for steps in lists]}")
    print(f"utilization {utilization(rows):.3f}; of gpipe and 1f1b M / (N + M - 1) = {M / (N + M - 1):.3f}")
    return 0

if __name__ == "__main__":
    command(main)
