"""Batches compute what single rows compute; gradients are PEFT's; runs are repeatable, go on where they were, and say what is wrong with their input."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn
from transformers import AutoModelForCausalLM

import eval as evaluation
import finetune
from checkpoint import load_model, replace_model, save_model
from common.adapters import base_id, load_adapter, our_name, read_adapter, save_adapter, take_off
from common.cli import InputError
from common.device import find_device
from common.formats import export
from common.loss import head_loss
from common.storage import read_state
from common.tokenizer import train_tokenizer
from lowrank import LoRALinear, attach_lora, replace_linears
from model import Config, Transformer
from quant import quantize
from recompute import MODES, use_recompute
from tasks import score, sets
from tasks.rows import Batch, Row, encode, made_up_headlines, pick, read_alpaca

CONFIG = Config("llama", vocab_size=400, context=128, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)
QUIET = ["--eval-limit", "0", "--batch-size", "4", "--data-dir", "/nowhere"]
SETTINGS = dict(dtype="float32", log_interval=1, eval_rows=8)

def call(*args, **settings):
    return finetune.main([str(a) for a in args], **SETTINGS | settings)

@pytest.fixture(scope="module")
def base(tmp_path_factory, text_file):
    """A random model with a tokenizer that knows the headlines."""
    path = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_model(path, model, train_tokenizer([e.prompt + e.answer + "\n" for e in made_up_headlines(300, 1)] + [text_file.read_text()[:50_000]], 400))
    return path

def make_rows(shared=9, lengths=(6, 9, 12, 7), answers=2, group=""):
    random = torch.Generator().manual_seed(0)
    def ids(n):
        return torch.randint(400, (n,), generator=random).tolist()
    begin = ids(shared)
    return [Row(begin + ids(n), shared + n - answers, group) for n in lengths]

def adapted(layers="dense", targets=("q", "k", "v"), dropout=0.0):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    if layers != "dense":
        quantize(model, 8 if layers == "int8" else 4)
    attach_lora(model, 4, 8, targets, dropout)
    for m in model.modules():
        if isinstance(m, LoRALinear):
            nn.init.normal_(m.B, std=0.2)
    return model.train()

def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

# ----------------------------------------------------------------------------- batches

@pytest.mark.parametrize("layers", ["dense", "int8", "int4"])
@pytest.mark.parametrize("rows", [make_rows(), make_rows(shared=0), make_rows(lengths=(5,)), make_rows(shared=2, lengths=(3, 3), answers=2)],
                         ids=["shared", "nothing shared", "one row", "short"])
def test_a_batch_has_the_loss_and_gradients_of_its_rows(rows, layers):
    model = adapted(layers)
    batch = Batch(rows)
    loss = head_loss(model.head, batch.hidden(model), batch.targets)
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    total = sum(F.cross_entropy(model(torch.tensor([r.ids[:-1]]))[0, r.start - 1:], torch.tensor(r.ids[r.start:]), reduction="sum") for r in rows)
    (total / sum(len(r.ids) - r.start for r in rows)).backward()
    assert loss.item() == pytest.approx(total.item() / batch.answers, rel=1e-5)
    wanted = gradients(model)
    assert mine.keys() == wanted.keys() == {n for n, _ in model.named_parameters() if n.endswith((".A", ".B"))}
    for name in wanted:
        assert (mine[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-8, name
    assert batch.size == sum(len(r.ids) for r in rows) and batch.prefix.shape[1] == (9 if rows[0].start > 12 and len(rows) > 1 else batch.prefix.shape[1])

@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_recompute_has_the_same_gradients(mode):
    found = []
    for m in ("sdpa", mode):
        model = use_recompute(adapted(dropout=0.2), m)
        torch.manual_seed(3)
        batch = Batch(make_rows(), share=False)
        head_loss(model.head, batch.hidden(model), batch.targets).backward()
        found.append(gradients(model))
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-4, atol=1e-7) for n in found[0])

def test_gradients_on_a_quantized_base_are_pefts_on_the_same_weights(tmp_path):
    model = adapted("int8")
    save_adapter(tmp_path / "adapter", model, "base", "id")
    bare = adapted("int8")
    take_off(bare)
    export(bare, None, tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    rows, width = make_rows(), 21
    tokens = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows])
    labels = torch.tensor([[-100] * r.start + r.ids[r.start:] + [-100] * (width - len(r.ids)) for r in rows])
    attention = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows])
    theirs = reference(input_ids=tokens, attention_mask=attention, labels=labels).loss
    theirs.backward()
    batch = Batch(rows)
    loss = head_loss(model.head, batch.hidden(model), batch.targets)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine = gradients(model)
    for name, p in reference.named_parameters():
        if p.requires_grad:
            layer, letter = our_name(name.replace(".default", ""))
            assert (mine[f"{layer}.{letter}"] - p.grad).norm() <= 1e-4 * p.grad.norm(), name

def test_nothing_frozen_gets_a_gradient_and_nothing_below_the_first_adapter_is_in_the_graph():
    model = adapted()
    inputs = []
    model.blocks[0].norm1.register_forward_hook(lambda m, x, y: inputs.append(y.requires_grad))
    batch = Batch(make_rows())
    head_loss(model.head, batch.hidden(model), batch.targets).backward()
    assert inputs == [False, False]
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith((".A", ".B")))

def test_layers_with_the_same_input_share_a_dropout_mask():
    one, two = (LoRALinear(nn.Linear(64, 64), 4, 8, dropout=0.5).train() for _ in range(2))
    x = torch.ones(32, 64)
    assert one.dropped(x) is two.dropped(x) and 0.4 < (one.dropped(x) == 0).float().mean() < 0.6
    assert not torch.equal(one.dropped(torch.ones(32, 64)), one.dropped(x))  # another tensor, another mask
    assert one.eval().dropped(x) is x

def test_an_epoch_has_every_row_once_and_little_padding():
    rows = make_rows(shared=20, lengths=torch.randint(5, 60, (640,), generator=torch.Generator().manual_seed(1)).tolist())
    steps = [pick(rows, 16, 1, s) for s in range(40)]
    assert sorted(id(r) for step in steps for r in step) == sorted(map(id, rows))
    places = sum(len(step) * max(len(r.ids) for r in step) for step in steps)
    assert places < 1.08 * sum(len(r.ids) for r in rows)
    again = [pick(rows, 16, 1, s) for s in (40, 41)]
    assert [list(map(id, s)) for s in again] != [list(map(id, s)) for s in steps[:2]]  # the next epoch has another order
    assert list(map(id, pick(rows, 16, 1, 7))) == list(map(id, steps[7])) != list(map(id, pick(rows, 16, 2, 7)))
    assert len(pick(rows[:3], 16, 1, 0)) == 16  # fewer rows than a batch: some come again

def test_rows_are_the_tokens_that_are_scored(base):
    tokenizer = load_model(base)[1]
    example = made_up_headlines(1, 0)[0]
    row = encode(tokenizer, example.prompt, example.answer, 512)
    scored = score.make_item(example, tokenizer, 512)
    given, ending = score.encode_pair(tokenizer, example.prompt, example.answer)
    assert row.ids == given + ending + [tokenizer.end] and row.start == len(given)
    assert row.ids[:row.start] == scored.texts[0][:row.start]
    cut = encode(tokenizer, example.prompt, example.answer, 24)
    assert len(cut.ids) == 24 and cut.ids[cut.start:] == row.ids[row.start:]
    assert cut.ids[:5] == row.ids[:5] and cut.ids[cut.start - 5:cut.start] == row.ids[row.start - 5:row.start]

# ----------------------------------------------------------------------------- the command

def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({r["step"] for r in rows}) == len(rows)
    return {r["step"]: r["loss"] for r in rows}

def test_it_learns_scores_and_leaves_an_adapter(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("--base", base, "--max-iters", 100, "--targets", "q,k,v,o,gate,up,down", "--rank", 16, "--lr", "1e-2", "--eval-limit", 60,
                "--out-dir", out, "--batch-size", 16, "--data-dir", "/nowhere", dropout=0.0) == 0
    text, summary = capsys.readouterr().out, json.loads((out / "summary.json").read_text())
    assert "made up from templates" in text and "before: made-up weighted F1" in text
    assert summary["f1_after"] > summary["f1_before"] + 0.2 and summary["scores_after"]["made-up"]["rows"] == 60
    found = losses(out)
    assert found[100] < 0.7 * found[1]
    adapter = read_adapter(out)
    assert f" {summary['trainable_parameters']:,} parameters" in str(adapter) and adapter.base_id == summary["base_id"]
    assert adapter.rank == 16
    assert (out / "loss.png").exists() and "900 rows to learn from, 300 held out" in text
    for key in ("tokens_per_second", "peak_memory_bytes", "seconds", "devices", "device_hours"):
        assert summary[key] > 0
    model, tokenizer = load_model(base, bits=8)  # what the summary says of the saved adapter can be had again from the folder
    load_adapter(model, out, base_id(base))
    examples = sets.draw(made_up_headlines(1200, 0)[:300], 60)
    found = evaluation.score_task(model.eval(), tokenizer, find_device("float32"), "made-up", examples)
    batches = score.score_in_batches(model, tokenizer, examples, find_device("float32"))
    rows = [(e.label, max(range(3), key=scores.__getitem__)) for batch in batches for e, scores, _, _ in batch]
    f1 = f1_score(*zip(*rows), average="weighted")
    assert found["likeliest"]["f1"] == pytest.approx(f1)
    assert f1 == pytest.approx(summary["f1_after"], abs=0.02)

@pytest.mark.parametrize("bits", [8, 4, 16])
def test_n_and_n_steps_are_2n(base, tmp_path, bits):
    common = ["--base", str(base), "--bits", str(bits), "--max-iters", "6", *QUIET]
    assert call(*common, "--out-dir", tmp_path / "whole") == 0
    assert call(*common, "--out-dir", tmp_path / "halves", stop_at=3) == 0
    assert finetune.main(["--resume", "--out-dir", str(tmp_path / "halves"), "--data-dir", "/nowhere"]) == 0
    whole, halves = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert whole == halves and sorted(whole) == [1, 2, 3, 4, 5, 6]
    a, b = read_adapter(tmp_path / "whole"), read_adapter(tmp_path / "halves")
    assert all(torch.equal(x, y) for n in a.factors for x, y in zip(a.factors[n], b.factors[n]))

@pytest.mark.parametrize("method", ["full", "last-block", "head"])
def test_what_a_method_names_learns_as_in_transformers_and_goes_on_where_it_was(base, tmp_path, method):
    common, out = ["--base", base, "--method", method, "--max-iters", "4", "--lr", "1e-2", *QUIET], tmp_path / "whole"
    assert call(*common, "--out-dir", out) == 0
    assert call(*common, "--out-dir", tmp_path / "halves", stop_at=2) == 0
    assert finetune.main(["--resume", "--out-dir", str(tmp_path / "halves"), "--data-dir", "/nowhere"]) == 0
    assert losses(out) == losses(tmp_path / "halves")
    (before, tokenizer), (model, _) = load_model(base), load_model(out)
    old = dict(before.named_parameters()) | {"head.weight": before.head.weight}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    last = f"blocks.{CONFIG.blocks - 1}."
    named = {"full": lambda name: True, "last-block": lambda name: name.startswith((last, "norm.")), "head": lambda name: name == "head.weight"}
    assert changed == {name for name, _ in model.named_parameters() if named[method](name)}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(dict(model.named_parameters())[name].numel() for name in changed)

    export(before, tokenizer, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    if method == "head":
        theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    learning = {"full": theirs, "last-block": nn.ModuleList([theirs.model.layers[-1], theirs.model.norm]), "head": theirs.lm_head}[method]
    theirs.requires_grad_(False)
    learning.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    args = SimpleNamespace(**summary["arguments"])
    rows = finetune.Data(args, tokenizer, CONFIG.context).train
    for step in range(4):
        mine = pick(rows, 4, args.seed, step)
        total = 0.0
        for r in mine:
            total = total + F.cross_entropy(theirs(torch.tensor([r.ids[:-1]])).logits[0, r.start - 1:], torch.tensor(r.ids[r.start:]), reduction="sum")
        optimizer.zero_grad()
        (total / sum(len(r.ids) - r.start for r in mine)).backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = finetune.learning_rate(step, args)
        optimizer.step()
    tokens = torch.arange(1, 60)[None]
    assert torch.allclose(model(tokens), theirs(tokens).logits, atol=2e-3) and not torch.allclose(model(tokens), before(tokens), atol=0.05)

def test_two_processes_have_the_losses_of_one_with_twice_the_accumulation(base, tmp_path, run):
    common = ["--base", base, "--max-iters", "4", *QUIET]
    assert call(*common, "--out-dir", tmp_path / "one", grad_accum=2) == 0
    done = run("finetune.py", *common, "--out-dir", tmp_path / "two", processes=2, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[s] - two[s]) for s in one) < 1e-5
    a, b = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert all(torch.allclose(x, y, atol=1e-5) for n in a.factors for x, y in zip(a.factors[n], b.factors[n]))

def test_two_shards_have_the_losses_of_two_replicas_stopped_and_resumed(base, tmp_path, run):
    """Scores before and after go through the sharded model too; the state is whole: replicas go on with what shards left."""
    common = ["--base", base, "--bits", "16", "--max-iters", "6", *QUIET, "--eval-limit", "12", "--targets", "q,v,down,head"]
    copies, parts = tmp_path / "copies", tmp_path / "parts"
    for args, stop_at in (([*common, "--out-dir", copies], None), ([*common, "--shard", "--recompute", "block", "--out-dir", parts], 2),
                          (["--resume", "--shard", "--recompute", "sdpa", "--out-dir", parts], 4), (["--resume", "--out-dir", parts], 6)):
        done = run("finetune.py", *args, processes=2, settings=dict(SETTINGS, dropout=0.0, stop_at=stop_at))
        assert done.returncode == 0, done.stderr
    one, two = losses(copies), losses(parts)
    assert one.keys() == two.keys() and len(one) == 6 and max(abs(one[s] - two[s]) for s in one) < 1e-5
    a, b = read_adapter(copies), read_adapter(parts)
    assert a.base_id == b.base_id and all(torch.allclose(x, y, atol=1e-5) for n in a.factors for x, y in zip(a.factors[n], b.factors[n]))
    whole, sharded = (json.loads((folder / "summary.json").read_text()) for folder in (copies, parts))
    assert whole["trainable_parameters"] == sharded["trainable_parameters"] and whole["scores_before"] == sharded["scores_before"]
    assert whole["val_loss"] == pytest.approx(sharded["val_loss"], abs=1e-5)

def test_integers_do_not_learn_and_a_head_of_low_rank_does(base, tmp_path):
    replace_model(tmp_path / "int8", *load_model(base, bits=8))
    with pytest.raises(InputError, match="full needs parameters, and the weights of .*int8 are integers: give the model"):
        call("--base", tmp_path / "int8", "--method", "full", "--max-iters", 1, "--out-dir", tmp_path / "out", *QUIET)
    model, tokenizer = load_model(base)
    replace_linears(model, 8, method=2)
    replace_model(tmp_path / "low", model, tokenizer)
    assert call("--base", tmp_path / "low", "--method", "head", "--max-iters", 1, "--out-dir", tmp_path / "out", *QUIET) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["trainable_parameters"] == 8 * (32 + 400)

def test_shards_that_all_learn_have_the_losses_of_one_process(base, tmp_path, run):
    common = ["--base", base, "--method", "full", "--max-iters", "3", *QUIET]
    assert call(*common, "--out-dir", tmp_path / "one", grad_accum=2) == 0
    done = run("finetune.py", *common, "--shard", "--out-dir", tmp_path / "two", processes=2, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[s] - two[s]) for s in one) < 1e-5
    a, b = (dict(load_model(tmp_path / name)[0].named_parameters()) for name in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)

def test_a_quantized_folder_is_not_sharded(base, tmp_path, run):
    replace_model(tmp_path / "int8", load_model(base, bits=8)[0], load_model(base)[1])
    done = run("finetune.py", "--base", tmp_path / "int8", "--bits", "16", "--shard", "--out-dir", tmp_path / "out", *QUIET, processes=2)
    assert done.returncode != 0 and f"error (process 0): --shard needs parameters, and the weights of {tmp_path / 'int8'} are integers" in done.stderr
    assert not (tmp_path / "out").exists()

def start(base, out, *args):
    code = f"import sys, finetune as m; from common.cli import command; command(lambda: m.main(sys.argv[1:], **{SETTINGS!r}))"
    return subprocess.Popen([sys.executable, "-c", code, "--base", base, *QUIET, "--max-iters", "400", "--save-interval", "1", *args, "--out-dir", out],
                            cwd=os.path.dirname(finetune.__file__), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def wait_for_steps(out, count):
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)

def test_a_kill_leaves_a_whole_adapter_and_a_run_that_goes_on(base, tmp_path):
    out = tmp_path / "killed"
    process = start(base, out)
    wait_for_steps(out, 4)
    process.kill()  # it saves after every step, so this is mostly in the middle of a save
    process.communicate()
    read_adapter(out)
    step = read_state(out)[1]["step"]
    assert 1 <= step < 400
    assert finetune.main(["--resume", "--out-dir", str(out), "--data-dir", "/nowhere", "--save-interval", "50"], stop_at=step + 2) == 0
    assert sorted(losses(out)) == list(range(1, step + 3))

def test_ctrl_c_saves_first(base, tmp_path):
    out = tmp_path / "stopped"
    process = start(base, out)
    wait_for_steps(out, 2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by SIGINT after step" in text and "--resume --out-dir" in text
    assert read_state(out)[1]["step"] == max(losses(out))

def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path, monkeypatch):
    real = finetune.head_loss
    calls = []
    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 3 else 1)
    monkeypatch.setattr(finetune, "head_loss", loss)
    with pytest.raises(InputError, match="the loss is nan at step 3: the run stops, .*/state keeps step 2"):
        call("--base", base, "--max-iters", 9, "--save-interval", 1, "--out-dir", tmp_path / "nan", *QUIET, eval_interval=2)
    assert all(torch.isfinite(t).all() for pair in read_adapter(tmp_path / "nan").factors.values() for t in pair)

def test_alpaca_rows_of_a_file(base, tmp_path):
    file = tmp_path / "rows.json"
    rows = [dict(instruction=f"Add {i} and {i}.", input="" if i % 2 else "please", output=str(2 * i)) for i in range(40)]
    file.write_text(json.dumps(rows))
    examples = read_alpaca(file)
    assert [(e.prompt, e.answer) for e in examples[:2]] == [
        ("Instruction: Add 0 and 0.\nInput: please\nAnswer: ", "0"), ("Instruction: Add 1 and 1.\nAnswer: ", "2")]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    assert read_alpaca(lines) == examples
    assert call("--base", base, "--task", file, "--max-iters", 2, "--out-dir", tmp_path / "out", *QUIET) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["f1_after"] is None and summary["val_loss"] > 0

@pytest.mark.parametrize("text, message", [
    ("", "rows.json can't be read as JSON"),
    ("[]", "has no row with text: give rows"),
    ('[{"instruction": "a", "output": "b"},\n {"instruction": "a", "output": ]', "rows.json.* can't be read as JSON .*line 2 column"),
    ('{"instruction": "a", "output": "b"}\n{"instruction": ', "rows.json, line 2 can't be read as JSON"),
    ('{"instruction": "a", "output": "b"}{"instruction": "c", "output": "d"}', "can't be read as JSON .*Extra data"),
    ('[{"conversations": [{"from": "human", "value": "a"}]}]', r'row 0 is ."conversations": .*: it should be ."instruction"'),
    ('{"data": [{"messages": [{"role": "user", "content": "a"}]}]}', r'row 0 is ."messages": .*: it should be ."instruction"'),
    ('{"rows": []}', "row 0 is .*rows.*: it should be"),
    ('[{"instruction": "a", "output": 3}]', "row 0 is .*3.*: it should be .*, each a text"),
    ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "rows.json, row 1 is .*: it should be"),
    ('[{"instruction": "a", "output": "b"}, 7]', "rows.json, row 1 is 7: it should be"),
    ('[{"instruction": "a", "output": "b", "input": ["c"]}]', "rows.json, row 0 is .*: it should be"),
    ('[{"instruction": " ", "output": "b"}]', "has no row with text: give rows"),
    ("instruction,output\na,b\n", "rows.json can't be read as JSON .*line 1"),
])
def test_malformed_rows_are_refused(text, message, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_alpaca(tmp_path / "rows.json")

PAIR = ("Instruction: a\u2028b\nAnswer: ", "c")

@pytest.mark.parametrize("text, pairs", [
    ('[{"instruction": "a\u2028b", "output": "c"}]', [PAIR]),
    ('{"instruction": "a\u2028b", "output": "c", "input": null}\r\n\n' * 2, [PAIR]),
    ('{\n "instruction": "a\u2028b",\n "output": "c"\n}\n', [PAIR]),
    ('{"data": [{"instruction": "a\u2028b", "output": "c", "input": " "}]}', [PAIR]),
    ('\n{\n"data": [\n{"instruction": "a\u2028b", "output": "c"}]}\n', [PAIR]),
    ('[{"prompt": "Q: a\\n", "completion": "A: b"}]', [("Q: a\n", "A: b")]),
])
def test_forms_of_rows_that_are_read(text, pairs, tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "rows.json").write_text(text, encoding=encoding)
        assert [(e.prompt, e.answer) for e in read_alpaca(tmp_path / "rows.json")] == pairs

def test_blank_rows_and_copies_are_left_out_and_counted(tmp_path, capsys):
    """The published file has 28 rows without an output; a row that occurs twice is never on both sides."""
    rows = [dict(instruction=f"Say {i % 40}", input="", output=str(i % 40)) for i in range(80)]
    rows[17] = dict(instruction="Generate a sentence with no words.", input="", output="")
    rows[18]["instruction"] = " "
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    learned, held = finetune.read_task(str(tmp_path / "rows.json"), "/nowhere")
    assert "rows.json: 40 of 80 rows are left out" in capsys.readouterr().out
    assert len(held) == 2 and len(learned) == 38
    assert not {e.prompt for e in held} & {e.prompt for e in learned}
    assert [rows[e.index]["output"] for e in learned] == [e.answer for e in learned]

@pytest.mark.parametrize("prompt, answer", [(20, 30), (20, 60), (60, 20), (60, 62), (60, 90), (3, 90), (62, 1)])
def test_only_what_does_not_fit_is_cut_and_of_the_prompt_first(prompt, answer):
    class Letters:
        begin, end = None, 0

        def encode(self, text):
            return [ord(c) for c in text]
    given, wanted = "".join(map(chr, range(100, 100 + prompt))), "".join(map(chr, range(300, 300 + answer)))
    row = encode(Letters(), given, wanted, 64)
    kept, learned = "".join(map(chr, row.ids[:row.start])), row.ids[row.start:]
    if prompt + answer + 1 <= 64:
        assert kept == given and row.lost == (0, 0)
    else:
        assert len(row.ids) == 64 and given.startswith(kept[:-(len(kept) // 2) or None])
        assert len(kept) == min(prompt, max(8, 63 - answer)) and given.endswith(kept[-(len(kept) // 2):])
    whole = [ord(c) for c in wanted] + [0]
    assert learned == whole[:len(learned)] and (learned == whole or len(kept) == min(prompt, 8))
    assert row.lost == (prompt - len(kept), len(whole) - len(learned))
    assert kept == "".join(map(chr, score.shorten([ord(c) for c in given], len(kept))))  # as evaluation cuts it

def test_cut_rows_are_counted(base, tmp_path, capsys):
    tokenizer = load_model(base)[1]
    rows = [dict(instruction="Say it", input=f"{i}" * 3, output="word " * (40 if i < 6 else 3)) for i in range(12)]
    rows += [dict(instruction="Say " * 60, output=f"{i}") for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = SimpleNamespace(task=str(tmp_path / "rows.json"), data_dir="", seq_len=48, eval_limit=0, eval_rows=8, batch_size=4)
    data = finetune.Data(args, tokenizer, 128)
    prompts, answers = (sum(r.lost[i] > 0 for r in data.train) for i in (0, 1))
    assert prompts >= 3 and answers == 6 and max(len(r.ids) for r in data.train) == 48
    line = f"to fit 48 tokens {prompts} prompts lose their middle, {answers} answers their end"
    assert line in capsys.readouterr().out
    assert [r.ids[-1] == tokenizer.end for r in data.train] == [r.lost[1] == 0 for r in data.train]

def test_scores_without_the_rows_that_training_has_too(base, capsys):
    (model, tokenizer), device = load_model(base), find_device("float32")
    examples = made_up_headlines(30, 3)
    for example in examples[:10]:
        example.seen = True
    strategy = SimpleNamespace(model=model, device=device, module=lambda function, *args: function(*args))
    found = finetune.scores_of("before", strategy, tokenizer, {"fpb": examples})["fpb"]
    rest = evaluation.score_task(model.eval(), tokenizer, device, "fpb", examples[10:])["likeliest"]["f1"]
    assert found["f1_unseen"] == pytest.approx(rest) and found["rows"] == 30
    assert f"before: fpb {rest:.3f} without the 10 rows whose prompts training has" in capsys.readouterr().out

def test_a_run_goes_on_with_its_own_rows_alone(base, tmp_path):
    file, out = tmp_path / "rows.json", str(tmp_path / "out")
    rows = [dict(instruction="Repeat.", input=f"number {i}", output=f"number {i}") for i in range(40)]
    file.write_text(json.dumps(rows))
    call("--base", base, "--task", file, "--max-iters", 4, "--out-dir", out, *QUIET, stop_at=2)
    file.write_text(json.dumps([dict(instruction="Repeat.", input="new", output="new"), *rows]))
    with pytest.raises(InputError, match="the data is not what the run that --resume continues began with: give"):
        finetune.main(["--resume", "--out-dir", out])
    file.write_text(json.dumps(rows, indent=1))  # written in another way, the same rows
    assert finetune.main(["--resume", "--out-dir", out]) == 0 and max(losses(tmp_path / "out")) == 4

@pytest.mark.parametrize("args, message", [
    (["--task", "nonsense"], "--task nonsense is no file, and none of sentiment, alpaca, fpb, fiqa, tfns, ner"),
    (["--task", "piqa"], "--task piqa is no file, and none of sentiment"),
    (["--task", "alpaca"], "alpaca_data.json is not there"),
    (["--targets", "q,wq"], "--targets q,wq: this model has layers called down, gate, head, k, o, q, up, v"),
    (["--bits", "5"], r"argument --bits: invalid choice: 5 \(choose from 4, 8, 16\)"),
    (["--rank", "0"], "argument --rank: must be a whole number, at least 1, got 0"),
    (["--rank", "100000"], r"rank must be in 1..32 for a 32x32 layer, got 100000"),
    (["--lr", "-1"], "argument --lr: must be a finite number above 0, got -1"),
    (["--lr", "nan"], "argument --lr: must be a finite number above 0, got nan"),
    (["--batch-size", "0"], "argument --batch-size: must be a whole number, at least 1, got 0"),
    (["--method", "full", "--bits", "8"], "--method full changes weights: --rank, --targets and --bits below 16 are for lora"),
    (["--method", "head", "--rank", "4"], "--method head changes weights: --rank, --targets"),
    (["--shard"], "needs several processes: torchrun --nproc_per_node N finetune.py"),
    (["--base", "nowhere"], "nowhere: no such folder or file, nor a known model"),
])
def test_bad_arguments_are_refused(base, args, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call("--base", base, "--max-iters", 2, "--out-dir", tmp_path / "out", *QUIET, *args)
    assert not (tmp_path / "out").exists()

def test_a_resumed_run_keeps_its_arguments(base, tmp_path, run):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="holds no training state"):
        finetune.main(["--resume", "--out-dir", str(out)])
    assert call("--base", base, "--max-iters", 4, "--out-dir", out, *QUIET, stop_at=2) == 0
    for args, message in ((["--rank", "4"], "--rank 4 differs from the 8 of the run"), (["--bits", "4"], "--bits 4 differs from the 8"),
                          (["--targets", "q"], "--targets q differs from the q,k,v")):
        with pytest.raises(InputError, match=message):
            finetune.main(["--resume", "--out-dir", str(out), *args])
    done = run("finetune.py", "--resume", "--out-dir", out, "--task", "alpaca")
    assert done.returncode == 2 and "--task alpaca differs from the sentiment" in done.stderr and "Traceback" not in done.stderr
    assert call("--base", base, "--max-iters", 1, "--out-dir", out, *QUIET) == 0  # a new run moves the old one aside
    assert (tmp_path / "out-1" / "adapter_config.json").exists()

@pytest.mark.slow
def test_the_benchmark_runs_every_engine_on_the_same_rows(base, tmp_path, run):
    done = run("bench.py", "finetune", "--base", base, "--rounds", 1, "--batch-size", 4, "--dtype", "float32", "--json",
               tmp_path / "rows.json", env=dict(os.environ, DATA_DIR="/nowhere"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["engine"], r["bits"]) for r in rows] == [("ours", 16), ("ours", 8), ("ours", 4), ("peft", 16)]
    assert len({r["tokens"] for r in rows}) == 1 and all(r["tokens_per_second"] > 0 and r["peak_memory_bytes"] > 1e8 for r in rows)
    assert "over peft" in done.stdout
