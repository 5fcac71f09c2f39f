"""sample.py as a user runs it: a prompt continued, a chat, and what it refuses."""
import json

import pytest
import torch

import sample
from checkpoint import load_model, save_model
from common.adapters import base_id, load_adapter, save_adapter
from common.cli import InputError
from common.generate import generate
from common.generate import sample as draw_token
from common.tokenizer import train_tokenizer
from lowrank import attach_lora
from model import Config, Transformer

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if "
            "add_generation_prompt %}<|assistant|>{% endif %}")

@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("sample") / "model"
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=500, context=64, blocks=2, heads=4, kv_heads=2, width=32,
                               ffn=48)).eval()
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    save_model(path, model, tokenizer)
    return path, model, tokenizer

def test_greedy_text_is_the_models_own(folder, run):
    path, model, tokenizer = folder
    done = run("sample.py", "--model", path, "--prompt", "The statement", "--max-new-tokens", 12,
               "--temperature", 0)
    assert done.returncode == 0, done.stderr
    ids = [step[0] for step in generate(model, [tokenizer.encode("The statement")], 12, temperature=0,
                                        stop=tokenizer.stop_ids)]
    written = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    assert done.stdout == f"The statement{written}\n"
    assert f"[{len(ids)} tokens in" in done.stderr

def test_only_tokens_that_the_tokenizer_knows_are_drawn(folder, tmp_path, capsys):
    """A named model keeps its vocabulary also where the tokenizer at hand has fewer tokens."""
    _, _, tokenizer = folder
    torch.manual_seed(0)
    save_model(tmp_path / "m",
               Transformer(Config("gpt2", vocab_size=5000, context=64, blocks=1, heads=2, kv_heads=2,
                                  width=16, ffn=32)), tokenizer)
    sample.main(["--model", str(tmp_path / "m"), "--prompt", "a", "--max-new-tokens", "40", "--temperature",
                 "2"])
    assert len(capsys.readouterr().out) > 40

