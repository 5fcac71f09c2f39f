"""beyond/decoding.py: the step that a graph records gives the tokens of the ordinary step, on a CPU too."""

import pytest
import torch

from beyond.decoding import GraphStep, decoding_step
from common.generate import generate
from model import Config, Transformer
from quant import quantize

@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    kv_heads = 2 if request.param == "llama" else 4
    return Transformer(Config(request.param, 211, 64, 3, 4, kv_heads, width=64, ffn=128)).eval()

PROMPTS = [[1, 2, 3], [7] * 20, [5]]

@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
@pytest.mark.parametrize("stop", [(), (3, 50, 77, 120, 200, *range(10, 30))])
def test_the_tokens_are_those_of_the_ordinary_step(model, prompts, stop):
    """Rows of different lengths, rows that end before the others, and rows that fill the context."""
    plain = list(generate(model, prompts, 60, temperature=0, stop=stop))
    assert list(generate(model, prompts, 60, temperature=0, stop=stop, make_step=GraphStep)) == plain
    assert stop or len(plain) > 10

def test_a_quantized_model(model):
    quantize(model, 8)
    plain = list(generate(model, PROMPTS, 20, temperature=0))
    assert list(generate(model, PROMPTS, 20, temperature=0, make_step=GraphStep)) == plain

@pytest.mark.slow
def test_on_a_gpu_the_graph_gives_the_same_tokens(model):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = model.cuda().bfloat16()
    quantize(model, 8)
    plain = list(generate(model, PROMPTS, 40, temperature=0))
    assert list(generate(model, PROMPTS, 40, temperature=0, make_step=decoding_step)) == plain
