"""How likely a model finds each answer, what it answers by itself, and how many of the answers are right.

    scores = label_scores(model, tokenizer, tasks.load("piqa", "data"), find_device())   # a list for each row: log p of every choice, in nats

A row of a task is a text and some endings; the log-likelihood of an ending is the sum of log p over its tokens.
Reading every (text, ending) pair by itself, as lm-evaluation-harness does, reads the text once for each ending. Here a row is read once:

    Question  :  How  ...  Answer  :  Use  the  |  blue  pen  |  long  old  brush
    0         1  2         7       8  9    10   |  11    12   |  11    12   13        positions
    trunk: the text, and whatever all endings begin with            branch 1      branch 2

The branches lie behind one another; RoPE or the position table gets the positions above, and attention sees a key if it is in the trunk or in
the query's own branch, and not after it. The last token of an ending is never read, since nothing is predicted from it: where endings are one
token (BoolQ's yes and no) there is no branch at all. What all rows of a task begin with (the instruction of the sentiment prompts) is read once
for all of them, into blocks of a paged cache (kvcache.py) that they share; there a prompt's answer is written, and its choices are scored, too.
Rows are sorted by length and batched by count of tokens, so there is hardly any padding, and the head, a fifth of a small model's work, is
applied only where a scored token is predicted. PIQA on SmolLM2 takes 0.66 of the multiplications of reading every pair.
"""
import math
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from beyond.paged_cache import SIZE, PagedCache, Pool, Sequence
from common.cli import InputError
from common.generate import generate
from model import Cache

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # more is no faster on a CPU and takes memory
HEAD_ROWS = {"cpu": 128, "cuda": 4096}       # predicted tokens whose logits exist at the same time


# ----------------------------------------------------------------------------- from text to tokens

def encode_pair(tokenizer, context, continuation):
    """Ids of a text and of what follows it, by the harness's rule: both are encoded as one text, and what exceeds the context's own ids belongs
    to the continuation. Spaces at the context's end move to the continuation, because vocabularies join them with the word that follows."""
    stripped = context.rstrip()
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    given = begin + tokenizer.encode(stripped)
    return given, (begin + tokenizer.encode(context + continuation))[len(given):]


@dataclass
class Row:
    """An example as tokens: the trunk, then the branches; `scored` has (place in tokens, token to predict, choice) for each scored token."""
    example: object
    tokens: list
    positions: list
    branch: list      # of each token: 0 the trunk, 1, 2, ...
    scored: list
    cut: int          # tokens that were cut from the left to fit the context


def common_prefix(lists):
    return len(os.path.commonprefix(lists))  # works on any sequences


def make_row(example, tokenizer, context, room=None):
    """Lay out the choices of an example as a trunk with branches. A text and ending beyond the context lose their first tokens, as in the harness;
    with `room`, the text itself loses what exceeds that many tokens, so that it stays the same for all endings."""
    pairs = [encode_pair(tokenizer, *pair) for pair in example.pairs()]
    for (_, ending), choice in zip(pairs, example.choices):
        if not ending:
            raise InputError(f"{example.task}, row {example.index}: the ending {choice!r} adds no token to its text: mend the row")
    most = room and min(room, context + 1 - max(len(ending) for _, ending in pairs))
    texts = [((given[-most:] if most else given) + ending)[-(context + 1):] for given, ending in pairs]
    cut = max(len(given) + len(ending) - len(text) for (given, ending), text in zip(pairs, texts))
    trunk = common_prefix([text[:-1] for text in texts])
    row = Row(example, texts[0][:trunk], list(range(trunk)), [0] * trunk, [], cut)
    for choice, (text, (_, ending)) in enumerate(zip(texts, pairs)):
        shift = len(row.tokens) - trunk  # of this branch's tokens, behind those of earlier branches
        for i in range(max(len(text) - len(ending), 1), len(text)):  # from 1: an ending may be longer than the context
            row.scored.append((i - 1 + shift * (i > trunk), text[i], choice))
        row.tokens += text[trunk:-1]
        row.positions += range(trunk, len(text) - 1)
        row.branch += [choice + 1] * (len(text) - 1 - trunk)
    return row


