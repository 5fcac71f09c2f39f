"""score.py: log-likelihoods against a plain float64 pass over each text and against lm-evaluation-harness, metrics against scikit-learn and seqeval."""
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from harness import harness, harness_model, harness_rows
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import accuracy_score, f1_score

from checkpoint import load_model, save_model
from common.cli import InputError
from common.device import find_device
from common.generate import generate
from common.tokenizer import train_tokenizer
from lowrank import attach_lora
from model import Config, Transformer
from tasks import score, sets
from tasks.sets import Example

@pytest.fixture(scope="module")
def tokenizer(text_file):
    return train_tokenizer([text_file.read_text(encoding="utf-8")], 600)

def answers(model, tokenizer, examples, device, new_tokens):
    """(text, log-likelihoods of the choices, tokens cut) of each example, in their order."""
    found = {}
    for batch in score.score_in_batches(model, tokenizer, examples, device, new_tokens):
        found |= {id(e): (text, scores, cut) for e, scores, text, cut in batch}
    return [found[id(e)] for e in examples]

def label_scores(model, tokenizer, examples, device):
    """log p of every choice of each example, in their order."""
    return [scores for _, scores, _ in answers(model, tokenizer, examples, device, 0)]

@pytest.fixture(scope="module")
def device():
    return find_device("float32")

def random_model(kind="llama", context=256, seed=0):
    torch.manual_seed(seed)
    model = Transformer(Config(kind, vocab_size=600, context=context, blocks=2, heads=4, kv_heads=2 if kind == "llama" else 4, width=32, ffn=48)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model

@torch.no_grad()
def plainly(model, tokenizer, example):
    """log p of every choice: each text by itself, in float64, without any sharing."""
    model, found = model.double(), []
    for context, ending in example.pairs():
        given = tokenizer.encode(context.rstrip())
        ids = tokenizer.encode(context + ending)
        ids, scored = given + ids[len(given):], min(len(ids) - len(given), model.config.context)
        ids = torch.tensor(ids)[-(model.config.context + 1):]
        logp = model(ids[None, :-1])[0].log_softmax(-1)
        found.append(logp[-scored:].gather(1, ids[-scored:, None]).sum().item())
    model.float()
    return found

def agree(model, tokenizer, device, examples):
    for found, example in zip(label_scores(model, tokenizer, examples, device), examples):
        assert found == pytest.approx(plainly(model, tokenizer, example), abs=2e-4), example

# ----------------------------------------------------------------------------- log-likelihoods

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["boolq", "piqa", "winogrande", "fpb", "tfns"])
def test_likelihoods_of_every_task(task, kind, task_data, tokenizer, device):
    agree(random_model(kind), tokenizer, device, sets.load(task, task_data))

@pytest.mark.parametrize("choices", [
    [" yes", " yes it is", " yes it was", " no"],       # one ending is the beginning of another
    [" same", " same"],                                 # two are equal
    [" a much longer ending than the others have", " b"],
    [" only one"]])
def test_endings_of_odd_shapes(choices, tokenizer, device):
    examples = [Example("x", i, f"The answer {'again ' * (3 * i)}is:", choices[0], choices) for i in range(3)]
    agree(random_model(), tokenizer, device, examples)
    agree(random_model(), tokenizer, device, examples[:1])

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_longer_than_the_context_lose_their_beginning(kind, tokenizer, device):
    model = random_model(kind, context=40)
    examples = [Example("x", i, f"The answer {'again and again ' * n}is:", " yes", [" yes, of course", " no"]) for i, n in enumerate((0, 1, 4, 30))]
    agree(model, tokenizer, device, examples)
    cut = {e.index: cut for batch in score.score_in_batches(model, tokenizer, examples, device) for e, _, _, cut in batch}
    whole = max(len(tokenizer.encode(c + x)) for c, x in examples[3].pairs())
    assert cut[0] == cut[1] == 0 and cut[3] == whole - 41

def test_branches_that_do_not_fit_beside_each_other(tokenizer, device):
    """Two endings of 30 tokens each fit a context of 40, one behind the other they do not: positions count, not places."""
    model = random_model("gpt2", context=40)
    examples = [Example("x", 0, "One:", "", [" very large old doors" * n, " quite small new windows" * n]) for n in (1, 2)]
    assert any(all(20 < len(tokenizer.encode(c + x)) <= 40 for c, x in e.pairs()) for e in examples)
    agree(model, tokenizer, device, examples)

