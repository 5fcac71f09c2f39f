"""checkpoint.py: model folders and training state; what a kill, a truncation or a changed byte does to them."""
import copy
import json
import os
import shutil

import pytest
import torch

import checkpoint
from checkpoint import load_model, save_model
from common import storage
from common.cli import InputError, command
from common.formats import export
from common.storage import read_state, replace_state
from common.tokenizer import train_tokenizer
from lowrank import attach_lora, replace_linears, set_alpha
from model import Config, Transformer
from quant import quantize

GPT2 = Config("gpt2", vocab_size=400, context=32, blocks=2, heads=4, kv_heads=4, width=32, ffn=128)
LLAMA = Config("llama", vocab_size=400, context=32, blocks=2, heads=4, kv_heads=2, width=32, ffn=48, tied=False)
QWEN2 = Config(**LLAMA.as_dict() | dict(kind="qwen2"))
TOKENS = torch.arange(60).reshape(3, 20)

def variants():
    for config in (GPT2, LLAMA, QWEN2):
        for method, embedding_rank in ((0, 0), (1, 0), (1, 16), (2, 0), (3, 0)):
            torch.manual_seed(0)
            model = Transformer(config).eval()
            if method:
                replace_linears(model, 8, method, embedding_rank)
            if method == 3:
                set_alpha(model, 0.375)
            yield pytest.param(model, id=f"{config.kind} method {method} {'embedding' if embedding_rank else ''}")

@pytest.mark.parametrize("model", list(variants()))
def test_a_folder_rebuilds_its_model(model, tmp_path):
    save_model(tmp_path / "m", model)
    again, tokenizer = load_model(tmp_path / "m")
    assert tokenizer is None and not again.training
    assert torch.equal(again(TOKENS), model(TOKENS))
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].requires_grad == theirs[n].requires_grad for n in ours)
    assert (again.head.weight is again.embed.weight) == (model.head.weight is model.embed.weight) if hasattr(model.head, "weight") else True

def test_the_tokenizer_comes_along(tmp_path, text_file):
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 400)
    save_model(tmp_path / "m", Transformer(GPT2), tokenizer)
    _, again = load_model(tmp_path / "m")
    assert again.encode("The quick brown fox") == tokenizer.encode("The quick brown fox")

def test_large_models_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 50_000)
    model = Transformer(GPT2).eval()
    save_model(tmp_path / "m", model)
    files = json.loads((tmp_path / "m" / "config.json").read_text())["files"]
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(load_model(tmp_path / "m")[0](TOKENS), model(TOKENS))
    os.remove(tmp_path / "m" / files[1])
    with pytest.raises(InputError, match=f"{files[1]} can't be read .FileNotFound"):
        load_model(tmp_path / "m")

