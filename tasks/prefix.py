"""A prefix that many rows share is read once (finetuning and scoring, section VI).

All prompts of a task begin with the same instruction, a third of their tokens. Keys and values of a token
depend only on the tokens before it, so one row computes those of the common prefix, and every row of a batch
attends to them and to its own (equation 1 with K = [K_prefix; K_row]):

    prefix   Instruction: What is the sentiment ... Input:          (1, P), read once
    rows     Profit rose by 3 % . Answer: positive                  (B, T), padded at the right
             The offer was withdrawn . Answer: negative

Gradients flow back through K_prefix and V_prefix, where autograd adds up those of all rows: what finetuning
learns is what it learns from whole rows. The cost is one copy of K and V for each row of the batch.

    prefix = PrefixCache(model, tokens[:1, :P])
    h = prefix.read(tokens[:, P:])              # (B, T, C), as of model.hidden(tokens)[:, P:]
"""
import os

import torch

from model import Cache, visible


def common_length(lists):
    """How many first elements all lists share."""
    return len(os.path.commonprefix(lists))  # works on any sequences


class PrefixCache(Cache):
    """Keys and values of a prefix, tokens (1, P), P may be 0. What a batch reads after it is not stored here,
    so batches may follow each other; only `read` may use this cache."""

    def __init__(self, model, prefix):
        self.model, self.length, self.device, self.end = model, prefix.shape[1], prefix.device, 0
        self.layers = []  # keys and values of each layer: two of (1, kv_heads, P, d)
        self.given_positions = self.given_mask = self.store = None
        if self.length:
            model.hidden(prefix, self)

    def read(self, tokens, positions=None, mask=None, store=None):
        """tokens (B, T), the rows after their prefix -> what the head reads, (B, T, C).

        positions (B, T) and mask (B, 1, T, P + T) are for rows that are not plain text (the branches of
        score.py). store: an empty KVCache that is to get the keys and values of the prefix and of the rows.
        """
        if self.length == 0 and mask is None and store is None:
            return self.model.hidden(tokens)
        self.given_positions, self.given_mask, self.store = positions, mask, store
        self.end = self.length
        if positions is not None:  # the model checks end + T against its context: branches share positions
            self.end = int(positions.max()) + 1 - tokens.shape[1]
        return self.model.hidden(tokens, self)

    def positions(self, T):
        if self.given_positions is not None:
            return self.given_positions
        return torch.arange(self.end, self.end + T, device=self.device)

    def mask(self, T, window=0):
        if not window and (self.given_mask is not None or self.end == 0):
            return self.given_mask
        own, before = self.positions(T), torch.arange(self.length if self.layers else 0, device=self.device)
        near = visible(own, torch.cat((before.expand(*own.shape[:-1], -1), own), -1), window)
        return near if self.given_mask is None else self.given_mask & near

    def update(self, layer, k, v):
        if len(self.layers) == layer and self.length:  # the prefix itself is being read
            self.layers.append((k, v))
            return k, v
        if self.length:
            prefix_k, prefix_v = (part.expand(len(k), -1, -1, -1) for part in self.layers[layer])
            k, v = torch.cat((prefix_k, k), dim=2), torch.cat((prefix_v, v), dim=2)  # (B, kv_heads, P + T, d)
        if self.store is not None:
            self.store.update(layer, k, v)
        return k, v

    def advance(self, T):
        pass
