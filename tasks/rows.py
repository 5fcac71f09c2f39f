"""Rows to learn from, a prompt and its answer each, and the batches of a finetuning run (section VI.C).

A row is tokens: the prompt, the answer, the end token. The loss is on the answer and the end token alone,
three or four of some seventy tokens. What batches are made of decides how much is computed in vain:

    padding     rows of a batch are padded to the longest: a third of all slots if rows come in random order.
                So rows are shuffled, sorted by length inside pools of 16 batches, cut into batches, and
                the batches shuffled: a few percent.
    repetition  every prompt of a task begins with the same instruction, a third of the tokens. It is read
                once for a batch (prefix.py). With dropout its masks are then the same in all rows too: the
                expected gradient stays what it was.

    rows = [encode(tokenizer, prompt, answer, context=512) for prompt, answer in pairs]
    batch = Batch(pick(rows, 16, seed=1, step=0))    # prefix (1, P), tokens (B, T), targets (B, T)
    loss = head_loss(model.head, batch.hidden(model), batch.targets)
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.cli import InputError
from tasks.prefix import PrefixCache, common_length
from tasks.score import encode_pair
from tasks.sets import instruction_prompt, sentiment_row

IGNORED = -100  # the target of a token that is not to be learned
POOL = 16       # batches among which rows are sorted by length


@dataclass
class Row:
    ids: list       # prompt, answer and end token
    start: int      # where the answer begins
    group: str = ""  # rows with the same instruction


def encode(tokenizer, prompt, answer, context, group=""):
    """A Row. A prompt that is too long loses its middle: the instruction stands first, "Answer:" last."""
    ids, answer = encode_pair(tokenizer, prompt, answer)
    answer = answer[:context // 2]
    if tokenizer.end is not None:
        answer = answer + [tokenizer.end]
    room = context - len(answer)
    if len(ids) > room:
        ids = ids[:room - room // 2] + ids[len(ids) - room // 2:]
    return Row(ids + answer, len(ids), group)


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
        P = 0
        if share and len(rows) > 1:  # the prompt's last token predicts: it stays with its row
            P = common_length([row.ids[:row.start - 1] for row in rows])
        T = max(len(row.ids) for row in rows) - 1 - P
        tokens, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORED, np.int64)
        for row, x, y in zip(rows, tokens, targets):
            x[:len(row.ids) - 1 - P] = row.ids[P:-1]
            y[row.start - 1 - P:len(row.ids) - 1 - P] = row.ids[row.start:]
        self.prefix = torch.tensor(rows[0].ids[:P], dtype=torch.int64, device=device)[None]
        self.tokens, self.targets = (torch.from_numpy(t).to(device) for t in (tokens, targets))
        self.answers = sum(len(row.ids) - row.start for row in rows)  # tokens that are learned
        self.size = sum(len(row.ids) for row in rows)                 # tokens without padding

    def hidden(self, model):
        """What the head reads, (B, T, C)."""
        return PrefixCache(model, self.prefix).read(self.tokens)


# ----------------------------------------------------------------------------- Alpaca's format

ALPACA = '{"instruction": ..., "input": ..., "output": ...}'  # a row; its input may be missing


def read_alpaca(path):
    """[(prompt, answer)] of a JSON file: a list of Alpaca's rows, or one row a line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} can't be read ({e})") from None
    pairs = [alpaca_pair(row, f"{path}, {where}") for where, row in json_rows(path, text)]
    if not pairs:
        raise InputError(f"{path} is empty: give rows of {ALPACA}")
    return pairs


def json_rows(path, text):
    """Yield (where, row) of a JSON list, or of lines of JSON."""
    whole = text.lstrip().startswith("[")
    for number, part in enumerate([text] if whole else text.splitlines(), 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except json.JSONDecodeError as e:
            line = e.lineno if whole else number
            raise InputError(f"{path} is not JSON: line {line}, column {e.colno}: {e.msg}") from None
        if whole:
            yield from ((f"row {n}", row) for n, row in enumerate(found))
        else:
            yield f"line {number}", found


def alpaca_pair(row, where):
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object but {json.dumps(row)[:60]}: it should be {ALPACA}")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            keys = ", ".join(map(repr, row)) or "no keys"
            raise InputError(f"{where} has no text as {key!r} (it has {keys}): it should be {ALPACA}")
    if not isinstance(row.get("input") or "", str):
        raise InputError(f"{where}: 'input' is {json.dumps(row['input'])[:60]}, it should be text")
    if row.get("input"):
        return instruction_prompt(row["instruction"], row["input"]), row["output"]
    return f"Instruction: {row['instruction']}\nAnswer: ", row["output"]


# ----------------------------------------------------------------------------- where no set is at hand

COMPANIES = ("Nordvik", "Halden Oyj", "Castra Foods", "Lumera", "Teval Steel", "Ostrava Bank", "Brightwell",
             "Karo Shipping")
TEMPLATES = {
    "positive": ("{c} 's operating profit rose to EUR {b} mn from EUR {a} mn .",
                 "{c} raised its outlook after sales grew by {a} % .",
                 "{c} won an order worth EUR {b} mn .",
                 "{c} narrowed its loss to EUR {a} mn from EUR {b} mn ."),
    "neutral": ("{c} will publish its interim report at {a} a.m.",
                "{c} has {b} employees in {a} countries .",
                "{c} appointed a new head of logistics .",
                "The value of the lease of {c} was not disclosed ."),
    "negative": ("{c} 's operating profit fell to EUR {a} mn from EUR {b} mn .",
                 "{c} cut {b} jobs as demand weakened by {a} % .",
                 "{c} lost an order worth EUR {b} mn .",
                 "{c} 's loss widened to EUR {b} mn from EUR {a} mn ."),
}


def made_up_headlines(count, seed):
    """Examples made of templates and numbers, to try everything without a download."""
    random, rows = np.random.default_rng(seed), []
    for i in range(count):
        label = ("negative", "neutral", "positive")[random.integers(3)]
        a, b = sorted(int(n) for n in random.integers(2, 12, 2) + (0, 12))
        template = TEMPLATES[label][random.integers(4)]
        text = template.format(c=COMPANIES[random.integers(len(COMPANIES))], a=a, b=b)
        rows.append(sentiment_row("made-up headlines", text, label, "news"))
        rows[-1].index = i
    return rows
