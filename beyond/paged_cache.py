"""A paged cache of keys and values (section V.C's cache; the paper's [34], PagedAttention) in Python.

A contiguous cache (model.KVCache) sets aside room for the longest text that every sequence may become. Here
the memory is a pool of small blocks, each for `size` tokens, as the pages of an operating system. A sequence
has a table of its blocks, and takes one when the last is full: at most size - 1 slots of it are unused.

    sequence a   "Profit rose by 3 %"            table [0, 2, 3]
    sequence b   "The capital of France is"      table [1, 4, 5]
    pool         | 0 Profit rose | 1 The capital | 2 by 3 | 3 % | 4 of France | 5 is | ...   (two words each)

Attention for one new token of each sequence never gathers a sequence's keys into one piece. Every block
answers the query of its sequence, all blocks in one batched product, and the parts are joined as a softmax
over pieces allows: for block j with scores s_j,

    m = max_j max(s_j),   z = sum_j sum exp(s_j - m),   y = sum_j exp(s_j - m) V_j / z

so that the pool is read where it lies and no sequence is padded to the longest.

    pool = Pool(model.config, blocks=512)
    cache = PagedCache([Sequence(pool) for _ in prompts])   # for model.hidden and generate
    list(generate(model, prompts, 100, cache=cache))
"""
import heapq
import math

import torch

from common.cli import refuse
from common.generate import padded
from model import KVCache, attend, visible

SIZE = 16  # tokens of a block: 64 waste four times as much at a sequence's end, 4 make long tables

def bytes_per_token(config, dtype=torch.float32):
    """Of a token's keys and values in all layers."""
    return 2 * config.blocks * config.kv_heads * config.head_size * dtype.itemsize

class Pool:
    """The memory: kv (layers, 2, blocks, kv_heads, size, d). The lowest free block is taken first, so that
    memory that is never needed is never touched, and the blocks in use lie close together."""

    def __init__(self, config, blocks, size=SIZE, device="cpu", dtype=torch.float32):
        refuse(blocks < 1, f"a pool needs at least 1 block of {size} tokens, got {blocks}: raise it")
        self.blocks, self.size, self.device = blocks, size, torch.device(device)
        shape = config.blocks, 2, blocks, config.kv_heads, size, config.head_size
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.free = list(range(blocks))  # a heap

    def blocks_for(self, tokens):
        return -(-tokens // self.size)

    def take(self):
        refuse(not self.free, f"all {self.blocks} blocks of {self.size} tokens of the cache are in use: "
               "give the pool more, or run fewer sequences at once")
        block = heapq.heappop(self.free)
        self.kv[:, :, block] = 0  # a slot not yet written gets weight 0, but 0 times a leftover NaN is NaN
        return block

class Sequence:
    """One text's part of the pool: its tokens i * size and following are in the pool's block table[i]."""

    def __init__(self, pool):
        self.pool, self.table, self.length = pool, [], 0

    def needs(self, T):
        """Blocks to take before T more tokens can be written."""
        return max(0, self.pool.blocks_for(self.length + T) - len(self.table))

    def cut(self, length=0):
        """Forget what comes after the first `length` tokens, and give the blocks back."""
        keep = self.pool.blocks_for(length)
        for block in self.table[keep:]:
            heapq.heappush(self.pool.free, block)
        self.table, self.length = self.table[:keep], length

class PagedCache(KVCache):
    """Some sequences of a pool as the cache of one batch: row i is sequences[i]."""

    def __init__(self, sequences):
        self.sequences, self.pool, self.device = sequences, sequences[0].pool, sequences[0].pool.device

    @property
    def lengths(self):
        return [s.length for s in self.sequences]

    @lengths.setter
    def lengths(self, lengths):
        for sequence, length in zip(self.sequences, lengths):
            sequence.cut(length)

    def advance(self, T):
        for sequence in self.sequences:
            sequence.length += T

    def positions(self, T):
        """Also reserves blocks for the next T tokens: a model asks for positions first, once a step."""
        for sequence in self.sequences:
            sequence.table += [self.pool.take() for _ in range(sequence.needs(T))]
        self.table = padded([s.table for s in self.sequences], 0, self.device)  # (B, blocks), then any block
        positions = super().positions(T)
        slots = positions.expand(len(self.sequences), T)
        self.block = self.table.gather(1, slots // self.pool.size)  # (B, T)
        self.offset = slots % self.pool.size                        # (B, T)
        return positions

    def mask(self, T, window=0):
        """For one token what `attend` below adds to scores: -inf at slots of a block that its row does not
        see, (E, 1, 1, size) for the E blocks that are read (used): with the row that each belongs to (owner),
        and the slot of the row's next token, counted from the block's first (last)."""
        if T > 1:
            return super().mask(T, window)
        size, parts = self.pool.size, {}  # block -> (row, last)
        for row, s in enumerate(self.sequences):
            parts |= {block: (row, s.length - i * size) for i, block in enumerate(s.table)}
        high = max(parts) + 1
        if high <= 1.25 * len(parts):  # read the pool as it lies, without a copy, a few blocks of others too
            self.used, parts = slice(high), {block: parts.get(block, (0, -1)) for block in range(high)}
        else:
            self.used = torch.tensor(list(parts), device=self.device)
        self.owner, last = torch.tensor(list(parts.values()), device=self.device).T
        seen = visible(last[:, None], torch.arange(size, device=self.device), window)
        return torch.where(seen, 0.0, -math.inf)

    def update(self, layer, k, v):
        """Store k, v (B, kv_heads, T, d). Returns what `attend` reads: for one token the blocks in use,
        (E, kv_heads, size, d), else all keys and values in order, (B, kv_heads, S, d)."""
        T = k.shape[2]
        store = self.pool.kv[layer]  # (2, blocks, kv_heads, size, d)
        store[0][self.block, :, self.offset] = k.transpose(1, 2)
        store[1][self.block, :, self.offset] = v.transpose(1, 2)
        if T == 1:
            return store[0][self.used], store[1][self.used]
        if self.end == 0:
            return k, v
        by_head = store.transpose(1, 2)  # (2, kv_heads, blocks, size, d)
        rows = by_head.index_select(2, self.table.flatten()).unflatten(2, self.table.shape)
        return rows.flatten(3, 4)[:, :, :, :self.end + T].transpose(1, 2)  # (2, B, kv_heads, S, d)

    def attend(self, q, k, v, mask=None, dropout=0.0):
        """Equation 1 for one query of each row. q (B, h, 1, d); k, v, mask: of `update` and of `mask`."""
        if q.shape[2] > 1:
            return attend(q, k, v, mask)
        B, h, _, d = q.shape
        q = (q * d ** -0.5).reshape(B, k.shape[1], -1, d)  # (B, kv_heads, g, d): g queries a key head
        owner, s = self.owner, (q[self.owner] @ k.transpose(2, 3)).float().add_(mask)
        part = s.amax(-1)  # of s (E, kv_heads, g, size)
        top = part.new_full(q.shape[:3], -math.inf)
        top.scatter_reduce_(0, owner[:, None, None].expand_as(part), part, "amax")
        p = s.sub_(top[owner][..., None]).exp_()
        total = torch.zeros_like(top).index_add_(0, owner, p.sum(-1))
        y = torch.zeros_like(q, dtype=torch.float32).index_add_(0, owner, (p.to(v.dtype) @ v).float())
        return (y / total[..., None]).to(q.dtype).reshape(B, h, 1, d)