def damage_cases():
    def truncate(path):
        raw = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(raw[:len(raw) // 2])

    def flip(path):
        raw = bytearray((path / "model.safetensors").read_bytes())
        raw[-5] ^= 1
        (path / "model.safetensors").write_bytes(raw)

    def edit(change):
        def apply(path):
            config = json.loads((path / "config.json").read_text())
            change(config)
            (path / "config.json").write_text(json.dumps(config))
        return apply
    yield truncate, "model.safetensors can't be read"
    yield flip, "model.safetensors was altered after it was written"
    yield edit(lambda c: c["architecture"].update(blocks=3)), "lacks 12 of .* tensors, blocks.2"
    yield edit(lambda c: c["architecture"].update(blocks=1)), "has 16 tensors that a gpt2 model doesn't have, blocks.1"
    yield edit(lambda c: c["architecture"].update(ffn=64)), "mlp.up.B has the shape .128, 8., its configuration asks for .64, 8."
    yield edit(lambda c: c["layers"]["blocks.0.mlp.up"].update(rank=9)), "mlp.up.A has the shape .8, 32., .* asks for .9, 32."
    yield edit(lambda c: c["layers"].pop("blocks.0.mlp.up")), "lacks 1 of .* tensors, blocks.0.mlp.up.weight"
    yield edit(lambda c: c["architecture"].update(surprise=1)), "surprise is 1, and no model can have that"
    yield lambda path: (path / "config.json").write_text("{"), "config.json can't be read as JSON"

@pytest.mark.parametrize("damage, message", list(damage_cases()))
def test_damage_is_one_clear_line(damage, message, tmp_path):
    model = Transformer(GPT2)
    replace_linears(model, 8)
    save_model(tmp_path / "m", model)
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "m")

def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no such folder or file, nor a known model"):
        load_model("no-such-model")

# ----------------------------------------------------------------------------- training state

def state_of(step):
    torch.manual_seed(step)
    return Transformer(GPT2), {"embed.weight#exp_avg": torch.full((3,), float(step))}, dict(step=step, args={})

def save(out, step):
    model, moments, state = state_of(step)
    replace_state(out, lambda new: save_model(new, model), moments, state)

def test_state_is_read_back_and_the_run_folder_is_a_model(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder, state, moments = read_state(tmp_path)
    assert state["step"] == 2 and torch.equal(moments["embed.weight#exp_avg"], torch.full((3,), 2.0))
    assert json.loads((tmp_path / "state.previous" / "state.json").read_text())["step"] == 1
    assert torch.equal(load_model(tmp_path)[0](TOKENS), state_of(2)[0].eval()(TOKENS))
    assert os.stat(tmp_path / "model.safetensors").st_ino == os.stat(folder / "model.safetensors").st_ino, "no second copy of the weights"

class Killed(BaseException):
    pass

def test_a_kill_between_any_two_file_operations_leaves_a_whole_state(tmp_path, monkeypatch):
    """Every call that changes the disk is a place to die at; afterwards the state is that of step 1 or 2, and the next save works."""
    calls = []

    def count(target, name):
        real = getattr(target, name)

        def wrapped(*args, **kw):
            if calls and calls[0] == 0:
                raise Killed
            if calls:
                calls[0] -= 1
            return real(*args, **kw)
        monkeypatch.setattr(target, name, wrapped)
    for target, name in ((os, "replace"), (os, "link"), (shutil, "rmtree"), (storage, "save_file"), (storage, "sync_folder")):
        count(target, name)
    seen, n = set(), 0
    while True:
        out = tmp_path / f"run{n}"
        calls.clear()
        save(out, 1)
        save(out, 2)
        calls.append(n)
        try:
            save(out, 3)
            finished = True
        except Killed:
            finished = False
        calls.clear()
        _, state, moments = read_state(out)
        assert moments["embed.weight#exp_avg"][0] == state["step"]
        seen.add(state["step"])
        load_model(out)
        save(out, 4)
        assert read_state(out)[1]["step"] == 4
        if finished:
            break
        n += 1
    assert seen == {2, 3} and n > 8

def test_a_damaged_state_falls_back_on_the_one_before(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    raw = bytearray((tmp_path / "state" / "optimizer.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "state" / "optimizer.safetensors").write_bytes(raw)
    assert read_state(tmp_path)[1]["step"] == 1
    assert "optimizer.safetensors was altered" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "state.previous")
    with pytest.raises(InputError, match="optimizer.safetensors was altered"):
        read_state(tmp_path)
    with pytest.raises(InputError, match="holds no training state: start without --resume"):
        read_state(tmp_path / "nowhere")

def test_a_full_disk_keeps_the_last_state_and_is_one_line(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)

    def full(*args, **kw):
        raise storage.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(SystemExit) as e:
        command(lambda: save(tmp_path, 2))
    assert e.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: No space left on device") and "free some space" in stderr and stderr.count("\n") == 1
    assert read_state(tmp_path)[1]["step"] == 1 and not (tmp_path / "state.partial").exists()

# ----------------------------------------------------------------------------- export and info

def exported_logits(folder):
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(TOKENS).logits

@pytest.mark.parametrize("model", [*variants(), pytest.param("lora", id="lora"), pytest.param("sharded", id="sharded")])
def test_transformers_loads_an_export_with_equal_logits(model, tmp_path, monkeypatch):
    if isinstance(model, str):
        kind, model = model, Transformer(LLAMA).eval()
        if kind == "lora":
            attach_lora(model, 4, 8, ["q", "down"])
            for m in model.modules():
                if hasattr(m, "B"):
                    torch.nn.init.normal_(m.B)
        else:
            monkeypatch.setattr(storage, "SHARD_BYTES", 40_000)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too
            p.add_(0.05 * torch.randn_like(p))
        ours = model(TOKENS)
    export(model, None, tmp_path / "hf")
    assert (exported_logits(tmp_path / "hf") - ours).abs().max() < 1e-5 * ours.abs().max()
    again, _ = load_model(tmp_path / "hf")
    assert (again(TOKENS) - ours).abs().max() < 1e-5 * ours.abs().max()

@pytest.mark.slow
def test_the_real_model_exported_gives_transformers_the_same_logits(tmp_path):
    try:
        model, tokenizer = load_model("smollm2-135m")
    except InputError as e:
        pytest.skip(f"no network: {e}")
    export(model, tokenizer, tmp_path / "hf")
    with torch.no_grad():
        ours = model(TOKENS)
    assert (exported_logits(tmp_path / "hf") - ours).abs().max() < 1e-3
    replace_linears(model, 64, method=1)
    export(model, tokenizer, tmp_path / "low")
    with torch.no_grad():
        ours = model(TOKENS)
    assert (exported_logits(tmp_path / "low") - ours).abs().max() < 1e-4 * ours.abs().max()

def test_export_takes_the_tokenizer_along_and_refuses_a_full_folder(tmp_path, text_file):
    from transformers import AutoTokenizer
    text = text_file.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], 400)
    save_model(tmp_path / "m", Transformer(GPT2), tokenizer)
    assert checkpoint.main(["export", str(tmp_path / "m"), str(tmp_path / "hf")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text[:2000], add_special_tokens=False) == tokenizer.encode(text[:2000])
    with pytest.raises(InputError, match="is not empty"):
        checkpoint.main(["export", str(tmp_path / "m"), str(tmp_path / "hf")])

def test_info_counts_layers_ranks_and_bytes(tmp_path, capsys):
    model = Transformer(GPT2)
    replace_linears(model, 8)
    save_model(tmp_path / "m", model)
    checkpoint.main(["info", str(tmp_path / "m")])
    lines = capsys.readouterr().out.splitlines()
    total = sum(p.numel() for p in model.parameters())
    assert f"{total / 1e6:,.1f}M parameters" in lines[-1]
    row = next(line for line in lines if line.startswith("blocks.*.mlp.up.A")).split()
    assert row[1:] == ["2", "8x32", "lowrank", "8", "32", f"{2 * 8 * 32 * 4 / 1e6:.2f}"]
    checkpoint.main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--bits", "4"])
    capsys.readouterr()
    checkpoint.main(["info", str(tmp_path / "q")])
    lines = capsys.readouterr().out.splitlines()
    assert f"{total / 1e6:,.1f}M parameters" in lines[-1], "packed numbers count as what they stand for"
    row = next(line for line in lines if line.startswith("blocks.*.mlp.up.A.q")).split()
    assert row[1:7] == ["2", "8x16", "quant", "lowrank", "8", "4"]
    assert all(len(line) <= 100 for line in lines[1:])

def test_loading_needs_little_more_than_the_model(tmp_path, run, monkeypatch):
    """Peak resident memory of loading a sharded model of 0.5 GB: the model, its largest tensor, and what Python with torch takes anyway."""
    config = Config("llama", vocab_size=32000, context=64, blocks=8, heads=8, kv_heads=8, width=1024, ffn=2816, tied=False)
    torch.manual_seed(0)
    model = Transformer(config)
    size = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert 0.5e9 < size < 0.8e9
    monkeypatch.setattr(storage, "SHARD_BYTES", 100 << 20)
    save_model(tmp_path / "ours", model)
    export(model, None, tmp_path / "hf")
    del model
    for folder, dtype in (("ours", "float32"), ("hf", "float32"), ("hf", "bfloat16")):
        code = (f"import torch, checkpoint; from common import device as runtime; checkpoint.build(checkpoint.CONFIGS['tiny'], {{}});"
                f" before = runtime.peak_memory(torch.device('cpu')); "
                f"m, _ = checkpoint.load_model({str(tmp_path / folder)!r}, dtype=torch.{dtype}); "
                f"print(runtime.peak_memory(torch.device('cpu')) - before)")
        done = run("-c", code)
        assert done.returncode == 0, done.stderr
        needed = size // (2 if dtype == "bfloat16" else 1)
        assert int(done.stdout) < needed + 1.1 * largest + 30e6, (folder, dtype, int(done.stdout), needed, largest)

# ----------------------------------------------------------------------------- quantized folders

@pytest.mark.parametrize("config, rank", [(GPT2, 0), (GPT2, 16), (LLAMA, 0), (LLAMA, 16), (QWEN2, 16)],
                         ids=["gpt2", "gpt2 r16", "llama", "llama r16", "qwen2 r16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_the_model_quantized_at_load_time(config, rank, bits, tmp_path):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    if rank:
        replace_linears(model, rank)
    save_model(tmp_path / "m", model)
    assert checkpoint.main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--bits", str(bits)]) == 0
    from_folder, _ = load_model(tmp_path / "q")
    at_load, _ = load_model(tmp_path / "m", bits=bits)
    wanted = copy.deepcopy(model)
    quantize(wanted, bits)
    with torch.no_grad():
        a, b, c = at_load(TOKENS), from_folder(TOKENS), wanted(TOKENS)
        assert torch.equal(a, c), "loading layer by layer is quantizing the whole"
        assert (b - c).abs().max() < 0.01 * c.abs().max(), "norms and biases are in 16 bit on disk"
        assert (a - model(TOKENS)).abs().max() < (0.05 if bits == 8 else 0.6) * model(TOKENS).abs().max()
    size = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in "mq"}
    assert size["q"] < size["m"] / (2 if bits == 8 else 2.5)

def test_random_init_makes_a_named_size(tmp_path, capsys):
    assert checkpoint.main(["quantize", "tiny", str(tmp_path / "q"), "--random-init", "--rank", "16", "--bits", "4"]) == 0
    model, tokenizer = load_model(tmp_path / "q")
    assert tokenizer is None and model.blocks[0].mlp.up.rank == 16 and torch.isfinite(model(TOKENS)).all()
    assert "parameters at 4 bit" in capsys.readouterr().out

def test_calibration_rounds_better_than_min_max(tmp_path, text_file):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 400)
    model = Transformer(LLAMA).eval()
    save_model(tmp_path / "m", model, tokenizer)
    tokens = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8")[-20000:])[:320]).view(10, 32)
    error = {}
    for name, extra in (("plain", ()), ("calibrated", ("--calibration", str(text_file)))):
        checkpoint.main(["quantize", str(tmp_path / "m"), str(tmp_path / name), "--bits", "4", *extra])
        with torch.no_grad():
            error[name] = (load_model(tmp_path / name)[0].hidden(tokens) - model.hidden(tokens)).square().mean().item()
    assert error["calibrated"] < error["plain"]  # of a random model, whose inputs hardly correlate; tests/test_quant.py has more

def test_bad_bits_and_groups_are_refused(tmp_path):
    save_model(tmp_path / "m", Transformer(GPT2))
    for args, message in ((("--group", "5"), "groups of 5 do not divide a row of 32"), (("--rank", "4"), "--rank goes with --random-init"),
                          (("--calibration", "builtin"), "--calibration needs the model's tokenizer")):
        with pytest.raises(InputError, match=message):
            checkpoint.main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), *args])
    with pytest.raises(InputError, match="--bits must be 4, 8 or 16, got 3"):
        load_model(tmp_path / "m", bits=3)
