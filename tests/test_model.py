"""model.py and generate.py against transformers' GPT-2, Llama and Qwen2: logits, gradients, cache, texts."""
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from common.cli import InputError
from common.generate import generate, sample
from model import (
    CONFIGS,
    Config,
    KVCache,
    Transformer,
    config_for,
    count_parameters,
    flops_per_token,
    matmul_weights,
)

GPT2 = Config("gpt2", vocab_size=101, context=48, blocks=3, heads=4, kv_heads=4, width=32, ffn=128)
LLAMA = Config("llama", 101, 48, 3, 4, 2, 32, 56, tied=False, norm_eps=1e-6, rope_base=500.0)
QWEN2 = Config(**LLAMA.as_dict() | dict(kind="qwen2"))
THREE = pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN2], ids=["gpt2", "llama", "qwen2"])
LLAMAS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
          "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
          "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
          "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
          "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
GPT2S = {"embed": "transformer.wte", "positions": "transformer.wpe", "blocks": "transformer.h",
         "norm": "transformer.ln_f", "head": "lm_head", "norm1": "ln_1", "norm2": "ln_2",
         "attention.qkv": "attn.c_attn", "attention.o": "attn.c_proj",
         "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def theirs_of(name, kind):
    names, parts = GPT2S if kind == "gpt2" else LLAMAS, name.split(".")
    if parts[0] != "blocks":
        return f"{names[parts[0]]}.{parts[1]}"
    return f"{names['blocks']}.{parts[1]}.{names['.'.join(parts[2:-1])]}.{parts[-1]}"


def is_conv1d(name, kind):
    return kind == "gpt2" and name.endswith(("qkv.weight", "o.weight", "up.weight", "down.weight"))


def transformers_model(c):
    if c.kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.width, n_layer=c.blocks, n_head=c.heads,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    sizes = dict(vocab_size=c.vocab_size, max_position_embeddings=c.context, hidden_size=c.width,
                 num_hidden_layers=c.blocks, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                 intermediate_size=c.ffn, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                 rope_parameters=dict(rope_type="default", rope_theta=c.rope_base))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)) if c.kind == "llama" else \
        hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))


def pair(config):
    """(our model, transformers' model) with the same random weights."""
    torch.manual_seed(0)
    theirs = transformers_model(config)
    with torch.no_grad():
        for p in theirs.parameters():  # large enough that an error shows
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.dim() == 1 else 0))
    ours, state = Transformer(config), theirs.state_dict()
    names = {theirs_of(name, config.kind) for name, _ in ours.named_parameters()}
    assert names == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            source = state[theirs_of(name, config.kind)]
            p.copy_(source.T if is_conv1d(name, config.kind) else source)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("config",
                         [GPT2, LLAMA, Config(**LLAMA.as_dict() | dict(kv_heads=4, tied=True)), QWEN2],
                         ids=["gpt2", "llama grouped", "llama tied", "qwen2"])