def batches(items, length, budget, most=256):
    """Items of similar length together, the longest first: at most `budget` places in a batch, padding counted."""
    items, batch = sorted(items, key=length, reverse=True), []
    for item in items:
        if batch and (len(batch) + 1) * length(batch[0]) > budget or len(batch) == most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# ----------------------------------------------------------------------------- log-likelihoods

class Beginnings(Cache):
    """A batch's cache for scoring: of each row what the PagedCache holds of it, then its own tokens, at given positions. They are not kept:
    another batch, or generate, can go on from the same blocks."""

    def __init__(self, cache, positions, mask):
        self.cache, self.given_positions, self.given_mask = cache, positions, mask
        self.end = int(positions.max()) + 1 - positions.shape[1]  # the model compares end + T with its context: branches share positions
        cache.look_up()

    def positions(self, T):
        return self.given_positions

    def mask(self, T):
        return self.given_mask

    def update(self, layer, k, v):
        if self.cache.end == 0:
            return k, v
        return [torch.cat(pair, dim=2) for pair in zip(self.cache.in_order(layer, self.cache.end), (k, v))]  # two of (B, kv_heads, S + T, d)

    def advance(self, T):
        pass


@torch.inference_mode()
def read(model, texts, cache, device):
    """Read into the cache what it lacks of each text."""
    unread = [ids[n:] for ids, n in zip(texts, cache.lengths)]
    if any(unread):
        with device.autocast():
            model.hidden(padded(unread, 0, cache.device), cache)
        cache.lengths = [len(ids) for ids in texts]


def shared_tokens(rows):
    """How many tokens all rows begin with; they end before any branch and before anything is predicted."""
    if len(rows) < 2:
        return 0
    return min([common_prefix([r.tokens for r in rows])] + [min(r.branch.count(0), min(r.scored)[0]) for r in rows])


