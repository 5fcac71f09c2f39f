"""eval.py: perplexity against transformers over the same windows."""
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
from checkpoint import export, save_model
from model import Config, Transformer
from runtime import InputError
from tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, text_file):
    """A random model with a real tokenizer, in our format and in Hugging Face's."""
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=600, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 600)
    save_model(folder / "ours", model, tokenizer)
    export(model, tokenizer, folder / "hf")
    return folder, tokenizer


def test_perplexity_is_that_of_transformers_over_the_same_windows(model_folder, text_file, tmp_path, capsys):
    folder, tokenizer = model_folder
    assert evaluation.main(["--model", str(folder / "ours"), "--data", str(text_file), "--limit", "1000", "--out-dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "summary.json").read_text())["perplexity"]
    ids = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8"))[:1000])
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for row in ids.split(64):
            losses += torch.nn.functional.cross_entropy(theirs(row[None]).logits[0, :-1], row[1:], reduction="none").tolist()
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result["rows"] == 16 and result["tokens"] == 1000 and result["window"] == 64
    assert result["interval"][0] < result["perplexity"] < result["interval"][1]
    size = len(tokenizer.decode(ids.tolist()).encode())
    assert result["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-5)
    assert f"perplexity: {result['perplexity']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("args, message", [
    (["--tasks", "nonsense"], "no task is called 'nonsense': the tasks are perplexity"),
    (["--limit", "1"], "--limit must be at least 2 tokens, got 1"),
    (["--data", "/nowhere.txt"], "there is no such file or folder"),
    (["--model", "/nowhere"], "no such folder or file")])
def test_bad_input(args, message, model_folder, tmp_path):
    folder, _ = model_folder
    with pytest.raises(InputError, match=message):
        evaluation.main(["--model", str(folder / "ours"), "--out-dir", str(tmp_path), *args])