def test_batches_do_not_change_the_result(task_data, tokenizer, device, monkeypatch):
    model, examples = random_model(), sets.load("piqa", task_data)
    together = label_scores(model, tokenizer, examples, device)
    monkeypatch.setitem(score.BATCH_TOKENS, "cpu", 1)
    monkeypatch.setitem(score.HEAD_ROWS, "cpu", 3)
    alone = label_scores(model, tokenizer, examples, device)
    assert np.array(together) == pytest.approx(np.array(alone), abs=1e-4)

def test_bfloat16_is_near(task_data, tokenizer, device):
    model, examples = random_model(), sets.load("fpb", task_data)
    near = label_scores(model, tokenizer, examples, find_device("bfloat16"))
    exact = label_scores(model, tokenizer, examples, device)
    assert 0 < np.abs(np.array(near) - np.array(exact)).max() < 0.3

def test_what_rows_share_is_read_once(task_data, tokenizer, device, monkeypatch):
    """The tokens that the model is given: the instruction once, then each row's own, and no ending but its predicting part."""
    model, given, hidden = random_model(), [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, cache=None: given.append(tokens.shape) or hidden(self, tokens, cache))
    examples = sets.load("tfns", task_data)
    label_scores(model, tokenizer, examples, device)
    rows = [score.make_item(e, tokenizer, 256) for e in examples]
    shared = given[0][1]
    assert given[0][0] == 1 and shared > 30 and all(r.trunk[:shared] == rows[0].trunk[:shared] for r in rows)
    own = sum(len(r.trunk) - shared + sum(len(t) - 1 - len(r.trunk) for t in r.texts) for r in rows)
    assert sum(B * T for B, T in given[1:]) <= 1.2 * own
    separately = sum(len(tokenizer.encode(c + x)) - 1 for e in examples for c, x in e.pairs())
    assert sum(B * T for B, T in given) < separately / 5

def test_the_beginning_token_and_moved_spaces():
    class Letters:
        begin = 99

        def encode(self, text):
            return [ord(c) for c in text]
    assert score.encode_pair(Letters(), "ab: ", "c") == ([99, 97, 98, 58], [32, 99])
    row = score.make_item(Example("x", 0, "ab: ", ""), Letters(), 8, room=3)
    assert (row.trunk, row.texts, row.cut) == ([99, 97], [[99, 97, 58, None]], 1)

def test_an_ending_longer_than_the_context_loses_its_beginning_too(tokenizer, device):
    agree(random_model(context=16), tokenizer, device, [Example("x", 7, "a", "", [" and also" * 40, " b"])])

def test_an_ending_without_tokens_is_refused(tokenizer, device):
    with pytest.raises(InputError, match="x, row 7: the ending '' adds no token"):
        label_scores(random_model(), tokenizer, [Example("x", 7, "a", "", ["", " b"])], device)

@pytest.mark.parametrize("task", ["boolq", "piqa", "winogrande"])
def test_the_harness_finds_the_same(task, task_data, tokenizer, device, tmp_path):
    """Its own prompts, its own scoring, the exported model in transformers; BoolQ's longer rows are cut."""
    model = random_model(context=64)
    examples = sets.load(task, task_data)
    found = np.array(label_scores(model, tokenizer, examples, device))
    metrics, theirs = harness(harness_model(model, tokenizer), task, harness_rows(task, task_data, range(len(examples))))
    assert found == pytest.approx(np.array(theirs), abs=1e-3)
    labels = [e.label for e in examples]
    assert metrics["acc"] == np.mean(found.argmax(1) == labels)
    if task == "piqa":
        lengths = np.array([[len(c) - 1 for c in e.choices] for e in examples])
        assert metrics["acc_norm"] == np.mean((found / lengths).argmax(1) == labels)