def in_batches(model, rows, device, most=256, new_tokens=0):
    """Yields (rows of a batch, their PagedCache); the longest rows come first. What all rows begin with is in the cache: it was read once, into blocks
    that all share. With new_tokens the pool has room for the rows and so many tokens more, else for that beginning alone."""
    for group in filter(None, ([r for r in rows if not r.cut], [r for r in rows if r.cut])):  # rows without their beginning share none with the others
        shared = shared_tokens(group)
        parts = list(batches(group, lambda r: len(r.tokens), BATCH_TOKENS[device.torch_device.type], most))
        own = max(len(b) * ((len(b[0].tokens) - shared + new_tokens) // SIZE + 2) for b in parts) if new_tokens else 1  # blocks; 2: of both ends
        dtype = device.dtype if device.dtype == torch.bfloat16 else model.norm.weight.dtype  # of keys and values
        beginning = Sequence(Pool(model.config, -(-shared // SIZE) + own, device=device.torch_device, dtype=dtype))
        read(model, [group[0].tokens[:shared]], PagedCache([beginning]), device)
        for batch in parts:
            cache = PagedCache([beginning.share(shared) for _ in batch])
            yield batch, cache
            cache.lengths = [0] * len(batch)  # their blocks go back to the pool
        beginning.cut()


def in_order(examples, found, doing, progress):
    """What was found for each example, batch by batch, in the examples' order."""
    order, results = {id(e): i for i, e in enumerate(examples)}, [None] * len(examples)
    with tqdm(total=len(examples), desc=doing, unit=" rows", disable=None if progress else True, leave=False) as bar:
        for batch in found:
            for example, result, _ in batch:
                results[order[id(example)]] = result
            bar.update(len(batch))
    return results


def padded(lists, fill, device):
    width = max(map(len, lists))
    return torch.tensor([row + [fill] * (width - len(row)) for row in lists], device=device)


def read_rows(model, rows, cache):
    """What the head reads at every place of a batch of rows after those that are in the cache: (B, T, C)."""
    where, known = cache.device, cache.lengths
    tokens, positions = (padded([part[n:] for part, n in zip(parts, known)], 0, where) for parts in ([r.tokens for r in rows], [r.positions for r in rows]))
    branch = padded([r.branch[n:] for r, n in zip(rows, known)], -1, where)
    if not any(known) and not branch.gt(0).any():
        return model.hidden(tokens)  # one text a row: plain causal attention, which never looks at the padding behind
    T = tokens.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=where).tril()
    own = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))                  # (B, T, T): query, key
    kept = torch.arange(max(known), device=where) < torch.tensor(known, device=where)[:, None]              # (B, S)
    mask = torch.cat((kept[:, None, :].expand(-1, T, -1), own), dim=2)[:, None]                              # (B, 1, T, S + T)
    return model.hidden(tokens, Beginnings(cache, positions, mask))


def log_probabilities(head, h, targets, rows):
    """log p of targets (M,) under head(h), h (M, C); logits of `rows` places at a time."""
    parts = []
    for x, t in zip(h.split(rows), targets.split(rows)):
        logits = head(x).float()  # (rows, V)
        parts.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts)


@torch.inference_mode()
def score_batch(model, rows, cache, device):
    """log p of every choice of every row: a list of lists. Of each row the cache holds a beginning."""
    start = cache.lengths
    with device.autocast():
        h = read_rows(model, rows, cache)
        wanted = sorted({(b, place - start[b], token) for b, r in enumerate(rows) for place, token, _ in r.scored})  # tokens that choices share count once
        b, place, token = torch.tensor(wanted, device=h.device).T
        logp = log_probabilities(model.head, h[b, place], token, HEAD_ROWS[h.device.type])
    known, result = dict(zip(wanted, logp.tolist())), [[0.0] * len(r.example.choices) for r in rows]
    for b, r in enumerate(rows):
        for place, token, choice in r.scored:
            result[b][choice] += known[b, place - start[b], token]
    return result


def score_in_batches(model, tokenizer, examples, device):
    """Yields, batch by batch, [(example, log p of every choice, tokens cut), ...]."""
    rows = [make_row(e, tokenizer, model.config.context) for e in examples]
    for batch, cache in in_batches(model, rows, device):
        yield [(r.example, scores, r.cut) for r, scores in zip(batch, score_batch(model, batch, cache, device))]


def label_scores(model, tokenizer, examples, device, progress=True):
    """The log-likelihood of every choice of every example, in nats, in the order of the examples."""
    return in_order(examples, score_in_batches(model, tokenizer, examples, device), "scoring", progress)


# ----------------------------------------------------------------------------- answers written by the model

def prompt_row(example, tokenizer, room):
    """A prompt as a row whose last token alone predicts something."""
    ids = ([] if tokenizer.begin is None else [tokenizer.begin]) + tokenizer.encode(example.prompt.rstrip())  # a space at its end is left to the model
    kept = ids[-room:]
    return Row(example, kept, list(range(len(kept))), [0] * len(kept), [(len(kept) - 1, None, None)], len(ids) - len(kept))


@torch.inference_mode()
def continued(model, prompts, cache, new_tokens, tokenizer, device):
    """The likeliest continuation of every prompt, as text; it ends with a stop token, after new_tokens, or at the next "Answer: "."""
    written = [[] for _ in prompts]
    with device.autocast():
        for step in generate(model, prompts, new_tokens, temperature=0, stop=tokenizer.stop_ids, vocabulary=tokenizer.vocab_size, cache=cache):
            for ids, token in zip(written, step):
                ids += [] if token is None or token in tokenizer.stop_ids else [token]
    return [tokenizer.decode(ids).split("Answer: ")[0] for ids in written]


def answer_in_batches(model, tokenizer, examples, device, new_tokens):
    """Yields, batch by batch, [(example, (the text that the model writes after the prompt, log p of every choice), tokens cut), ...].

    Both come from one reading of the prompt. As in FinGPT a text ends where the model starts another answer ("Answer: "). It may take half of
    a short context; the prompt has what is left."""
    new_tokens = min(new_tokens, model.config.context // 2)
    room = model.config.context - new_tokens
    rows = [make_row(e, tokenizer, model.config.context, room) if e.choices else prompt_row(e, tokenizer, room) for e in examples]
    for batch, cache in in_batches(model, rows, device, most=64, new_tokens=new_tokens):
        prompts = [r.tokens[:min(r.scored)[0] + 1] for r in batch]
        read(model, [ids[:-1] for ids in prompts], cache, device)  # the last token predicts: it is left to both
        scores = score_batch(model, batch, cache, device) if batch[0].example.choices else [[]] * len(batch)
        texts = continued(model, prompts, cache, new_tokens, tokenizer, device)
        yield [(r.example, answer, r.cut) for r, *answer in zip(batch, texts, scores)]


def generate_answers(model, tokenizer, examples, device, new_tokens=10, progress=True):
    """The text that the model writes after each prompt, in the order of the examples."""
    prompts = [replace(e, choices=[]) for e in examples]
    return [text for text, _ in in_order(prompts, answer_in_batches(model, tokenizer, prompts, device, new_tokens), "answering", progress)]


def answer_both_ways(model, tokenizer, examples, device, new_tokens=10, progress=True):
    """(text, log-likelihoods of the choices) for each example: what generate_answers and label_scores find, from one reading of each prompt."""
    return in_order(examples, answer_in_batches(model, tokenizer, examples, device, new_tokens), "answering", progress)


# ----------------------------------------------------------------------------- metrics: of a table of counts, (..., right label, given label)

def confusion(labels, predictions, classes):
    return np.bincount(np.array(labels, int) * classes + np.array(predictions, int), minlength=classes * classes).reshape(classes, classes)


def accuracy(table):
    return np.trace(table, axis1=-2, axis2=-1) / table.sum((-2, -1))


def weighted_f1(table):
    """scikit-learn's f1_score(average="weighted"): each label's F1, weighted by how often it is the right one; 0 where a label is never met."""
    hits, right, given = np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1), table.sum(-2)
    f1 = 2 * hits / np.maximum(right + given, 1)
    return (f1 * right).sum(-1) / right.sum(-1)


def entity_f1(counts):
    """seqeval's f1_score (micro average): counts (..., 3) of entities that are right, in the text, and named."""
    return 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)


