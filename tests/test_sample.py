"""sample.py as a user runs it: a prompt continued, a chat, and what it refuses."""
import pytest
import torch

import sample
from checkpoint import save_model
from model import Config, Transformer, generate
from runtime import InputError
from tokenizer import train_tokenizer

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("sample") / "model"
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=500, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)).eval()
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    save_model(path, model, tokenizer)
    return path, model, tokenizer


def test_greedy_text_is_the_models_own(folder, run):
    path, model, tokenizer = folder
    done = run("sample.py", "--model", path, "--prompt", "The statement", "--max-new-tokens", 12, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    ids = [step[0] for step in generate(model, [tokenizer.encode("The statement")], 12, temperature=0, stop=tokenizer.stop_ids)]
    assert done.stdout == "The statement" + tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]) + "\n"
    assert f"[{len(ids)} tokens in" in done.stderr
    uncached = run("sample.py", "--model", path, "--prompt", "The statement", "--max-new-tokens", 12, "--temperature", 0, "--no-cache")
    assert uncached.stdout == done.stdout


def test_only_tokens_that_the_tokenizer_knows_are_drawn(folder, tmp_path, capsys):
    """A named model keeps its vocabulary also where the tokenizer at hand has fewer tokens."""
    _, _, tokenizer = folder
    torch.manual_seed(0)
    save_model(tmp_path / "m", Transformer(Config("gpt2", vocab_size=5000, context=64, blocks=1, heads=2, kv_heads=2, width=16, ffn=32)), tokenizer)
    sample.main(["--model", str(tmp_path / "m"), "--prompt", "a", "--max-new-tokens", "40", "--temperature", "2", "--top-p", "1"])
    assert len(capsys.readouterr().out) > 40


def test_the_seed_decides_the_draws(folder, capsys):
    path, *_ = folder
    texts = []
    for seed in (1, 1, 2):
        sample.main(["--model", str(path), "--prompt", "a", "--max-new-tokens", "20", "--seed", str(seed)])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_chat_writes_the_models_own_format(folder, tmp_path, monkeypatch, capsys):
    path, model, tokenizer = folder
    tokenizer.chat_template = TEMPLATE
    save_model(tmp_path / "chat", model, tokenizer)
    tokenizer.chat_template = None
    asked = []
    real = sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *rest, **kw: asked.append(prompts[0]) or real(model, prompts, *rest, **kw))
    lines = iter(["One?", "Two?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main(["--model", str(tmp_path / "chat"), "--chat", "--max-new-tokens", "3", "--temperature", "0"])
    first, second = map(tokenizer.decode, asked)
    assert first == "<|user|>One?\n<|assistant|>"
    assert second.startswith(first) and second.endswith("<|user|>Two?\n<|assistant|>"), "the second prompt has the whole conversation"


@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "word " * 200], "a prompt has .* tokens: the model reads 1 to 64"),
    (["--temperature", "-1"], "temperature must be at least 0, got -1"),
    (["--max-new-tokens", "0"], "max-new-tokens must be at least 1, got 0"),
    (["--chat"], "has no chat template: use --prompt"),
    (["--model", "/nowhere"], "no such folder or file")])
def test_bad_input(args, message, folder):
    path, *_ = folder
    with pytest.raises(InputError, match=message):
        sample.main(["--model", str(path), "--prompt", "a", *args])
