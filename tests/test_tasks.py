"""tasks/sets.py: formats, labels, splits (against the `datasets` library), prompts, odd answers."""
import io
import json
import shutil

import datasets
import numpy as np
import pandas
import pytest
from seqeval.metrics.sequence_labeling import get_entities

from common.cli import InputError
from tasks import sets
from tasks.rows import read_alpaca
from tasks.sets import PHRASES, load, read_entities, read_sentiment

INSTRUCTION = ("Instruction: What is the sentiment of this news? Please choose an answer from "
               "{negative/neutral/positive}.\nInput: ")

@pytest.fixture
def data(task_data, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(task_data, tmp_path / "data")

def test_prompts_of_the_harness(task_data):
    row = load("boolq", task_data)[4]
    assert row.prompt == "This pan -- " * 5 + "\nQuestion: is the pan number 4?\nAnswer:"
    assert row.pairs() == [(row.prompt, " no"), (row.prompt, " yes")]
    assert (row.label, row.answer) == (1, " yes")
    row = load("piqa", task_data)[1]
    prompt = "Question: How do I clean a green lamp?\nAnswer:"
    endings = [" Use the door slowly.", " Use the very old book, slowly at night."]
    assert row.pairs() == [(prompt, ending) for ending in endings]
    assert row.label == 1
    row = load("winogrande", task_data)[0]
    assert row.pairs() == [("The cup hid the very old book because the cup", " was big."),
                           ("The cup hid the very old book because the very old book", " was big.")]
    assert (row.label, row.answer) == (0, "cup")

def test_prompts_and_labels_of_fingpt(task_data):
    rows = {e.index: e for split in ("train", "test") for e in load("fpb", task_data, split)}
    assert rows[0].prompt == INSTRUCTION + "Profit of Mäkinen Oyj @ cup was 0 mn .\nAnswer: "
    assert [rows[i].answer for i in range(4)] == ["positive", "neutral", "negative", "neutral"]
    assert all(e.choices[e.label] == e.answer for e in rows.values())
    rows = {e.index: e for split in ("train", "test") for e in load("tfns", task_data, split)}
    assert [rows[i].answer for i in range(3)] == ["negative", "positive", "neutral"]
    assert '"cup"\nfalls' in rows[0].prompt and "this tweet?" in rows[0].prompt
    rows = {e.index: e for split in ("train", "test") for e in load("fiqa", task_data, split)}
    assert len(rows) == 2 * (36 + 18)
    assert [rows[i].answer for i in range(3)] == ["negative", "neutral", "neutral"]  # 1 and 2 are of one text
    assert "this news?" in rows[0].prompt and "this tweet?" in rows[54].prompt

@pytest.mark.parametrize("value, label", [(-0.1001, "negative"), (-0.1, "neutral"), (0.0999, "neutral"),
                                          (0.1, "positive"), ("1", "positive"), (-1, "negative")])
def test_scores_of_fiqa(value, label, data):
    for name in ("headline", "post"):
        entry = dict(sentence="x", info=[dict(sentiment_score=value)])
        (data / "fiqa" / f"task1_{name}_ABSA_train.json").write_text(json.dumps({"7": entry}))
    assert [e.answer for e in load("fiqa", data) + load("fiqa", data, "train")] == [label] * 2

@pytest.mark.parametrize("count, share", [(4846, 0.25), (1213, 0.226), (954, 0.226), (10, 0.25), (7, 0.25)])
def test_splits_are_those_of_datasets(count, share):
    theirs = datasets.Dataset.from_dict(dict(i=list(range(count)))).train_test_split(share, seed=42)
    test, train = sets.split_rows(count, share)
    assert test == theirs["test"]["i"][:] and train == theirs["train"]["i"][:]

def test_splits_share_no_row_and_have_all(task_data):
    for task in sets.TEST_SHARE:
        train, test = ({e.index for e in load(task, task_data, split)} for split in ("train", "test"))
        assert not train & test and sorted(train | test) == list(range(len(train) + len(test)))

def test_a_test_file_of_its_own_is_used(data, capsys):
    train = load("ner", data, "train")
    assert len(train) == 27 and "held out" not in capsys.readouterr().out
    load("ner", data)
    assert "FIN3.txt is not in" in capsys.readouterr().out
    (data / "ner" / "FIN3.txt").write_text("Rome NNP - I-LOC\n")
    assert [e.answer for e in load("ner", data)] == ["Rome is a location."]
    assert len(load("ner", data, "train")) == 36

def test_sample_is_seeded(task_data):
    rows = load("piqa", task_data)
    some = sets.draw(rows, 10)
    assert len(some) == 10 and some == sets.draw(rows, 10) and some != sets.draw(rows, 10, seed=1)
    assert sets.draw(rows, 99) is rows
    assert [e.index for e in some] == sorted(e.index for e in some)

# ----------------------------------------------------------------------------- NER

def test_entities_of_the_file(task_data):
    row = next(e for e in load("ner", task_data, "train") if e.words[2] == "Koch1")
    assert row.prompt == ("Instruction: Please extract entities and their types from the input sentence, "
                          "entity types should be chosen from {person/organization/location}.\n"
                          "Input: Ms Anna Koch1 of Acme Paris .\nAnswer: ")
    assert row.answer == "Anna Koch1 is a person, Acme is an organization, Paris is a location."
    assert row.tags == ["O", "I-PER", "I-PER", "O", "I-ORG", "I-LOC", "O"]
    assert read_entities(row.words, row.answer) == (["O", "B-PER", "I-PER", "O", "B-ORG", "B-LOC", "O"], True)
    assert [(k, a, b - 1) for k, a, b in sets.entities(row.tags)] == get_entities(row.tags)

@pytest.mark.parametrize("tags", [["I-PER", "I-PER", "O"], ["O", "I-LOC"], ["I-ORG", "I-LOC", "I-LOC"],
                                  ["I-ORG", "B-ORG", "I-ORG"], ["B-PER", "I-PER", "I-ORG"],
                                  ["B-O", "I-O", "B-O", "O", "I-O"]])
def test_entities_are_those_of_seqeval(tags):
    assert [(k, a, b - 1) for k, a, b in sets.entities(tags)] == get_entities(tags)

@pytest.mark.parametrize("text, tags, named", [
    ("", "O O O O O", False),
    ("Koch is a person.", "O O O O O", True),  # not as a word of its own
    ("anna KOCH1 is a person, acme is an organization", "B-PER I-PER O B-ORG O", True),
    ("Acme is a company.", "O O O B-O O", True),  # an unknown type is an entity that is wrong
    ("Acme is a person, Acme is an organization.", "O O O B-PER O", True),  # its place is taken
    ("Paris is a location, Paris is a location", "O O O O B-LOC", True),
    ("Acme ist eine Firma; is a person", "O O O O O", True),
    (" is a person", "O O O O O", False),
    ("Acme is an organization\nInstruction: more, Paris is a location", "O O O O B-LOC", True)])
def test_odd_entity_answers(text, tags, named):
    assert read_entities(["Anna", "Koch1", "of", "Acme", "Paris"], text) == (tags.split(), named)

@pytest.mark.parametrize("text, label, parsed", [
    ("positive", "positive", True), (" Negative.", "negative", True), ("neutral", "neutral", True),
    ("", "neutral", False), ("negative or positive", "positive", True),
    ("neutral, rather negative", "negative", True), ("POSITIVE", "neutral", False),
    ("nEGATIVE", "neutral", False), ("positiv", "neutral", False),
    ("积极", "neutral", False), ("The sentiment is Positive", "positive", True),
    ("not positive", "positive", True), ("\n\n", "neutral", False), ("Neutral", "neutral", True)])
def test_odd_sentiments(text, label, parsed):
    assert read_sentiment(text) == (label, parsed)

# ----------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("task, name, content, message", [
    ("boolq", "dev.jsonl", '{"question": "a", "passage": "b", "answer": true}\n{"question": "a"',
     "dev.jsonl, line 2 can't be read as JSON"),
    ("boolq", "dev.jsonl", '{"question": "a", "passage": "b", "answer": "yes"}',
     "dev.jsonl, line 1: it needs 'answer', a bool"),
    ("boolq", "dev.jsonl", "\n", "boolq: there is no row in"),
    ("piqa", "valid-labels.lst", "0\n2\n" * 18, "labels.lst, line 2: it must be 0 or 1, got '2'"),
    ("piqa", "valid-labels.lst", "0\n1\n", "valid-labels.lst has 2 labels for 36 rows in valid.jsonl"),
    ("piqa", "valid.jsonl", "[]\n", "valid.jsonl, line 1: it needs 'goal', a str"),
    ("winogrande", "dev.jsonl", '{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}',
     "line 1: it needs a _"),
    ("fpb", PHRASES, "fine .@good\n", "Sentences_50Agree.txt, line 1: it must end with @"),
    ("fpb", PHRASES, "", "fpb: there is no row"),
    ("fiqa", "task1_post_ABSA_train.json", '{"7": {"sentence": "x", "info": [{"sentiment_score": "up"}]}}',
     "post_ABSA_train.json, entry '7' can't be read .ValueError"),
    ("fiqa", "task1_post_ABSA_train.json", '{"7": {"sentence": "x", "info": [{"sentiment_score": NaN}]}}',
     "entry '7': it needs a sentence, and a sentiment_score in -1..1"),
    ("fiqa", "task1_headline_ABSA_train.json", '{"7": {\n"sentence": }}',
     "headline_ABSA_train.json can't be read as JSON .*line 2 column 13"),
    *[("fiqa", "task1_post_ABSA_train.json",
       '{"7": {"sentence": "x", "info": [{"sentiment_score": %s}]}}' % bad, "entry '7'") for bad in (
        "45", "true", "null", "[]", '"nan"', '"0,35"', '""', "1" * 400)],
    ("fiqa", "task1_post_ABSA_train.json", '{"7": %s}' % ("1" * 5000), "can't be read as JSON"),
    ("fiqa", "task1_post_ABSA_train.json", "[" * 100_000, "can't be read as JSON"),
    ("fiqa", "task1_post_ABSA_train.json", '{"7": {"sentence": "x", "info": []}}', "needs a sentence, and"),
    ("fiqa", "task1_post_ABSA_train.json", '{"7": {"sentence": 3, "info": [{"sentiment_score": "1"}]}}',
     "needs a sentence, and a sentiment_score"),
    ("fiqa", "task1_headline_ABSA_train.json", "[]", "headline_ABSA_train.json holds no JSON object"),
    ("tfns", "sent_train.csv", "text,label\na,0\nb,3\n", "row 3: it must be a text and a label"),
    ("tfns", "sent_train.csv", 'text,label\n"open,1\n' + "tweet,1\n" * 20_000, "sent_train.csv can't be read as CSV .Error: field larger than"),
    ("tfns", "sent_train.csv", 'text,label\n"open,1\nmore,0\n', "read as CSV .Error: unexpected end of data"),
    ("tfns", "sent_train.csv", "text;label\na;0\n", "the first line must be text,label"),
    ("tfns", "sent_train.csv", "a,0\n", "sent_train.csv: the first line must be text,label"),
    ("ner", "FIN5.txt", "Anna NNP - I-PER\nKoch I-PER\n", "FIN5.txt, line 2: it must be a word"),
    ("ner", "FIN5.txt", "Anna\xa0NNP - I-PER\n", "FIN5.txt, line 1: it must be a word"),
    ("ner", "FIN5.txt", "Anna NNP - I-FOO\n", "FIN5.txt, line 1: it must be a word")])
