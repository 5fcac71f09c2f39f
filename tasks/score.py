"""How likely a model finds each answer, what it answers by itself, and how many of the answers are right.

    for batch in score_in_batches(model, tokenizer, sets.load("piqa", "data"), find_device()):
        ...     # (example, log p of each choice, written text, tokens cut) of each row

A row of a task is a text and some endings; an ending's log-likelihood is the sum of log p over its tokens.
Reading every (text, ending) pair by itself, as lm-evaluation-harness does, reads the text once an ending.
Keys and values of a token depend only on the tokens before it, so here three readings follow each other, each
behind copies of what the one before left in its cache (equation 1 with K = [K_before; K_own]):

    prefix    Question  :                            what all rows of the task begin with, (1, P)
    trunks    How  do  I  ...  Answer                what all endings of a row share, (B, T)
    tails     :  Use  the  blue  pen                 the rest of each choice, (N, W), from the token that
              :  Use  the  long  old  brush          predicts the ending's first to its last but one

Trunks of similar length make a batch, and so do tails. The head is applied to tails alone. A written answer
goes on from the trunk's keys and values.
"""
import math
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import refuse
from common.generate import generate, padded
from model import KVCache

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # of a batch; more is no faster on a CPU and takes memory
HEAD_ROWS = {"cpu": 128, "cuda": 4096}       # of tails that are read together, and have logits

def encode_pair(tokenizer, context, continuation):
    """Ids of a text and of what follows it, by the harness's rule: both are encoded as one text, and what
    exceeds the context's own ids is the continuation. Spaces at the context's end move to the continuation,
    because vocabularies join them with the word that follows."""
    stripped = context.rstrip()
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    given = begin + tokenizer.encode(stripped)
    return given, (begin + tokenizer.encode(context + continuation))[len(given):]

