"""How likely a model finds each answer, what it answers by itself, and how many of the answers are right.

    for batch in score_in_batches(model, tokenizer, sets.load("piqa", "data"), find_device()):
        ...     # (example, log p of each choice, written text, tokens cut) of each row

A row of a task is a text and some endings; an ending's log-likelihood is the sum of log p over its tokens.
Reading every (text, ending) pair by itself, as lm-evaluation-harness does, reads the text once an ending.
Here a row is read once, as a trunk with branches:

    Question  :  How  ...  Answer  :  Use  the  |  blue  pen  |  long  old  brush
    0         1  2         7       8  9    10   |  11    12   |  11    12   13        positions
    trunk: the text, and the prefix of all endings     branch 1      branch 2

The branches lie behind one another; RoPE or the position table gets the positions above, and attention sees a
key if it is in the trunk or in the query's own branch, and not after it. The last token of an ending is not
read, since nothing is predicted from it: where endings are one token (BoolQ's yes and no) there is no branch.
The common prefix of all rows, a task's instruction, is read once (prefix.py). Rows of similar length make a
batch, and the head is applied only where a scored token is predicted. PIQA on SmolLM2 takes 0.66 of the
multiplications of reading every pair. A written answer goes on from the same reading's keys and values.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from common.cli import refuse
from common.generate import generate, padded
from model import KVCache
from tasks.prefix import PrefixCache, common_length

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch; more is no faster on a CPU and takes memory
HEAD_ROWS = {"cpu": 128, "cuda": 4096}       # predicted tokens whose logits exist at the same time


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


@dataclass
class Tree:
    """An example as tokens: the trunk, then the branches."""
    example: object
    tokens: list
    positions: list
    branch: list      # of each token: 0 the trunk, 1, 2, ...
    scored: list      # (slot in tokens, token to predict from there, choice) of each scored token
    cut: int          # tokens that were left out to fit the context

    @property
    def prompt(self):
        """The text before all endings, where all have the same."""
        return self.tokens[:min(self.scored)[0] + 1]


def make_tree(example, tokenizer, context, room=None):
    """Lay out a prompt and its choices. What exceeds the context loses its first tokens, as in the harness;
    with `room` the prompt is shortened to that many tokens, so that it stays the same for all endings."""
    pairs = [encode_pair(tokenizer, *pair) for pair in example.pairs()]
    for (_, ending), choice in zip(pairs, example.choices):
        refuse(not ending, f"{example.task}, row {example.index}: the ending {choice!r} adds no token to its "
               "text: mend the row")
    if not pairs:  # only to be answered in writing: which token comes next is not known
        pairs = [(encode_pair(tokenizer, example.prompt, "")[0], [None])]
    longest, texts, cut = max(len(ending) for _, ending in pairs), [], 0
    for given, ending in pairs:
        kept = shorten(given, min(room, context + 1 - longest)) if room else given
        texts.append((kept + ending)[-(context + 1):])
        cut = max(cut, len(given) + len(ending) - len(texts[-1]))
    trunk = common_length([text[:-1] for text in texts])
    tree = Tree(example, texts[0][:trunk], list(range(trunk)), [0] * trunk, [], cut)
    for choice, (text, (_, ending)) in enumerate(zip(texts, pairs)):
        shift = len(tree.tokens) - trunk  # of this branch's tokens, behind those of earlier branches
        for i in range(max(len(text) - len(ending), 1), len(text)):  # from 1: an ending may fill the context
            tree.scored.append((i - 1 + shift * (i > trunk), text[i], choice))
        tree.tokens += text[trunk:-1]
        tree.positions += range(trunk, len(text) - 1)
        tree.branch += [choice + 1] * (len(text) - 1 - trunk)
    return tree


def in_batches(trees, budget, most):
    """Rows of similar length together, the longest first; at most `budget` tokens, padding counted."""
    batch = []
    for tree in sorted(trees, key=lambda t: len(t.tokens), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > budget or len(batch) == most:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def shared_prefix(model, trees, device):
    """The PrefixCache of what all rows begin with, before any branch and before anything is predicted."""
    length = 0
    if len(trees) > 1:
        length = common_length([t.tokens[:min(t.branch.count(0), min(t.scored)[0])] for t in trees])
    tokens = torch.tensor([trees[0].tokens[:length]], dtype=torch.long, device=device.torch_device)
    with torch.inference_mode(), device.autocast():
        return PrefixCache(model, tokens)


def read_trees(trees, prefix, store=None):
    """What the head reads at every slot of a batch of rows after the prefix: (B, T, C)."""
    P, where = prefix.length, prefix.device
    tokens = padded([t.tokens[P:] for t in trees], 0, where)
    if not any(t.branch[-1] for t in trees):
        return prefix.read(tokens, store=store)  # one text a row: plain causal attention
    positions = padded([t.positions[P:] for t in trees], 0, where)
    branch = padded([t.branch[P:] for t in trees], -1, where)
    B, T = tokens.shape
    key, query = branch[:, None, :], branch[:, :, None]
    own = torch.ones(T, T, dtype=torch.bool, device=where).tril() & ((key == 0) | (key == query))  # (B, T, T)
    mask = torch.cat((own.new_ones(B, T, P), own), dim=2)[:, None]  # (B, 1, T, P + T)
    return prefix.read(tokens, positions, mask, store)


@torch.inference_mode()
def score_batch(model, trees, prefix, device, store=None):
    """log p of every choice of every row: a list of lists."""
    with device.autocast():
        h, entries = read_trees(trees, prefix, store), []  # (B, T, C)
        if not trees[0].example.choices:
            return [[] for _ in trees]
        for b, tree in enumerate(trees):
            entries += [(b, choice, slot - prefix.length, token) for slot, token, choice in tree.scored]
        b, choice, slot, token = torch.tensor(entries, device=h.device).T
        logp, rows = [], HEAD_ROWS[h.device.type]
        for x, t in zip(h[b, slot].split(rows), token.split(rows)):
            logits = model.head(x).float()  # (rows, V)
            logp.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
    sums = torch.zeros(len(trees), int(choice.max()) + 1, dtype=torch.float64, device=h.device)
    sums.index_put_((b, choice), torch.cat(logp).double(), accumulate=True)
    return [row[:len(t.example.choices)] for row, t in zip(sums.tolist(), trees)]


@torch.inference_mode()
def continued(model, prompts, cache, new_tokens, tokenizer, device):
    """The likeliest continuation of every prompt, as text; it ends with a stop token, after new_tokens, or
    (as in FinGPT) where the model starts another "Answer: "."""
    written = [[] for _ in prompts]
    with device.autocast():
        for step in generate(model, prompts, new_tokens, temperature=0, stop=tokenizer.stop_ids,
                             vocabulary=tokenizer.vocab_size, cache=cache):
            for ids, token in zip(written, step):
                if token is not None and token not in tokenizer.stop_ids:
                    ids.append(token)
    return [tokenizer.decode(ids).split("Answer: ")[0] for ids in written]


def score_in_batches(model, tokenizer, examples, device, new_tokens=0):
    """Yields, batch by batch, [(example, log p of every choice, written text, tokens cut), ...].

    With new_tokens the model also writes so many after the prompt, at most half of its context; the prompt
    has what is left. Both come from one reading of the prompt.
    """
    if not examples:
        return
    context, where = model.config.context, device.torch_device
    new_tokens = min(new_tokens, context // 2)
    room = context - new_tokens if new_tokens else None
    trees = [make_tree(e, tokenizer, context, room) for e in examples]
    prefix = shared_prefix(model, trees, device)
    for batch in in_batches(trees, BATCH_TOKENS[where.type], most=64 if new_tokens else 256):
        prompts, texts, cache = [t.prompt for t in batch], [""] * len(batch), None
        if new_tokens:
            capacity = max(len(batch[0].tokens), max(map(len, prompts)) + new_tokens)
            cache = KVCache(model.config, len(batch), capacity, where)
        scores = score_batch(model, batch, prefix, device, cache)
        if new_tokens:
            cache.lengths = [len(ids) - 1 for ids in prompts]  # the last one is read again, as it predicts
            texts = continued(model, prompts, cache, new_tokens, tokenizer, device)
        yield [(t.example, s, text, t.cut) for t, s, text in zip(batch, scores, texts)]


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
    return interval(metric(sums.reshape(draws, *rows.shape[1:])))


def interval(values):
    return np.quantile(values, (0.025, 0.975)).tolist()


def paired_bootstrap(first, second, metric, draws=2000, seed=0):
    """(low, high, p) of the difference of two runs over the same rows: its 95% interval, and twice the share
    of draws in which it has the other sign."""
    times = np.random.default_rng(seed).multinomial(len(first), np.full(len(first), 1 / len(first)), draws)
    one, other = (metric(np.tensordot(times, rows, 1)) for rows in (first, second))
    difference = other - one
    p = 2 * min((difference <= 0).mean(), (difference >= 0).mean())
    return *interval(difference), float(min(1.0, p))


def mcnemar(first, second):
    """Exact two-sided p of as uneven a split of the rows on which only one of two models is right."""
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)