def majority(table, metric):
    """The score of whoever always gives the commonest label."""
    always = np.zeros_like(table)
    always[:, table.sum(1).argmax()] = table.sum(1)
    return float(metric(always))


def bootstrap(table, metric, draws=2000, seed=0):
    """95% interval: the metric of tables that are drawn anew from the rows of this one."""
    n = int(table.sum())
    again = np.random.default_rng(seed).multinomial(n, (table / n).ravel(), size=draws).reshape(draws, *table.shape)
    return [float(q) for q in np.quantile(metric(again), (0.025, 0.975))]


def bootstrap_rows(rows, metric, draws=2000, seed=0):
    """95% interval of metric(sums over rows), rows (n, k): rows are drawn anew, with repetition."""
    rows = np.asarray(rows, float)
    times = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)  # (draws, n)
    return [float(q) for q in np.quantile(metric(times @ rows), (0.025, 0.975))]


def paired_bootstrap(first, second, metric, draws=2000, seed=0):
    """(low, high, p) of the difference of two runs over the same rows: its 95% interval, and how often it has the other sign, twice."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    times = np.random.default_rng(seed).multinomial(len(first), np.full(len(first), 1 / len(first)), size=draws)  # (draws, n)
    difference = metric(times @ second) - metric(times @ first)
    low, high = (float(q) for q in np.quantile(difference, (0.025, 0.975)))
    return low, high, float(min(1.0, 2 * min((difference <= 0).mean(), (difference >= 0).mean())))


def mcnemar(first, second):
    """Exact two-sided p of as uneven a split of the rows on which only one of two models is right, if both were equally good."""
    only_first, only_second = sum(bool(a and not b) for a, b in zip(first, second)), sum(bool(b and not a) for a, b in zip(first, second))
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)