@pytest.mark.slow
def test_the_harness_finds_the_same_for_smollm2(task_data, device):
    try:
        model, tokenizer = load_model("smollm2-135m")
    except InputError as e:
        pytest.skip(f"smollm2-135m can't be had here: {e}")
    lm = harness_model(model, tokenizer)
    for task in ("boolq", "piqa", "winogrande"):
        examples = sets.load(task, task_data)[:6]
        _, theirs = harness(lm, task, harness_rows(task, task_data, range(6)))
        assert np.array(label_scores(model, tokenizer, examples, device)) == pytest.approx(np.array(theirs), abs=1e-3)

# ----------------------------------------------------------------------------- answers

@pytest.mark.parametrize("context", [256, 64])
def test_answers_are_the_greedy_continuations(context, task_data, tokenizer, device):
    model, examples = random_model(context=context), sets.load("fpb", task_data)
    found = answers(model, tokenizer, [replace(e, choices=[]) for e in examples], device, 8)
    for example, (text, _, _) in zip(examples, found):
        prompt = score.shorten(tokenizer.encode(example.prompt.rstrip()), context - 8)
        ids = [step[0] for step in generate(model, [prompt], 8, temperature=0, stop=tokenizer.stop_ids, use_cache=False, vocabulary=tokenizer.vocab_size)]
        assert text == tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    cut = [lost for _, _, lost in found]
    assert all(cut) if context == 64 else not any(cut)

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["fpb", "fiqa"])
def test_both_ways_from_one_reading(task, kind, task_data, tokenizer, device, monkeypatch):
    model, examples = random_model(kind), sets.load(task, task_data)
    texts = [text for text, *_ in answers(model, tokenizer, [replace(e, choices=[]) for e in examples], device, 8)]
    scores = label_scores(model, tokenizer, examples, device)
    given, hidden = [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, cache=None: given.append(tokens.numel()) or hidden(self, tokens, cache))
    both = answers(model, tokenizer, examples, device, 8)
    assert [t for t, _, _ in both] == texts and np.array([s for _, s, _ in both]) == pytest.approx(np.array(scores), abs=1e-4)
    own = sum(len(r.trunk) for r in (score.make_item(e, tokenizer, 256) for e in examples))
    assert sum(given) < own + 30 * len(examples)

def test_cut_prompts_are_scored_after_what_is_left_of_them(task_data, tokenizer, device):
    model, examples = random_model(context=64), sets.load("fpb", task_data)
    found = [scores for _, scores, _ in answers(model, tokenizer, examples, device, 8)]
    for scores, example in zip(found, examples):
        for value, (given, ending) in zip(scores, (score.encode_pair(tokenizer, *pair) for pair in example.pairs())):
            assert len(given) > 56
            ids = torch.tensor(given[:28] + given[-28:] + ending)  # 64 less 8 new tokens
            with torch.no_grad():
                logp = model(ids[None, :-1])[0].log_softmax(-1)[-len(ending):]
            assert value == pytest.approx(logp.gather(1, ids[-len(ending):, None]).sum().item(), abs=2e-4)

def test_an_answer_takes_at_most_half_of_the_context(tokenizer, device):
    ((text, _, _),) = answers(random_model(context=32), tokenizer, [Example("x", 0, "a", "")], device, 64)
    assert 0 < len(tokenizer.encode(text)) <= 17

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("budget, context", [(2048, 256), (300, 256), (2048, 64)])
def test_scores_and_texts_from_one_cache(budget, context, kind, task_data, tokenizer, device, monkeypatch):
    """Scores as of a whole pass in float64 without any cache, texts as read anew for every token."""
    model = random_model(kind, context)
    examples = sets.load("fpb", task_data) + sets.load("fiqa", task_data)
    monkeypatch.setitem(score.BATCH_TOKENS, "cpu", budget)
    both = answers(model, tokenizer, examples, device, 8)
    labels = label_scores(model, tokenizer, examples, device)
    for example, (text, scores, _), label in zip(examples, both, labels):
        prompt = score.shorten(tokenizer.encode(example.prompt.rstrip()), context - 8)
        steps = generate(model, [prompt], 8, temperature=0, stop=tokenizer.stop_ids, use_cache=False,
                         vocabulary=tokenizer.vocab_size)
        ids = [step[0] for step in steps]
        assert text == tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]).split("Answer: ")[0]
        exact = plainly(model, tokenizer, example)
        assert label == pytest.approx(exact, abs=2e-4)
        assert context == 64 or scores == pytest.approx(exact, abs=2e-4)

