"""Rows to learn from, a prompt and its answer each, and the batches of a finetuning run (section VI.C).

A row is tokens: the prompt, the answer, the end token; the loss is on the answer and the end token alone.
Two things would be computed in vain. Padding: rows of a batch are padded to the longest, a third of all slots
if they come in random order; so rows are shuffled, sorted by length inside pools of 16 batches, cut into
batches, and the batches shuffled. Repetition: every prompt of a task begins with the same instruction, a
third of the tokens; it is read once for a batch, and every row attends to copies of its keys and values.
Gradients flow back through them: what is learned is what whole rows teach.

    rows = [encode(tokenizer, prompt, answer, context=512) for prompt, answer in pairs]
    batch = Batch(pick(rows, 16, seed=1, step=0))    # prefix (1, P), tokens (B, T), targets (B, T)
    loss = head_loss(model.head, batch.hidden(model), batch.targets)
"""
import json
import re
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences

import numpy as np
import torch

from common.cli import refuse, say
from common.data import parse_json
from common.generate import padded
from common.loss import IGNORED
from tasks import sets
from tasks.score import copies, encode_pair, read_prefix, shorten

POOL = 16  # batches among which rows are sorted by length

@dataclass
class Row:
    ids: list           # prompt, answer and end token
    start: int          # where the answer begins
    group: str = ""     # rows with the same instruction
    lost: tuple = (0, 0)  # tokens of the prompt and of the answer that did not fit

def encode(tokenizer, prompt, answer, context, group=""):
    """A Row of at most `context` tokens. What does not fit is left out of the prompt, down to an eighth of
    the context, and only then at the answer's end; an answer that is not whole has no end token."""
    given, answer = encode_pair(tokenizer, prompt, answer)
    if tokenizer.end is not None:
        answer = [*answer, tokenizer.end]
    kept = shorten(given, max(context - len(answer), context // 8, 1))
    learned = answer[:context - len(kept)]
    lost = len(given) - len(kept), len(answer) - len(learned)
    return Row(kept + learned, len(kept), group, lost)

def pick(rows, count, seed, step):
    """The rows of one step, which depend on the seed and the step alone: every row once in an epoch, rows of
    the same group and length together."""
    steps = -(-len(rows) // count)  # in an epoch; its last step is filled up with its first rows
    epoch, number = divmod(step, steps)
    random = np.random.default_rng((seed, epoch))
    order = np.resize(random.permutation(len(rows)), steps * count)
    pools = []
    for start in range(0, len(order), POOL * count):
        pool = order[start:start + POOL * count]
        pools += sorted(pool, key=lambda n: (rows[n].group, len(rows[n].ids)))
    batch = random.permutation(steps)[number]
    return [rows[i] for i in pools[batch * count:(batch + 1) * count]]

class Batch:
    """The tensors of some rows: their common prefix, once, and the rest of each, padded at the right."""

    def __init__(self, rows, share=True, device="cpu"):
        prefix = []
        if share and len(rows) > 1:  # the prompt's last token predicts: it stays with its row
            prefix = commonprefix([row.ids[:row.start - 1] for row in rows])
        P = len(prefix)
        self.prefix = torch.tensor([prefix], dtype=torch.int64, device=device)
        self.tokens = padded([row.ids[P:-1] for row in rows], 0, device)
        targets = [[IGNORED] * (row.start - 1 - P) + row.ids[row.start:] for row in rows]
        self.targets = padded(targets, IGNORED, device)
        self.answers = sum(len(row.ids) - row.start for row in rows)  # tokens that are learned
        self.size = sum(len(row.ids) for row in rows)                 # tokens without padding

    def hidden(self, model):
        """What the head reads, (B, T, C)."""
        cache, (B, T) = read_prefix(model, self.prefix), self.tokens.shape
        return model.hidden(self.tokens, copies(model, cache, [0] * B, T) if cache.end else None)

ALPACA = '{"instruction": ..., "input": ..., "output": ...}'  # a row; its input may be missing

def read_alpaca(path):
    """Examples of a JSON file in Alpaca's form: a list of rows, {"data": a list of rows}, or a row a line.
    Rows with a blank instruction or output, and all but one of equal rows, are left out and counted."""
    text = sets.read_text(path)
    lines = re.match(r"\s*\{.*\}\s*\n\s*\{", text)
    rows = [row for row, _ in sets.read_jsonl(path)] if lines else parse_json(text, path)
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    rows = rows if isinstance(rows, list) else [rows]
    kept = {}
    for n, row in enumerate(rows):
        example = alpaca_example(row, n, f"{path}, row {n}")
        if example.prompt.strip() and example.answer.strip():
            kept.setdefault((example.prompt, example.answer), example)
    refuse(not kept, f"{path} has no row with text: give rows of {ALPACA}")
    if len(kept) < len(rows):
        say(f"{path}: {len(rows) - len(kept):,} of {len(rows):,} rows are left out: blank, or there twice")
    return list(kept.values())

def alpaca_example(row, index, where):
    """A row as an Example; its prompt is blank if its instruction is. {"prompt": ..., "completion": ...} is
    taken as it is."""
    fields = row if isinstance(row, dict) else {}
    names = ("prompt", "completion") if "completion" in fields else ("instruction", "output")
    asked, answer, given = fields.get(names[0]), fields.get(names[1]), fields.get("input") or ""
    texts = all(isinstance(text, str) for text in (asked, answer, given))
    refuse(not texts, f"{where} is {json.dumps(row)[:80]}: it should be {ALPACA}, each a text; conversations "
           "(ShareGPT's) and lists of chat messages are not read")
    if asked.strip() and names[0] == "instruction":
        asked = sets.instruction_prompt(asked, given) if given.strip() else f"Instruction: {asked}\nAnswer: "
    return sets.Example("rows", index, asked, answer)

COMPANIES = "Nordvik, Halden Oyj, Castra Foods, Lumera, Teval Steel, Ostrava Bank, Brightwell, Karo Shipping"
TEMPLATES = {
    "positive": ("{c} 's profit rose to EUR {b} mn from EUR {a} mn .", "{c} won an order of EUR {b} mn ."),
    "neutral": ("{c} will publish its report at {a} a.m.", "{c} has {b} employees in {a} countries ."),
    "negative": ("{c} 's profit fell to EUR {a} mn from EUR {b} mn .", "{c} lost an order of EUR {b} mn .")}

def made_up_headlines(count, seed):
    """Examples made of templates and numbers, to try everything without a download."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        label = sets.SENTIMENTS[random.integers(3)]
        a, b = random.integers(2, 12, 2) + (0, 12)
        template, company = TEMPLATES[label][random.integers(2)], COMPANIES.split(", ")[random.integers(8)]
        text = template.format(c=company, a=a, b=b)
        rows.append(sets.sentiment_row("made-up headlines", text, label, "news"))
    return rows
