"""Damaged files, thousands of them: whatever a reader does not refuse in one line has the oracle's values.

Each mutation is small, and of a tiny real folder or file; all are drawn from one seed."""
import json
import random
import struct

import gguf
import pytest
import torch
from test_formats import TOKENS, ours, theirs, write_gguf
from transformers import AutoModelForCausalLM

import checkpoint
from common import formats, gguf_file
from common.cli import InputError
from lowrank import replace_linears
from model import Transformer
from quant import quantize

VALUES = [None, True, False, -1, 0, 1, 2, 3, 8, 64, 0.5, -0.5, 1e-5, 1e300, 10 ** 400, float("nan"), float("inf"),
          "", "x", "1", "linear", "llama3", "default", "float64", [], [1], ["full_attention"], {},
          {"rope_type": "linear", "factor": 2.0}]
COMPARED = 40  # of the files that load, in each test

def places(content):
    """(object, key) of every value inside a JSON object."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places(value)

def damaged_json(draw, text):
    """One value, one key or one character of a JSON text is another."""
    content, kind = json.loads(text), draw.randrange(5)
    if kind == 0:
        at = draw.randrange(len(text))
        return text[:at] + chr(draw.randrange(32, 127)) + text[at + draw.randrange(2):]
    parent, key = draw.choice(list(places(content)))
    value = parent[key]
    if kind == 1 and isinstance(parent, dict):
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        other, name = draw.choice(list(places(content)))
        parent[str(name)] = parent.pop(key)
    elif kind == 3 and type(value) in (int, float):
        near = [value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)]
        parent[key] = draw.choice(near)
    else:
        parent[key] = draw.choice(VALUES)
    return json.dumps(content)

def damaged_bytes(draw, raw, end):
    """One to three bytes before `end` are others."""
    raw = bytearray(raw)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(end)
        raw[at] = draw.choice([raw[at] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255])
    return bytes(raw)

def loads(open_it):
    """What a reader returns, or None where it refuses in one line."""
    try:
        return open_it()
    except InputError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000, str(e)
        return None

def same_logits(model, reference):
    with torch.no_grad():
        a, b = model(TOKENS[:, :20]), reference(TOKENS[:, :20]).logits
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), equal_nan=True)

def reference_of(folder, **more):
    """transformers' model, or None where it refuses."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                           output_loading_info=True, **more)
    except Exception:
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else model.eval()

def survivors(damage, write, read, count):
    """(what was written, what was read) of the damaged files that are not refused."""
    draw, kept = random.Random(0), {}
    for _ in range(count):
        content = damage(draw)
        if content not in kept:
            write(content)
            kept[content] = loads(read)
    kept = [(content, got) for content, got in kept.items() if got is not None]
    draw.shuffle(kept)
    return kept

@pytest.mark.parametrize("kind, tied", [("llama", True), ("gpt2", True), ("qwen2", False)])
def test_config_json(kind, tied, tmp_path):
    theirs(kind, tied).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text, compared = file.read_text(), 0
    kept = survivors(lambda draw: damaged_json(draw, text), file.write_text,
                     lambda: checkpoint.open_model(tmp_path), 700)
    for content, source in kept[:COMPARED]:
        file.write_text(content)
        reference = reference_of(tmp_path)
        if reference is not None and source.config.context >= 20:
            assert same_logits(ours(tmp_path), reference), content
            compared += 1
    assert len(kept) > 50 and compared > 20

@pytest.mark.parametrize("damage", ["bytes", "json"])
def test_header_of_safetensors(damage, tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]

    def damaged(draw):
        if damage == "bytes":
            return damaged_bytes(draw, raw, end)
        header = damaged_json(draw, raw[8:end].decode()).encode()
        return struct.pack("<Q", len(header)) + header + raw[end:]
    kept = survivors(damaged, file.write_bytes, lambda: dict(checkpoint.open_model(tmp_path).tensors()), 1000)
    for content, _ in kept[:COMPARED]:
        file.write_bytes(content)
        assert same_logits(ours(tmp_path), reference_of(tmp_path))

def test_index_of_shards(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    whole, file = dict(checkpoint.open_model(tmp_path).tensors()), tmp_path / "model.safetensors.index.json"
    text = file.read_text()
    kept = survivors(lambda draw: damaged_json(draw, text), file.write_text,
                     lambda: dict(checkpoint.open_model(tmp_path).tensors()), 300)
    assert len(kept) > 20
    for _, tensors in kept:
        assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())

@pytest.mark.parametrize("bits", [16, 4])
def test_config_of_our_own_folders(bits, tmp_path):
    torch.manual_seed(0)
    model = Transformer(formats.Config("gpt2", 300, 64, 2, 4, 4, 48, 96)).eval()
    replace_linears(model, 8)
    if bits == 4:
        quantize(model, 4, 8)
    checkpoint.save_model(tmp_path, model)
    file, known = tmp_path / "config.json", dict(context=64, norm_eps=1e-5, kind="gpt2")
    text, wanted = file.read_text(), model(TOKENS)
    for content, (again, _) in survivors(lambda draw: damaged_json(draw, text), file.write_text,
                                         lambda: checkpoint.load_model(tmp_path), 500):
        architecture = json.loads(content)["architecture"]
        if all(architecture.get(name) == value for name, value in known.items()) and "heads" in architecture:
            assert architecture["heads"] != 4 or torch.equal(again(TOKENS), wanted), content

@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_header_of_gguf(kind, tmp_path):
    def vocabulary(writer):
        tokens = [chr(33 + i) if i < 94 else chr(256 + i) for i in range(290)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([*tokens, "ab", "cd"])
        writer.add_token_types([1] * 290 + [1, 3])
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(291)
        writer.add_eos_token_id(290)
    file, compared = tmp_path / "m.gguf", 0
    write_gguf(file, theirs(kind, kind == "llama"), gguf.GGMLQuantizationType.Q8_0, kind, vocabulary)
    raw = file.read_bytes()
    start = min(tensor.offset for tensor in gguf_file.read_gguf(file)[1].values())

    def read():
        source = checkpoint.open_model(file)
        return source.tokenizer(), dict(source.tensors())
    kept = survivors(lambda draw: damaged_bytes(draw, raw, start), file.write_bytes, read, 600)
    for content, _ in kept[:COMPARED]:
        file.write_bytes(content)
        reference = reference_of(tmp_path, gguf_file=file.name)
        if reference is not None:
            assert same_logits(ours(file), reference)
            compared += 1
    assert len(kept) > 50 and compared > 20
