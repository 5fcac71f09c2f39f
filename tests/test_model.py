"""model.py and generate.py against transformers' networks: logits, gradients, cache, texts."""
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from beyond.activations import walk
from beyond.batching import Engine, Request
from beyond.decoding import GraphStep, decoding_step
from beyond.paged_cache import PagedCache, Pool, Sequence
from common import formats
from common.cli import InputError
from common.device import find_device
from common.generate import generate, sample
from lowrank import attach_lora, replace_linears
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
from pipeline import Pipeline
from quant import quantize
from recompute import use_recompute
from tasks.score import copies, read_prefix

GPT2 = Config("gpt2", vocab_size=101, context=48, blocks=3, heads=4, kv_heads=4, width=32, ffn=128)
LLAMA = Config("llama", 101, 48, 3, 4, 2, 32, 56, tied=False, norm_eps=1e-6, rope_base=500.0)

def like_llama(kind, **changes):
    return Config(**LLAMA.as_dict() | dict(kind=kind) | changes)

QWEN2 = like_llama("qwen2")
YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16, rope_low=0.2, rope_high=2.0,
            rope_attention=1.3)
CONFIGS_HERE = {
    "gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2,
    "llama tied": like_llama("llama", kv_heads=4, tied=True),
    "llama wide heads": like_llama("llama", head_dim=12, attention_bias=True),
    "llama yarn": like_llama("llama", **YARN),
    "llama dynamic": like_llama("llama", rope_scaling="dynamic", rope_factor=4.0),
    "llama linear": like_llama("llama", rope_factor=4.0),
    "llama3": like_llama("llama", rope_scaling="llama3", rope_factor=8.0, rope_original=32),
    "mistral": like_llama("mistral", window=9, head_dim=6),
    "qwen3": like_llama("qwen3", head_dim=12),
    "qwen3 biases": like_llama("qwen3", attention_bias=True),
    "smollm3": like_llama("smollm3", no_rope=(1,), tied=True),
    "smollm3 biases": like_llama("smollm3", no_rope=(0, 2), attention_bias=True)}
EACH = pytest.mark.parametrize("config", CONFIGS_HERE.values(), ids=CONFIGS_HERE)
LLAMAS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
          "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
          "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
          "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
          "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
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
    rope = dict(rope_type="default", rope_theta=c.rope_base)
    if c.rope_factor != 1:
        rope |= dict(rope_type=c.rope_scaling, factor=c.rope_factor, attention_factor=c.rope_attention,
                     beta_slow=c.rope_low, beta_fast=c.rope_high, low_freq_factor=c.rope_low,
                     high_freq_factor=c.rope_high, original_max_position_embeddings=c.rope_original or None)
    sizes = dict(vocab_size=c.vocab_size, max_position_embeddings=c.context, hidden_size=c.width,
                 num_hidden_layers=c.blocks, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                 intermediate_size=c.ffn, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                 rope_parameters=rope, head_dim=c.head_size, attention_bias=c.attention_bias)
    if c.kind == "mistral":
        sizes |= dict(sliding_window=c.window or None)
    if c.kind == "smollm3":
        sizes |= dict(no_rope_layers=[int(i not in c.no_rope) for i in range(c.blocks)], pad_token_id=0)
    name = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", smollm3="SmolLM3")[c.kind]
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**sizes))

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

@EACH
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

@EACH
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

@EACH
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
    (dict(kind="bert"), "kind is bert, none of gpt2, llama, mistral, smollm3, qwen2, qwen3")])
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
    with pytest.raises(InputError, match="60 tokens do not fit the context of 48"):
        ours(torch.zeros(1, 60, dtype=torch.long))
    with pytest.raises(InputError, match="no model is called 'gpt5'"):
        config_for("gpt5")

# ----------------------------------------------------------------------------- with all the rest

UNEVEN = pytest.mark.parametrize("name", ["mistral", "qwen3 biases", "smollm3 biases", "llama yarn"])

@UNEVEN
@pytest.mark.parametrize("mode", ["none", "attention", "block"])
def test_what_recomputation_gives(name, mode):
    """In texts that are longer than the windows."""
    model = pair(CONFIGS_HERE[name])[0]
    tokens, gradients = torch.randint(0, 101, (2, 41)), []
    for how in ("sdpa", mode):
        use_recompute(model, how)
        model.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 2e-5 * max(1, a.abs().max())

@UNEVEN
def test_what_caches_prefixes_batches_and_steps_give(name):
    model = pair(CONFIGS_HERE[name])[0]
    prompts, pool = [[1, 2, 3], [4] * 20, list(range(30)), [1, 2, 3, 4] * 5], Pool(model.config, 60, size=4)
    alone = [[step[0] for step in generate(model, [p], 12, temperature=0)] for p in prompts]
    cache = PagedCache([Sequence(pool) for _ in prompts])
    together = list(generate(model, prompts, 12, temperature=0, cache=cache))
    assert [list(row) for row in zip(*together)] == alone
    requests = [Request(p, 12) for p in prompts]
    list(Engine(model, Pool(model.config, 40, size=4), batch_size=3).run(requests))
    assert [r.tokens for r in requests] == alone
    for step in (GraphStep, decoding_step):
        steps = list(generate(model, prompts, 12, temperature=0, make_step=step))
        assert [list(row) for row in zip(*steps)] == alone
    tokens = torch.tensor([list(range(40)), [*range(15), *range(50, 75)]])
    with torch.no_grad():
        whole, prefix = model.hidden(tokens), read_prefix(model, tokens[:1, :15])
        assert (model.hidden(tokens[:, 15:], copies(model, prefix, [0, 0], 25)) - whole[:, 15:]).abs().max() < 1e-4

@UNEVEN
def test_factored_quantized_adapted_and_piped(name, tmp_path):
    """Each change leaves a model that computes what its exported folder computes in transformers."""
    tokens = torch.randint(0, 101, (2, 40))

    def exported(model, what):
        formats.export(model, None, tmp_path / what)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / what, dtype=torch.float32).eval()
        with torch.no_grad():
            a, b = model(tokens), again(tokens).logits
        tolerance = 5e-3 if "bits" in what else 1e-4  # the kernels of integers round
        assert (a - b).abs().max() < tolerance * b.abs().max(), what
    exported(pair(CONFIGS_HERE[name])[0], "dense")
    for method in (1, 2, 3):
        model = pair(CONFIGS_HERE[name])[0]
        replace_linears(model, 6, method)
        exported(model, f"method {method}")
    for bits in (8, 4):
        model = pair(CONFIGS_HERE[name])[0]
        quantize(model, bits)
        exported(model, f"{bits} bits")
        attach_lora(model, 2, 8, ("q", "o"))
        for block in model.blocks:
            torch.nn.init.normal_(block.attention.q.B)
        exported(model, f"{bits} bits with an adapter")
    model = pair(CONFIGS_HERE[name])[0]
    piped = Pipeline(model, 1, "gpipe", 1, 40, find_device())
    with torch.no_grad():
        wanted = model(tokens)
        piped.pieces[1] = piped.pieces[0]  # as in a later stage, which gets x from another process
        later = piped.run_blocks(1, tokens, model.begin(tokens)[0])
        walked, = walk(model, [tokens], lambda layers, inputs: {}, "")  # as decompose.py --calibration does
        for h in (later, walked):
            assert (model.head(model.norm(h)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