def test_malformed_rows_are_named(task, name, content, message, data):
    (data / task / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as refused:
        load(task, data)
    assert "\n" not in str(refused.value)

@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig"])  # latin-1 where there is no "…" or "’"
@pytest.mark.parametrize("text", ["Pöyry 's sales rose .", "Ålandsbanken’s profit fell .", "two…parts"])
def test_phrasebank_in_either_encoding(encoding, text, data):
    (data / "fpb" / PHRASES).write_bytes((f"{text}@positive\r\n" * 8).encode(encoding))
    rows = load("fpb", data, "train") + load("fpb", data)
    assert [row.prompt for row in rows] == [INSTRUCTION + text + "\nAnswer: "] * 8

@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\xa0", "\u3000"])
def test_only_a_line_feed_ends_a_line_and_only_spaces_and_tabs_part_columns(odd, data):
    row = json.dumps(dict(question="a", passage=f"b{odd}c", answer=True), ensure_ascii=False)
    (data / "boolq" / "dev.jsonl").write_text(f"{row}\n" * 3, encoding="utf-8")
    assert [e.prompt for e in load("boolq", data)] == [f"b{odd}c\nQuestion: a?\nAnswer:"] * 3
    for encoding in ("utf-8", "utf-16"):
        (data / "fpb" / PHRASES).write_bytes(f"b{odd}c@neutral\r\n".encode(encoding) * 1)
        assert load("fpb", data)[0].prompt == f"{INSTRUCTION}b{odd}c\nAnswer: "
    (data / "tfns" / "sent_train.csv").write_text(f'text,label\nb{odd}c,1\n', encoding="utf-8")
    assert f"Input: b{odd}c\n" in load("tfns", data)[0].prompt
    (data / "ner" / "FIN5.txt").write_text(f"New{odd}York\tNNP  - I-LOC\n. . - O\n", encoding="utf-8")
    row = load("ner", data)[0]
    assert row.words == [f"New{odd}York", "."] and row.answer == f"New{odd}York is a location."
    assert read_entities(row.words, row.answer)[0] == ["B-LOC", "O"]

def test_test_rows_that_training_has_too_are_marked(data):
    lines = [f"sentence {i} .@neutral\n" for i in range(40)]
    lines[30] = lines[31] = lines[32] = lines[33] = lines[0]
    (data / "fpb" / PHRASES).write_text("".join(lines))
    learned = {e.prompt for e in load("fpb", data, "train")}
    test = load("fpb", data)
    assert [e.seen for e in test] == [e.prompt in learned for e in test]
    assert {e.index for e in test if e.seen} <= {0, 30, 31, 32, 33} and any(e.seen for e in test)
    assert not any(e.seen for e in load("boolq", data))

# What is put into a file or cut out of it
PIECES = [b"", b"\n", b"\r", b"\r\n", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\0", b"\xe2\x80\xa8",
          b"\xc2\xa0", b'"', b"'", b",", b"{", b"}", b"[" * 2000, b"]", b":", b"@", b"_", b" ", b"\t", b"9" * 5000, b"-1e999",
          b"NaN", b"null", b"true", b"\\", b"\\ud800", b"\\u0000", b"I-ORG", b"O", b"positive",
          b"\x1f\x8b\x08", b"PK\3\4", b"\xed\xa0\x80"]

def read_otherwise(task, content):
    """The texts in the rows of a file, by other readers than ours; None where there is none."""
    if task == "boolq":
        rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        return [row["passage"] for row in rows]
    if task == "tfns" and b"\r" not in content.replace(b"\r\n", b""):  # which alone ends a line for pandas
        return list(pandas.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False).text)
    if task == "ner":
        sentences = [[]]
        for line in content.decode("utf-8-sig").replace("\r\n", "\n").split("\n"):
            columns = [column for column in line.replace("\t", " ").split(" ") if column]
            if columns:
                sentences[-1].append((columns[0], columns[3]))
            else:
                sentences.append([])
        named = [s for s in sentences if any(tag[2:] in ("PER", "ORG", "LOC") for _, tag in s)]
        return [" ".join(word for word, _ in s) for s in named]
    return None

