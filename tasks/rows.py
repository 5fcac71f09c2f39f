"""Rows to learn from, a prompt and its answer each, and the batches of a finetuning run (section VI.C).

A row is tokens: the prompt, the answer, the end token. The loss is on the answer and the end token alone, three or four of some seventy
tokens. What batches are made of decides how much of the rest is computed in vain:

    padding     rows of a batch are padded to the longest. Rows in random order: a third of all places. So rows are shuffled, sorted by
                length inside pools of 16 batches, cut into batches, and the batches shuffled: a few percent.
    repetition  every prompt of a task begins with the same instruction, a third of the tokens. A token's activations depend on what is
                before it alone, so those of the common beginning are the same in all rows, and are computed once for a batch
                (CommonBeginning). With dropout its masks are then the same in all rows too: the expected gradient stays what it was.

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
from model import Cache
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
    """A Row; a prompt that is too long loses its middle, since the instruction is at its beginning and "Answer:" at its end."""
    ids, answer = encode_pair(tokenizer, prompt, answer)
    answer = answer[:context // 2] + [i for i in [tokenizer.end] if i is not None]
    room = context - len(answer)
    if len(ids) > room:
        ids = ids[:room - room // 2] + ids[len(ids) - room // 2:]
    return Row(ids + answer, len(ids), group)


def pick(rows, count, seed, step):
    """The rows of one step, which depend on the seed and the step alone: every row once in an epoch, rows of the same group and length together."""
    steps = -(-len(rows) // count)  # in an epoch; what its last step lacks is taken from its beginning
    epoch, place = divmod(step, steps)
    random = np.random.default_rng((seed, epoch))
    order = np.resize(random.permutation(len(rows)), steps * count)
    pools = [sorted(order[i:i + POOL * count], key=lambda n: (rows[n].group, len(rows[n].ids))) for i in range(0, len(order), POOL * count)]
    return [rows[i] for i in np.concatenate(pools).reshape(steps, count)[random.permutation(steps)[place]]]


class Batch:
    """The tensors of some rows: what all of them begin with, once, and the rest of each, padded at the right."""

    def __init__(self, rows, share=True, device="cpu"):
        common = min(row.start for row in rows) - 1 if share and len(rows) > 1 else 0  # the prompt's last token predicts: it stays with its row
        first = rows[0].ids
        P = next((i for i in range(common) if any(row.ids[i] != first[i] for row in rows)), common)
        T = max(len(row.ids) for row in rows) - 1 - P
        tokens, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORED, np.int64)
        for row, x, y in zip(rows, tokens, targets):
            x[:len(row.ids) - 1 - P] = row.ids[P:-1]
            y[row.start - 1 - P:len(row.ids) - 1 - P] = row.ids[row.start:]
        self.prefix = torch.tensor(first[:P], dtype=torch.int64, device=device)[None]
        self.tokens, self.targets = (torch.from_numpy(t).to(device) for t in (tokens, targets))
        self.answers = sum(len(row.ids) - row.start for row in rows)  # tokens that are learned
        self.size = sum(len(row.ids) for row in rows)                 # tokens without padding, the common ones in every row

    def hidden(self, model):
        """What the head reads, (B, T, C)."""
        if not self.prefix.shape[1]:
            return model.hidden(self.tokens)
        cache = CommonBeginning(self.tokens.device)
        model.hidden(self.prefix, cache)
        return model.hidden(self.tokens, cache)


class CommonBeginning(Cache):
    """Keys and values of a common beginning, in place of model.KVCache: made by one row, seen by all, and gradients flow back into them."""

    def __init__(self, device):
        self.end, self.k, self.v, self.device = 0, [], [], device

    def positions(self, T):
        return torch.arange(self.end, self.end + T, device=self.device)

    def mask(self, T):
        """(1, 1, T, P + T), True where the key's place is not after the query's."""
        return torch.ones(1, 1, T, self.end + T, dtype=torch.bool, device=self.device).tril(self.end) if self.end else None

    def update(self, layer, k, v):
        if not self.end:
            self.k.append(k)
            self.v.append(v)
            return k, v
        return tuple(torch.cat((old[layer].expand(len(new), -1, -1, -1), new), 2) for old, new in ((self.k, k), (self.v, v)))

    def advance(self, T):
        self.end = self.end or T


# ----------------------------------------------------------------------------- Alpaca's format

def read_alpaca(path):
    """[(prompt, answer)] of a JSON file: a list of {"instruction", "input" (may be missing), "output"}, or one such object a line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} can't be read ({e})") from None
    pairs = [alpaca_pair(row, f"{path}, {where}") for where, row in json_rows(path, text)]
    if not pairs:
        raise InputError(f"{path} is empty: give rows of {{\"instruction\": ..., \"input\": ..., \"output\": ...}}")
    return pairs


def json_rows(path, text):
    """Yield (where, row) of a JSON list, or of lines of JSON."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"{path} is not JSON: line {e.lineno}, column {e.colno}: {e.msg}") from None
        yield from ((f"row {n}", row) for n, row in enumerate(rows))
        return
    for n, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {n}", json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(f"{path} is not JSON: line {n}, column {e.colno}: {e.msg}") from None


def alpaca_pair(row, where):
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object but {json.dumps(row)[:60]}: it should be {{\"instruction\": ..., \"input\": ..., \"output\": ...}}")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f"{where} has no text as {key!r} (it has {', '.join(map(repr, row)) or 'no keys'}): every row needs instruction and output")
    if not isinstance(row.get("input") or "", str):
        raise InputError(f"{where}: 'input' is {json.dumps(row['input'])[:60]}, it should be text")
    prompt = instruction_prompt(row["instruction"], row["input"]) if row.get("input") else f"Instruction: {row['instruction']}\nAnswer: "
    return prompt, row["output"]


# ----------------------------------------------------------------------------- where no set is at hand

COMPANIES = "Nordvik", "Halden Oyj", "Castra Foods", "Lumera", "Teval Steel", "Ostrava Bank", "Brightwell", "Karo Shipping"
TEMPLATES = {
    "positive": ("{c} 's operating profit rose to EUR {b} mn from EUR {a} mn .", "{c} raised its outlook after sales grew by {a} % .",
                 "{c} won an order worth EUR {b} mn .", "{c} narrowed its loss to EUR {a} mn from EUR {b} mn ."),
    "neutral": ("{c} will publish its interim report at {a} a.m.", "{c} has {b} employees in {a} countries .", "{c} appointed a new head of logistics .",
                "The value of the lease of {c} was not disclosed ."),
    "negative": ("{c} 's operating profit fell to EUR {a} mn from EUR {b} mn .", "{c} cut {b} jobs as demand weakened by {a} % .",
                 "{c} lost an order worth EUR {b} mn .", "{c} 's loss widened to EUR {b} mn from EUR {a} mn ."),
}


def made_up_headlines(count, seed):
    """Examples made of templates and numbers, so that everything can be tried without a download. A model that learns them has learned little."""
    random, rows = np.random.default_rng(seed), []
    for i in range(count):
        label = ("negative", "neutral", "positive")[random.integers(3)]
        a, b = sorted(int(n) for n in random.integers(2, 12, 2) + (0, 12))
        text = TEMPLATES[label][random.integers(4)].format(c=COMPANIES[random.integers(len(COMPANIES))], a=a, b=b)
        rows.append(sentiment_row("made-up headlines", text, label, "news"))
        rows[-1].index = i
    return rows