def shorten(prompt, room):
    """A prompt's ids, at most `room` of them: without its middle, as the instruction stands first and
    "Answer:" last. Finetuning and the tasks that are answered in writing cut here."""
    if len(prompt) <= room:
        return prompt
    return prompt[:room - room // 2] + prompt[len(prompt) - room // 2:]

def read_prefix(model, tokens):
    """tokens (1, P) -> a KVCache that has them; P may be 0."""
    cache = KVCache(model.config, *tokens.shape, tokens.device)
    if cache.capacity:
        model.hidden(tokens, cache)
    return cache

def copies(model, cache, rows, more):
    """A KVCache with copies of these rows of `cache`, through which gradients flow back, and with room for
    `more` tokens."""
    new = KVCache(model.config, len(rows), cache.end + more, cache.device)
    new.lengths = [cache.lengths[row] for row in rows]
    for layer in range(model.config.blocks if cache.end else 0):
        for store, parts in ((new.k, cache.k), (new.v, cache.v)):
            part = parts[layer][:, :, :cache.end]  # (rows of cache, kv_heads, S, d)
            part = part.expand(len(rows), -1, -1, -1) if len(part) == 1 else part[rows]
            store[layer] = F.pad(part, (0, 0, 0, more))
    return new

@dataclass
class Item:
    """An example as tokens."""
    example: object
    texts: list     # of each choice: prompt and ending
    starts: list    # of each choice: where the ending begins
    trunk: list     # what all choices share
    cut: int        # tokens that were left out to fit the context

def make_item(example, tokenizer, context, room=None):
    """An Item. What exceeds the context loses its first tokens, as in the harness; with `room` the prompt is
    shortened to that many tokens, so that it stays the same for all endings."""
    pairs = [encode_pair(tokenizer, *pair) for pair in example.pairs()]
    for (_, ending), choice in zip(pairs, example.choices):
        refuse(not ending, f"{example.task}, row {example.index}: the ending {choice!r} adds no token to its "
               "text: mend the row")
    if not pairs:  # only to be answered in writing: which token comes next is not known
        pairs = [(encode_pair(tokenizer, example.prompt, "")[0], [None])]
    longest, texts, starts, cut = max(len(ending) for _, ending in pairs), [], [], 0
    for given, ending in pairs:
        kept = shorten(given, min(room, context + 1 - longest)) if room else given
        text = (kept + ending)[-(context + 1):]
        texts.append(text)
        starts.append(max(len(text) - len(ending), 1))  # from 1: an ending may fill the context
        cut = max(cut, len(given) + len(ending) - len(text))
    trunk = commonprefix([text[:start - 1] for text, start in zip(texts, starts)])
    return Item(example, texts, starts, trunk, cut)

def in_batches(items, length, budget, most):
    """Items of similar length together, the longest first; at most `budget` tokens, padding counted."""
    items = sorted(items, key=length, reverse=True)
    while items:
        count = min(most, max(1, budget // max(1, length(items[0]))))
        yield items[:count]
        items = items[count:]

def read_trunks(model, batch, prefix, more):
    """A KVCache of the batch's trunks, with room for `more` tokens."""
    trunks = [item.trunk[prefix.end:] for item in batch]
    T = max(map(len, trunks))
    cache = copies(model, prefix, [0] * len(batch), T + more)
    if T:
        model.hidden(padded(trunks, 0, prefix.device), cache)
        cache.lengths = [len(item.trunk) for item in batch]
    return cache

def score_batch(model, batch, cache):
    """log p of every choice of every row, whose trunks are in the cache: a list of lists."""
    scores, tails = [[0.0] * len(item.texts) for item in batch], []
    for row, item in enumerate(batch):
        for choice, text in enumerate(item.texts):
            tails.append((len(text) - 1 - len(item.trunk), row, choice, text, item.starts[choice]))
    for group in in_batches(tails, lambda tail: tail[0], HEAD_ROWS[cache.device.type], most=256):
        W = group[0][0]  # the longest tail's length
        own = copies(model, cache, [row for _, row, *_ in group], W)
        # all end in the last of W slots: a shorter one begins in its trunk, none is padded beyond the context
        own.lengths = firsts = [max(len(text) - 1 - W, 0) for *_, text, _ in group]
        tokens = [text[first:-1] for (*_, text, _), first in zip(group, firsts)]
        h = model.hidden(padded(tokens, 0, cache.device), own)  # (N, W, C)
        logp = model.head(h).float().log_softmax(-1)            # (N, W, V)
        for (_, row, choice, text, start), first, own_logp in zip(group, firsts, logp):
            wanted = torch.tensor(text[start:], device=cache.device)[:, None]
            found = own_logp[start - 1 - first:len(text) - 1 - first].gather(1, wanted)
            scores[row][choice] = found.double().sum().item()
    return scores

def continued(model, prompts, cache, new_tokens, tokenizer):
    """The likeliest continuation of every prompt, as text; it ends with a stop token, after new_tokens, or
    (as in FinGPT) where the model starts another "Answer: "."""
    written = [[] for _ in prompts]
    for step in generate(model, prompts, new_tokens, temperature=0, stop=tokenizer.stop_ids,
                         vocabulary=tokenizer.vocab_size, cache=cache):
        for ids, token in zip(written, step):
            if token is not None and token not in tokenizer.stop_ids:
                ids.append(token)
    return [tokenizer.decode(ids).split("Answer: ")[0] for ids in written]

@torch.inference_mode()
def score_in_batches(model, tokenizer, examples, device, new_tokens=0):
    """Yields, batch by batch, [(example, log p of every choice, written text, tokens cut), ...].

    With new_tokens the model also writes so many after the prompt, at most half of its context; the prompt
    has what is left. Both come from one reading of the prompt."""
    if not examples:
        return
    context, where = model.config.context, device.torch_device
    new_tokens = min(new_tokens, context // 2)
    room = context - new_tokens if new_tokens else None
    items = [make_item(e, tokenizer, context, room) for e in examples]
    shared = torch.tensor([commonprefix([item.trunk for item in items])], dtype=torch.long, device=where)
    with device.autocast():
        prefix = read_prefix(model, shared)
    most = 64 if new_tokens else 256
    for batch in in_batches(items, lambda item: len(item.trunk), BATCH_TOKENS[where.type], most):
        scores, texts = [[]] * len(batch), [""] * len(batch)
        with device.autocast():
            cache = read_trunks(model, batch, prefix, new_tokens)
            if batch[0].example.choices:
                scores = score_batch(model, batch, cache)
            if new_tokens:
                prompts = [item.texts[0][:len(item.trunk) + 1] for item in batch]
                texts = continued(model, prompts, cache, new_tokens, tokenizer)
        yield [(item.example, s, text, item.cut) for item, s, text in zip(batch, scores, texts)]

# ----------------------------------------------------------------------------- metrics

def confusion(labels, predictions, classes):
    """Rows (n, classes, classes), each a 1 at (right label, given label). Metrics take sums of such rows."""
    rows = np.zeros((len(labels), classes, classes))
    rows[np.arange(len(labels)), labels, predictions] = 1
    return rows

def accuracy(table):
    """table (..., right, given) -> (...)."""
    return np.trace(table, axis1=-2, axis2=-1) / table.sum((-2, -1))

def weighted_f1(table):
    """scikit-learn's f1_score(average="weighted"): each label's F1, weighted by how often it is right."""
    hits, right, given = np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1), table.sum(-2)
    f1 = 2 * hits / np.maximum(right + given, 1)
    return (f1 * right).sum(-1) / right.sum(-1)

def entity_f1(counts):
    """seqeval's f1_score (micro average): counts (..., 3) of entities that are right, in the text, named."""
    return 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)

def majority(rows, metric):
    """The score of always giving the commonest label."""
    right, always = rows.sum((0, 2)), np.zeros(rows.shape[1:])  # (classes,): how often each label is right
    always[:, right.argmax()] = right
    return float(metric(always))

def bootstrap(rows, metric, draws=2000, seed=0):
    """95% interval of metric(sum of the rows), rows (n, ...): n rows are drawn anew, with repetition."""
    random, flat = np.random.default_rng(seed), rows.reshape(len(rows), -1)
    if (flat.sum(1) == 1).all():  # every row is one cell of a table: cells are drawn, which is faster
        sums = random.multinomial(len(rows), flat.mean(0), size=draws)
    else:
        sums = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws) @ flat
    return np.quantile(metric(sums.reshape(draws, *rows.shape[1:])), (0.025, 0.975)).tolist()

def paired_bootstrap(first, second, metric, draws=2000, seed=0):
    """(low, high, p) of the difference of two runs over the same rows: its 95% interval, and twice the share
    of draws in which it has the other sign."""
    times = np.random.default_rng(seed).multinomial(len(first), np.full(len(first), 1 / len(first)), draws)
    one, other = (metric(np.tensordot(times, rows, 1)) for rows in (first, second))
    difference = other - one
    p = 2 * min((difference <= 0).mean(), (difference >= 0).mean())
    return *np.quantile(difference, (0.025, 0.975)).tolist(), float(min(1.0, p))

def mcnemar(first, second):
    """Exact two-sided p of as uneven a split of the rows on which only one of two models is right."""
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)