@pytest.mark.parametrize("task", [*sets.TASKS, "alpaca"])
def test_nothing_but_an_input_error_is_raised_for_a_damaged_file(task, data):
    """3,000 small mutations of each file of a set, of a fixed seed; what is read is what others read in it."""
    random = np.random.default_rng(0)
    rows = [dict(instruction=f"Add {i}.", input="1" * (i % 2), output=str(i)) for i in range(8)]
    (data / "alpaca").mkdir()
    (data / "alpaca" / "list.json").write_text(json.dumps(rows, indent=1))
    (data / "alpaca" / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    read = compared = 0
    for path in sorted(p for p in (data / task).rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for _ in range(3000):
            content = whole
            for _ in range(random.integers(1, 4)):
                start = int(random.integers(len(content) + 1))
                end = start + int(random.choice([0, 0, 1, 2, 40]))
                content = content[:start] + PIECES[random.integers(len(PIECES))] + content[end:]
            path.write_bytes(content)
            try:
                examples = read_alpaca(path) if task == "alpaca" else load(task, data)
            except InputError as e:
                assert "\n" not in str(e), repr(str(e))
                continue
            read += 1
            assert all(e.prompt and isinstance(e.prompt, str) and isinstance(e.answer, str) for e in examples)
            plain = not content.startswith((b"\xff", b"\xfe", b"\x1f\x8b"))
            texts = read_otherwise(task, content) if plain else None
            if texts is not None:
                rows = list(getattr(sets, task)(data / task))
                assert len(texts) == len(rows), content
                assert all(text in row.prompt for text, row in zip(texts, rows)), content
                compared += 1
        path.write_bytes(whole)
    assert read > 20, "most mutations are seen, not all"
    assert (compared > 20) == (task in ("boolq", "tfns", "ner"))

def test_text_of_another_encoding_is_named(data):
    (data / "boolq" / "dev.jsonl").write_bytes(b'{}\n{"question": "\xe9"}\n')
    with pytest.raises(InputError, match="dev.jsonl is not UTF-8 text .*0xe9"):
        load("boolq", data)

def test_a_task_without_training_rows(task_data):
    with pytest.raises(InputError, match="boolq: there is no row in .* to train with"):
        load("boolq", task_data, "train")
