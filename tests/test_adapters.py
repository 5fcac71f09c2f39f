"""PEFT reads our adapters and we read PEFT's, with equal logits; an adapter knows its base; merging says what
it costs."""
import json
import random
import re
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import checkpoint
from checkpoint import load_model, save_model
from common import adapters
from common.adapters import base_id, load_adapter, read_adapter, save_adapter, take_off
from common.cli import InputError
from common.formats import export
from lowrank import LoRALinear, attach_lora, merge_lora
from model import Config, Transformer
from quant import quantize

CONFIGS = {"llama": Config("llama", 120, 32, 2, 4, 2, 32, 48, tied=False),
           "qwen2": Config("qwen2", 120, 32, 2, 4, 2, 32, 48, tied=False),
           "gpt2": Config("gpt2", 120, 32, 2, 4, 4, 32, 128)}
TARGETS = {"llama": ["q", "v", "down"], "qwen2": ["q", "k"], "gpt2": ["qkv", "o"]}
THEIRS = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": ["q_proj", "k_proj"],
          "gpt2": ["c_attn", "attn.c_proj"]}
TOKENS = torch.arange(60).reshape(3, 20)

@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def base(request, tmp_path_factory):
    """A random model as our folder and as a Hugging Face folder: (kind, path with ours/ and hf/)."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = Transformer(CONFIGS[request.param]).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_model(path / "ours", model)
    export(model, None, path / "hf")
    return request.param, path

def ours(path):
    return load_model(path / "ours")[0]

def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path / "hf", dtype=torch.float32).eval()

def randomize(model):
    for m in model.modules():
        if isinstance(m, LoRALinear):
            nn.init.normal_(m.B, std=0.2)
    return model

@pytest.fixture
def saved(base, tmp_path):
    """An adapter that we wrote: (kind, path of the base, folder, logits)."""
    kind, path = base
    model = ours(path)
    attach_lora(model, 4, 8, TARGETS[kind])
    randomize(model)
    save_adapter(tmp_path / "adapter", model, "some-base", base_id(path / "ours"))
    return kind, path, tmp_path / "adapter", model(TOKENS)

def test_peft_loads_ours_and_gives_our_logits(saved):
    kind, path, folder, logits = saved
    model = peft.PeftModel.from_pretrained(theirs(path), folder)
    assert (ours(path)(TOKENS) - logits).abs().max() > 1e-2
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, logits, atol=2e-5)

@pytest.mark.parametrize("how", [
    dict(), dict(use_rslora=True), dict(rank_pattern={"q_proj": 5, "attn.c_proj": 2}),
    dict(alpha_pattern={r".*layers\.1.*v_proj": 3, r"h.0.attn.c_attn": 7},
         rank_pattern={r"layers.0.self_attn.q_proj": 4}),
    dict(target_modules=r".*\.(q_proj|down_proj|c_attn)"), dict(layers_to_transform=[1]),
    dict(init_lora_weights="gaussian"), dict(init_lora_weights="orthogonal", r=4),
    dict(init_lora_weights="mica"),
    dict(init_lora_weights="pissa"), dict(init_lora_weights="olora"),
    dict(init_lora_weights="pissa", use_rslora=True, alpha_pattern={"q_proj": 5, "c_attn": 5}),
    dict(init_lora_weights="olora", alpha_pattern={"k_proj": 5}, rank_pattern={"q_proj": 6})], ids=str)
def test_we_load_what_peft_trained(base, tmp_path, how):
    kind, path = base
    torch.manual_seed(1)
    settings = dict(r=3, lora_alpha=12, target_modules=THEIRS[kind], task_type="CAUSAL_LM",
                    fan_in_fan_out=kind == "gpt2")
    if kind == "gpt2" and how.get("init_lora_weights") == "olora":  # PEFT's own such adapters don't run
        settings["target_modules"] = ["attn.c_proj"]
    model = peft.get_peft_model(theirs(path), peft.LoraConfig(**settings | how))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "peft")
    mine = ours(path)
    before = mine(TOKENS)
    if kind == "gpt2" and how.get("init_lora_weights") == "olora":
        with pytest.raises(InputError, match="init_lora_weights is 'olora', which is not read here"):
            load_adapter(mine, tmp_path / "peft")
        return
    adapter = load_adapter(mine, tmp_path / "peft", base_id(path / "ours"))
    assert adapter.rank == how.get("r", 3) and adapter.base_id is None and "believed" in str(adapter)
    logits = mine.eval()(TOKENS)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        assert torch.allclose(logits, wanted, atol=2e-5) and not torch.allclose(before, wanted, atol=1e-3)
        save_adapter(tmp_path / "again", mine, "some-base", base_id(path / "ours"))
        again = peft.PeftModel.from_pretrained(theirs(path), tmp_path / "again")
        assert torch.allclose(again(TOKENS).logits, wanted, atol=2e-5)
    take_off(mine)
    assert torch.equal(mine(TOKENS), before)

def test_a_start_that_changes_the_base_needs_its_weights(base, tmp_path):
    kind, path = base
    config = peft.LoraConfig(r=2, target_modules=THEIRS[kind], task_type="CAUSAL_LM",
                             init_lora_weights="pissa")
    peft.get_peft_model(theirs(path), config).save_pretrained(tmp_path / "peft")
    mine = ours(path)
    quantize(mine, 8)
    with pytest.raises(InputError, match="began as pissa changes its base's weights"):
        load_adapter(mine, tmp_path / "peft")

def test_gradients_of_a_and_b_are_pefts(saved):
    kind, path, folder, _ = saved
    reference = peft.PeftModel.from_pretrained(theirs(path), folder, is_trainable=True)
    reference(TOKENS, labels=TOKENS).loss.backward()
    mine = ours(path).requires_grad_(False)
    load_adapter(mine, folder)
    nn.functional.cross_entropy(mine(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    wanted = {adapters.our_name(name.replace(".default", "")): p.grad
              for name, p in reference.named_parameters() if p.requires_grad}
    layers = {n: m for n, m in mine.named_modules() if isinstance(m, LoRALinear)}
    assert len(wanted) == 2 * len(layers)
    for (name, letter), gradient in wanted.items():
        mine_too = getattr(layers[name], letter).grad
        assert (mine_too - gradient).norm() <= 1e-4 * gradient.norm(), name

def test_loading_twice_switches_and_saving_again_changes_nothing(saved, tmp_path):
    kind, path, folder, logits = saved
    model = ours(path)
    other = randomize_other(ours(path), kind)
    save_adapter(tmp_path / "other", other, "some-base", base_id(path / "ours"))
    load_adapter(model, tmp_path / "other")
    assert torch.equal(model(TOKENS), other(TOKENS))
    adapter = load_adapter(model, folder)
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)
    assert re.search(r"r = 4 on .*, \d+ layers, [\d,]+ parameters$", str(adapter))
    save_adapter(tmp_path / "again", model, adapter.base_name, adapter.base_id)
    for name in ("adapter_config.json", "BASE_ID"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    first, again = read_adapter(folder).factors, read_adapter(tmp_path / "again").factors
    assert all(torch.equal(x, y) for n in first for x, y in zip(first[n], again[n]))

def randomize_other(model, kind):
    torch.manual_seed(5)
    attach_lora(model, 2, 4, TARGETS[kind][:1])
    return randomize(model)

# ----------------------------------------------------------------------------- which base

def test_a_base_keeps_its_id_in_every_format_and_another_has_another(base, tmp_path):
    kind, path = base
    assert base_id(path / "ours") == base_id(path / "hf")
    model = ours(path)
    model.blocks[-1].mlp.down.weight.data[0, 0] += 1e-3
    save_model(tmp_path / "changed", model)
    assert base_id(tmp_path / "changed") != base_id(path / "ours")

def test_an_adapter_of_another_base_is_refused(saved):
    kind, path, folder, _ = saved
    mine = base_id(path / "ours")
    assert read_adapter(folder, base_id=mine).base_id == mine
    with pytest.raises(InputError, match=f"trained on another base: on some-base with BASE_ID {mine}, not on "
                                         "this one with 123abc"):
        load_adapter(ours(path), folder, "123abc")
    small = Transformer(Config("llama", vocab_size=120, context=32, blocks=1, heads=4, kv_heads=4, width=16,
                               ffn=48))
    with pytest.raises(InputError, match="it was trained on some-base"):
        load_adapter(small, folder)

def spoil_settings(**changes):
    def spoil(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return spoil

@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "adapter_model.safetensors").unlink(), "is not an adapter: it has no "
                                                           "adapter_model.safetensors"),
    (lambda f: (f / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json can't be read as JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json holds no JSON object"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:300]), "model.safetensors can't be read"),
    (spoil_settings(r=5), r"of rank 5 A must be \(5, in\)"),
    (spoil_settings(r="many"), "can't be read"),
    (spoil_settings(use_dora=True), "use_dora is True, which is not read here"),
    (spoil_settings(peft_type="IA3"), "peft_type is 'IA3'"),
    (spoil_settings(modules_to_save=["lm_head"]), "modules_to_save"),
    (spoil_settings(rank_pattern={".*": 3}), r"of rank 3 A must be \(3, in\)"),
    (spoil_settings(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is"),
    (spoil_settings(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    (spoil_settings(trainable_token_indices=[1]), "trainable_token_indices"),
    (spoil_settings(a_setting_of_tomorrow=0.5), "a_setting_of_tomorrow is 0.5"),
    (spoil_settings(lora_dropout=7), "can't be read"),
])
def test_damaged_and_unknown_adapters_are_refused(saved, spoil, message):
    _, path, folder, _ = saved
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_adapter(ours(path), folder)

def test_altered_factors_are_refused(saved):
    file = saved[2] / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="altered after it was written"):
        read_adapter(saved[2])

def test_damaged_adapters_are_read_as_peft_does_or_refused(base, tmp_path, mutate):
    """Thousands of small mutations: nothing but InputError; and what loads has PEFT's logits."""
    kind, path = base
    if kind == "qwen2":
        return
    folder, config = tmp_path / "peft", dict(r=2, lora_alpha=4, target_modules=THEIRS[kind], use_rslora=True)
    torch.manual_seed(2)
    trained = peft.get_peft_model(theirs(path), peft.LoraConfig(
        **config, task_type="CAUSAL_LM", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj|c_proj": 5}))
    for name, p in trained.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p.data, std=0.3)
    trained.save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in adapters.FILES}
    settings, draw = json.loads(files["adapter_config.json"]), random.Random(3)
    mine, loaded, compared = ours(path), 0, 0
    for n in range(900):
        now = dict(files)
        if n % 3:
            changed = {key: value for key, value in settings.items() if draw.random() < 0.97}
            now["adapter_config.json"] = json.dumps(mutate(draw, changed)).encode()
        else:
            raw = bytearray(now["adapter_model.safetensors"])
            at = draw.randrange(1200)
            raw[at:at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
            now["adapter_model.safetensors"] = bytes(raw)
        for name, content in now.items():
            (folder / name).write_bytes(content)
        try:
            layers = set(load_adapter(mine, folder).factors)
        except InputError:
            continue
        loaded += 1
        if n % 10 == 1:
            try:
                with warnings.catch_warnings(action="ignore"):
                    reference = peft.PeftModel.from_pretrained(theirs(path), folder).eval()
            except Exception:  # a setting that we don't need
                continue
            names = {adapters.our_name(name.replace(".default", ""))
                     for name, _ in reference.named_parameters() if "lora_A" in name}
            if {name for name, _ in names} != layers:  # the settings leave out layers that have factors
                continue
            compared += 1
            with torch.no_grad():
                wanted = reference(TOKENS).logits
                logits = mine.eval()(TOKENS)
                assert torch.allclose(logits, wanted, atol=1e-4, equal_nan=True), now["adapter_config.json"]
    assert loaded > 50 and compared > 5

# ----------------------------------------------------------------------------- quantized bases

@pytest.mark.parametrize("bits, most", [(8, 0.05), (4, 0.6)])
def test_merging_into_a_quantized_base_states_its_error(saved, bits, most):
    kind, path, folder, _ = saved
    model = ours(path)
    quantize(model, bits, group=16)
    load_adapter(model, folder)
    apart = model(TOKENS)
    sums = {n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    deltas = {n: m.delta().detach() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    error = merge_lora(model)
    lost = sum((model.get_submodule(n).dense_weight() - W).square().sum() for n, W in sums.items()).sqrt()
    lost /= sum(d.square().sum() for d in deltas.values()).sqrt()
    assert 0 < error < most and error == pytest.approx(lost.item(), rel=1e-4)
    assert not torch.equal(model(TOKENS), apart) and not any(isinstance(m, LoRALinear)
                                                             for m in model.modules())

# ----------------------------------------------------------------------------- checkpoint.py merge

def test_merge_writes_a_model_of_its_own(saved, tmp_path, capsys):
    kind, path, _, logits = saved
    model, folder = ours(path), tmp_path / "mine"
    load_adapter(model, saved[2])
    save_adapter(folder, model, path / "ours", base_id(path / "ours"))
    checkpoint.main(["merge", str(folder), str(tmp_path / "merged")])
    assert torch.allclose(load_model(tmp_path / "merged")[0](TOKENS), logits, atol=1e-5)
    said = capsys.readouterr().out
    assert "rounding changed sums by 0.0% of what it adds" in said
    checkpoint.main(["quantize", str(path / "ours"), str(tmp_path / "base8")])
    save_adapter(tmp_path / "mine8", model, tmp_path / "base8", base_id(tmp_path / "base8"))
    checkpoint.main(["merge", str(tmp_path / "mine8"), str(tmp_path / "merged8")])
    checkpoint.main(["quantize", str(path / "ours"), str(tmp_path / "base4"), "--bits", "4"])
    save_adapter(tmp_path / "mine4", model, tmp_path / "base4", base_id(tmp_path / "base4"))
    checkpoint.main(["merge", str(tmp_path / "mine4"), str(tmp_path / "merged4")])
    assert "much of the adapter is lost: keep it beside its base" in capsys.readouterr().out
    assert (load_model(tmp_path / "merged8")[0](TOKENS) - logits).abs().max() < 0.1
    for args, message in (([folder, tmp_path / "merged"], "is not empty"),
                          ([saved[2], tmp_path / "x"], "some-base: no such folder"),
                          ([tmp_path, tmp_path / "x"], "is not an adapter")):
        with pytest.raises(InputError, match=message):
            checkpoint.main(["merge", *map(str, args)])
    assert not (tmp_path / "x").exists()