@pytest.mark.parametrize("bits", [16, 8])
def test_keys_are_of_the_dtype_that_the_model_computes_in(bits, task_data, tokenizer, device, tmp_path):
    save_model(tmp_path / "model", random_model(), tokenizer)
    examples = sets.load("fpb", task_data)
    exact = label_scores(load_model(tmp_path / "model", bits=bits)[0], tokenizer, examples, device)
    model, _ = load_model(tmp_path / "model", dtype=torch.bfloat16, bits=bits)
    attach_lora(model, r=2, alpha=4)
    for where in (find_device("bfloat16"), device):  # with autocast, and without
        near = [scores for _, scores, _ in answers(model.to(where.dtype), tokenizer, examples, where, 4)]
        assert np.abs(np.array(near) - np.array(exact)).max() < 0.5

# ----------------------------------------------------------------------------- metrics

@pytest.mark.parametrize("seed, classes", [(0, 2), (1, 3), (2, 3), (3, 5)])
def test_f1_and_accuracy_are_those_of_scikit_learn(seed, classes):
    draw = np.random.default_rng(seed)
    labels, predictions = draw.integers(0, classes, 60), draw.integers(0, max(1, classes - seed % 2), 60)
    rows = score.confusion(labels, predictions, classes)  # for odd seeds some label is never given
    mean = dict(average="weighted", zero_division=0)
    assert score.weighted_f1(rows.sum(0)) == pytest.approx(f1_score(labels, predictions, **mean))
    assert score.accuracy(rows.sum(0)) == pytest.approx(accuracy_score(labels, predictions))
    commonest = [np.bincount(labels).argmax()] * 60
    assert score.majority(rows, score.weighted_f1) == pytest.approx(f1_score(labels, commonest, **mean))
    assert score.majority(rows, score.accuracy) == pytest.approx(accuracy_score(labels, commonest))

def test_entity_f1_is_that_of_seqeval():
    right = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-LOC", "I-LOC"], ["O", "O"]]
    given = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O"], ["B-O", "O"]]
    counts = [0, 0, 0]
    for r, g in zip(right, given):
        r, g = set(sets.entities(r)), set(sets.entities(g))
        counts = np.add(counts, [len(r & g), len(r), len(g)])
    assert score.entity_f1(counts) == pytest.approx(seqeval_f1(right, given)) == pytest.approx(2 / 7)
    assert score.entity_f1(np.array([0, 0, 0])) == 0

def test_intervals_are_those_of_the_binomial():
    rows = score.confusion([1] * 400, [1] * 300 + [0] * 100, 2)
    exact = scipy.stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert score.bootstrap(rows, score.accuracy) == pytest.approx(exact, abs=0.006)
    rows = np.stack((np.arange(400) < 300, np.ones(400)), 1)
    assert score.bootstrap(rows, lambda s: s[..., 0] / s[..., 1]) == pytest.approx(exact, abs=0.006)

@pytest.mark.parametrize("only_first, only_second", [(0, 0), (3, 1), (10, 25), (0, 6), (200, 150)])
def test_mcnemar_is_the_exact_binomial_test(only_first, only_second):
    first = np.array([True] * only_first + [False] * only_second + [True, False])
    second = np.array([False] * only_first + [True] * only_second + [True, False])
    n = only_first + only_second
    exact = scipy.stats.binomtest(only_first, n, 0.5).pvalue if n else 1.0
    assert score.mcnemar(first, second) == pytest.approx(exact)

def test_paired_bootstrap_sees_what_is_paired():
    """A gain of 5% of the rows is no chance where only those rows differ, and could be chance where they are unrelated."""
    mean = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    right = np.random.default_rng(0).random(300) < 0.5
    better = right | (np.arange(300) % 20 == 0)
    rows = lambda x: np.stack((x, np.ones(len(x))), 1)  # noqa: E731
    low, high, p = score.paired_bootstrap(rows(right), rows(better), mean)
    assert 0 < low < better.mean() - right.mean() < high and p < 0.01
    low, high, p = score.paired_bootstrap(rows(right), rows(np.random.default_rng(1).permutation(right)), mean)
    assert low < 0 < high and p > 0.05
    assert math.isclose(score.paired_bootstrap(rows(right), rows(right), mean)[2], 1.0)
