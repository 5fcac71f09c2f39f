"""Generating text: read the prompts, then draw one token of each row after the other (section V.C).

With the cache a step reads one token; without it, the whole text again (section III.C.2): for 100 tokens
after a prompt of 100 it reads 14,950 in place of 199.

    for step in generate(model, [prompt, another], 100, temperature=0.8, stop=tokenizer.stop_ids):
        ...   # a token of each row, or None where a row has ended
"""
import torch

from common.cli import refuse
from model import KVCache

def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """logits (B, V) -> tokens (B,). Temperature 0 is greedy. top_p: of the likeliest tokens, which have this
    probability together; 1 leaves all in."""
    if temperature < 1e-6:
        return logits.max(-1).indices  # in bfloat16 five times as fast as argmax on a CPU
    p = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return torch.multinomial(p, 1, generator=generator)[:, 0]
    likeliest, order = p.topk(min(1024, p.shape[-1]))  # sorting all takes several times as long
    if (likeliest.sum(-1) < top_p).any():
        likeliest, order = p.sort(descending=True)
    p = likeliest.masked_fill(likeliest.cumsum(-1) - likeliest >= top_p, 0)  # the likeliest always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]

def check_prompt(prompt, config):
    """Refuse token ids that the model can't read."""
    refuse(not 1 <= len(prompt) <= config.context,
           f"a prompt has {len(prompt)} tokens: the model reads 1 to {config.context}")
    for token in (min(prompt), max(prompt)):
        refuse(not 0 <= token < config.vocab_size, f"token {token} is outside the vocabulary "
               f"0..{config.vocab_size - 1}: is this the model's tokenizer?")

def padded(lists, fill, device):
    """Lists of any lengths as the rows of one tensor, filled up at the right."""
    width = max(map(len, lists))
    return torch.tensor([row + [fill] * (width - len(row)) for row in lists], device=device)

def read_prompts(model, rows, cache, device):
    """Logits (B, V) after the last token of each row. What the cache holds are prefixes, not read again."""
    unread = [row[n:] for row, n in zip(rows, cache.lengths)] if cache else rows
    h = model.hidden(padded(unread, 0, device)[:, :model.config.context], cache)  # (B, T, C)
    if cache:
        cache.lengths = [len(row) for row in rows]
    last = [min(len(row), h.shape[1]) - 1 for row in unread]
    return model.head(h[torch.arange(len(rows)), last])

def plain_step(model, cache):
    """A step of decoding, layer by layer: step(tokens (B,), cache) -> logits (B, V) of what follows. It puts
    the tokens in the cache. beyond/decoding.py has faster ones."""
    return lambda tokens, cache: model.head(model.hidden(tokens[:, None], cache))[:, -1]

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, stop=(), generator=None,
             use_cache=True, vocabulary=None, cache=None, make_step=plain_step):
    """Continue prompts (lists of token ids, of any lengths); yields the new tokens, None where a row ended.

    A row ends at a token of `stop`, which is still yielded, or where the context is full.
    vocabulary: draw from so many tokens only, where the tokenizer knows fewer than the model has.
    cache: in place of a new one; it may hold prefixes of the prompts.
    make_step: plain_step or beyond.decoding's, called when the cache has read the prompts."""
    for prompt in prompts:
        check_prompt(prompt, model.config)
    rows, device = [list(p) for p in prompts], next(model.parameters()).device
    if use_cache and cache is None:
        length = min(model.config.context, max(map(len, prompts)) + max_new_tokens)
        cache = KVCache(model.config, len(rows), length, device)
    alive, new, step = [True] * len(rows), None, None
    for _ in range(max_new_tokens):
        alive = [a and len(row) <= model.config.context for a, row in zip(alive, rows)]
        if not any(alive):
            return
        if new is None or cache is None:
            logits = read_prompts(model, rows, cache, device)
        else:  # a row that ended writes to slot 0, which nobody reads
            cache.lengths = [n if a else 0 for n, a in zip(cache.lengths, alive)]
            step = step or make_step(model, cache)
            logits = step(new, cache)
        new = sample(logits[:, :vocabulary], temperature, top_p, generator)  # (B,)
        tokens = [token if a else None for token, a in zip(new.tolist(), alive)]
        rows = [row if token is None else [*row, token] for row, token in zip(rows, tokens)]
        alive = [a and token not in stop for a, token in zip(alive, tokens)]
        yield tokens