def test_the_seed_decides_the_draws(folder, capsys, monkeypatch):
    path, *_ = folder
    texts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sample, "SEED", seed)
        sample.main(["--model", str(path), "--prompt", "a", "--max-new-tokens", "20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]

def test_top_p_where_it_takes_more_tokens_than_are_sorted_at_first():
    """2,000 of 3,000 tokens have 0.8 of the probability, evenly: 0.7 is 1,750 of them, more than 1,024."""
    torch.manual_seed(0)
    logits = torch.cat((torch.full((2000,), 0.8 / 2000), torch.full((1000,), 0.2 / 1000))).log()
    drawn = draw_token(logits.expand(4000, -1), top_p=0.7)
    assert drawn.max() < 2000 and 1024 < len(drawn.unique()) <= 1750

def test_chat_writes_the_models_own_format(folder, tmp_path, monkeypatch, capsys):
    path, model, tokenizer = folder
    tokenizer.chat_template = TEMPLATE
    save_model(tmp_path / "chat", model, tokenizer)
    tokenizer.chat_template = None
    asked = []
    real = sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *rest, **kw: asked.append(prompts[0])
                        or real(model, prompts, *rest, **kw))
    lines = iter(["One?", "Two?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main(["--model", str(tmp_path / "chat"), "--chat", "--max-new-tokens", "3", "--temperature", "0"])
    first, second = map(tokenizer.decode, asked)
    assert first == "<|user|>One?\n<|assistant|>"
    assert second.startswith(first) and second.endswith(
        "<|user|>Two?\n<|assistant|>"), "the second prompt has the whole conversation"

def test_chat_reads_only_what_is_new(folder, tmp_path, monkeypatch, capsys):
    """The cache stays between turns, and gives what reading all again gives."""
    path, model, tokenizer = folder
    tokenizer.chat_template = TEMPLATE
    save_model(tmp_path / "chat", model, tokenizer)
    tokenizer.chat_template = None
    said, read = [], []
    real = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, cache=None: read.append(tokens.shape[1])
                        or real(self, tokens, cache))
    for keep in (True, False):
        if not keep:  # a cache that forgets everything between two turns
            monkeypatch.setattr(sample, "generate", lambda *args, cache, **more: generate(*args, **more))
        lines = iter(["One?", "Two?", ""])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        sample.main(["--model", str(tmp_path / "chat"), "--chat", "--max-new-tokens", "3", "--temperature",
                     "0"])
        said.append(capsys.readouterr().out)
        if keep:
            turns = [n for n in read if n > 1]
    assert said[0] == said[1]
    own = len(tokenizer.encode("<|user|>Two?\n<|assistant|>"))
    # the second turn reads its own question, and what the template made of the answer before
    assert len(turns) == 2 and own <= turns[1] <= own + 6

@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters of the model, and one that says it is of another."""
    path, model, _ = folder
    out = tmp_path_factory.mktemp("adapters")
    for name in ("news", "tweets", "foreign"):
        model, _ = load_model(path)
        attach_lora(model, r=4, alpha=8, targets=("q", "v"))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith(".B"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        save_adapter(out / name, model, "model", base_id(path) if name != "foreign" else "f" * 32)
    return out

def ask(path, text, adapter=None, count=10):
    """Tokens that the model alone writes, greedily."""
    model, tokenizer = load_model(path)
    if adapter:
        load_adapter(model, adapter)
    return [s[0] for s in generate(model, [tokenizer.encode(text)], count, temperature=0,
                                   stop=tokenizer.stop_ids)]

def test_prompts_of_a_file_with_their_adapters(folder, adapters, run, tmp_path):
    """As a user runs it: each is answered as it would be alone."""
    path, _, tokenizer = folder
    lines = ['{"prompt": "The statement", "adapter": "news"}',
             '{"prompt": "A class is", "adapter": "tweets"}', "",
             '{"prompt": "The statement"}', '{"prompt": "The statement", "adapter": null}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    done = run("sample.py", "--model", path, "--prompts", tmp_path / "in.jsonl", "--max-new-tokens", 10,
               "--temperature", 0, "--adapter", f"news={adapters / 'news'}",
               "--adapter", f"tweets={adapters / 'tweets'}")
    assert done.returncode == 0, done.stderr
    rows = {row["line"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert sorted(rows) == [1, 2, 4, 5]
    for n, text, adapter in ((1, "The statement", "news"), (2, "A class is", "tweets"),
                             (4, "The statement", None),
                             (5, "The statement", None)):
        tokens = ask(path, text, adapter and adapters / adapter)
        assert rows[n]["tokens"] == tokens and rows[n]["adapter"] == adapter
        assert rows[n]["text"] == tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])
    assert rows[1]["tokens"] != rows[4]["tokens"]
    assert f"[{sum(len(row['tokens']) for row in rows.values())} tokens in" in done.stderr

@pytest.mark.parametrize("line, message", [
    (b"not json", "line 2 can't be read as JSON"),
    (b'{"prompt": "\xff"}', "in.jsonl is not UTF-8 text"),
    (b'{"text": "x"}', "line 2: it needs 'prompt', a str"),
    (b'{"prompt": 5}', "line 2: it needs 'prompt', a str"),
    (b'{"prompt": ""}', "line 2: a prompt has 0 tokens"),
    (b'{"prompt": "x", "adaptor": "news"}', "line 2: a line is"),
    (b'["prompt"]', "line 2: it needs 'prompt', a str"),
    (b'{"prompt": "x", "adapter": []}', "line 2: no adapter is called"),
    (b'{"prompt": "x", "adapter": "nobody"}', "line 2: no adapter is called 'nobody' \\(none is loaded\\)"),
    (json.dumps(dict(prompt="word " * 100)).encode(), "line 2: a prompt has .* tokens: the model reads 1 to "
                                                      "64")])
def test_a_wrong_line_is_named_before_anything_is_written(line, message, folder, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n' + line)
    with pytest.raises(InputError, match=message):
        sample.main(["--model", str(folder[0]), "--prompts", str(tmp_path / "in.jsonl")])
    assert capsys.readouterr().out == ""

def test_one_adapter_without_a_name_serves_every_line(folder, adapters, tmp_path, capsys):
    path, *_ = folder
    (tmp_path / "in.jsonl").write_text('{"prompt": "The statement"}\n{"prompt": "The statement", "adapter": '
                                       'null}\n')
    common = ["--model", str(path), "--max-new-tokens", "10", "--temperature", "0", "--adapter",
              str(adapters / "news")]
    sample.main([*common, "--prompts", str(tmp_path / "in.jsonl")])
    rows = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda r: r["line"])
    assert [r["tokens"]
            for r in rows] == [ask(path, "The statement", adapters / "news"), ask(path, "The statement")]
    sample.main([*common, "--prompt", "The statement"])
    assert capsys.readouterr().out == "The statement" + rows[0]["text"] + "\n"

def test_the_seed_of_a_line(folder, tmp_path, capsys, monkeypatch):
    """Line n of a file draws what --prompt draws with the seed SEED + n - 1, whatever else the file holds."""
    path, *_ = folder
    (tmp_path / "in.jsonl").write_text('{"prompt": "b"}\n\n{"prompt": "a"}\n{"prompt": "c"}\n')
    sample.main(["--model", str(path), "--max-new-tokens", "12", "--prompts", str(tmp_path / "in.jsonl")])
    rows = {r["line"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    monkeypatch.setattr(sample, "SEED", 3)
    sample.main(["--model", str(path), "--max-new-tokens", "12", "--prompt", "a"])
    assert capsys.readouterr().out == "a" + rows[3]["text"].rstrip("\ufffd") + "\n"  # half a character

def test_bad_adapters_and_files(folder, adapters, tmp_path):
    path, *_ = folder
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.jsonl").write_text('{"prompt": "The statement of a class"}\n')
    one = ["--prompts", str(tmp_path / "one.jsonl")]
    for args, message in ((["--adapter", str(tmp_path / "none")], "none is not an adapter: it has no "
                                                                  "adapter_config.json"),
                          (["--adapter", f"a={adapters / 'foreign'}"], "was trained on another base"),
                          (["--adapter", str(adapters / "news"), "--adapter", str(adapters / "tweets")],
                           "2 adapters, and nothing says which one to use"),
                          (["--adapter", f"a={adapters / 'news'}", "--adapter", f"a={adapters / 'tweets'}",
                            *one], "two adapters are called a"),
                          (["--adapter", "a="], "is not an adapter: it has no adapter_config.json"),
                          (["--prompts", str(tmp_path / "nowhere.jsonl")], "nowhere.jsonl: there is no such file"),
                          (["--prompts", str(tmp_path / "empty.jsonl")], "is empty: write lines like"),
                          ([*one, "--chat"], "argument --chat: not allowed with argument --prompts")):
        with pytest.raises(InputError, match=message):
            sample.main(["--model", str(path), *args])

@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "a prompt has 0 tokens"),
    (["--prompt", "word " * 200], "a prompt has .* tokens: the model reads 1 to 64"),
    (["--temperature", "-1"], "argument --temperature: must be a finite number, at least 0, got -1"),
    (["--max-new-tokens", "0"], "argument --max-new-tokens: must be a whole number, at least 1, got 0"),
    (["--prompt", "a", "--chat"], "argument --chat: not allowed with argument --prompt"),
    (["--top-k", "5"], "unrecognized arguments: --top-k 5"),
    (["--chat"], "has no chat template: use --prompt"),
    (["--model", "/nowhere"], "no such folder or file")])
def test_bad_input(args, message, folder):
    path, *_ = folder
    with pytest.raises(InputError, match=message):
        sample.main(["--model", str(path), *args])