def test_logits_and_gradients_equal_transformers(config):
    ours, theirs = pair(config)
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    a, b = ours(tokens), theirs(tokens).logits
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    for logits in (a, b):
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = reference[theirs_of(name, config.kind)].grad
        grad = grad.T if is_conv1d(name, config.kind) else grad
        assert (p.grad - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


@THREE
def test_cache_gives_the_logits_of_transformers(config):
    """A prompt of 20, then a piece of 5 at once, then one token at a time."""
    ours, theirs = pair(config)
    tokens = torch.randint(0, config.vocab_size, (2, 30))
    cache, start, pieces = KVCache(config, 2, 30), 0, []
    with torch.no_grad():
        for length in (20, 5, 1, 1, 1, 1, 1):
            pieces.append(ours(tokens[:, start:start + length], cache))
            start += length
        b = theirs(tokens).logits
    assert (torch.cat(pieces, 1) - b).abs().max() < 1e-5 * b.abs().max()


@THREE
def test_a_batch_of_prompts_gives_what_each_gives_alone_and_what_transformers_gives(config):
    ours, theirs = pair(config)
    prompts = [[1, 2, 3], [4] * 20, [7, 8], list(range(9))]
    together = list(generate(ours, prompts, 12, temperature=0))
    for i, prompt in enumerate(prompts):
        alone = [step[0] for step in generate(ours, [prompt], 12, temperature=0)]
        uncached = [step[0] for step in generate(ours, [prompt], 12, temperature=0, use_cache=False)]
        text = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                               max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        reference = text[0, len(prompt):].tolist()
        assert [step[i] for step in together] == alone == uncached == reference


def test_generation_ends_at_a_stop_token_and_at_the_context():
    ours, _ = pair(GPT2)
    free = [step[0] for step in generate(ours, [[5, 6]], 20, temperature=0)]
    stop = free[7]
    stopped = [step[0] for step in generate(ours, [[5, 6]], 20, temperature=0, stop={stop})]
    assert stopped == free[:free.index(stop) + 1]
    # room for 3 and 9: the last is not read
    steps = list(generate(ours, [[1] * 46, [2] * 40], 100, temperature=0))
    assert [sum(s[i] is not None for s in steps) for i in (0, 1)] == [3, 9]
    alone = [s[0] for s in generate(ours, [[2] * 40], 100, temperature=0)]
    assert [s[1] for s in steps] == alone, "a row that ended must not disturb the others"


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.15), math.log(0.05)]])

    def draw(**how):
        return torch.bincount(torch.cat([sample(logits, **how) for _ in range(2000)]), minlength=4) / 2000
    assert torch.allclose(draw(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.05)
    assert torch.allclose(draw(top_p=0.79), torch.tensor([0.625, 0.375, 0, 0]), atol=0.05)
    assert torch.equal(draw(temperature=0), torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(draw(temperature=0.5), torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365,
                          atol=0.05)


def test_known_names_have_their_true_sizes():
    millions = {}
    for name in CONFIGS:
        with torch.device("meta"):
            millions[name] = count_parameters(Transformer(CONFIGS[name])) / 1e6
    wanted = {"gpt2": 124.44, "gpt2-medium": 354.82, "gpt2-large": 774.03, "gpt2-xl": 1557.61,
              "llama2-7b": 6738.42,
              "llama2-13b": 13015.86, "llama2-70b": 68976.65, "smollm2-135m": 134.52}
    for name, count in wanted.items():
        assert abs(millions[name] - count) < 0.01, name


def test_operations_a_token():
    """Two for each weight (GPT-2's head counts, its embedding does not), and attention over half of the
    sequence."""
    with torch.device("meta"):
        model = Transformer(CONFIGS["gpt2"])
    blocks, head = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072), 50257 * 768
    assert matmul_weights(model) == blocks + head
    assert flops_per_token(model, 1024) == 2 * (blocks + head) + 12 * 2 * 1024 * 768
    assert flops_per_token(model, 1024, training=True) == 3 * flops_per_token(model, 1024)


@pytest.mark.parametrize("change, message", [
    (dict(width=100, heads=3), "width 100 is not divisible by 3 heads"),
    (dict(kv_heads=5, width=768), "12 heads can't share 5"),
    (dict(dropout=1.5), "dropout must be in 0..1"),
    (dict(blocks=0), "blocks must be at least 1, got 0"),
    (dict(kind="bert"), "kind must be one of gpt2, llama, qwen2, got bert")])
def test_bad_architectures_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        config_for("gpt2", **change)


def test_bad_prompts_are_refused():
    ours, _ = pair(GPT2)
    for prompt, message in (([1] * 49, "a prompt has 49 tokens: the model reads 1 to 48"),
                            ([], "a prompt has 0 tokens"),
                            ([500], "token 500 is outside the vocabulary 0..100"),
                            ([3, -1], "token -1 is outside")):
        with pytest.raises(InputError, match=message):
            next(generate(ours, [prompt], 1))
    for kw, message in ((dict(temperature=-1), "temperature must be at least 0, got -1"),
                        (dict(top_p=0), "top-p must be in")):
        with pytest.raises(InputError, match=message):
            next(generate(ours, [[1]], 1, **kw))
    with pytest.raises(InputError, match="60 tokens do not fit the context of 48"):
        ours(torch.zeros(1, 60, dtype=torch.long))
    with pytest.raises(InputError, match="no model is called 'gpt5'"):
        config_for("gpt5")
