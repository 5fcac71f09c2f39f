"""Taking a model elsewhere: a dense Hugging Face folder, which transformers, peft and llama.cpp's converter read.

Every layer is multiplied out: B A of a low-rank one, W + s B A of an adapted one, s q + o of a quantized one; one at a time, so that memory
never holds the dense model. The command is `python checkpoint.py export MODEL OUT`.
"""
import json
import os
import shutil
from pathlib import Path

import torch

from common.cli import check_folder, write_atomic
from common.formats import their_name
from common.storage import SHARD_BYTES, write_tensors


def dense_tensors(model):
    """(name, tensor) of the dense model that computes the same: low-rank, blended, adapted and quantized layers multiplied out, one at a time."""
    def visit(module, prefix):
        if hasattr(module, "dense_weight"):
            yield prefix + "weight", module.dense_weight()
            if getattr(module, "bias", None) is not None:  # an embedding has none
                yield prefix + "bias", module.bias
            return
        for name, p in module.named_parameters(recurse=False):
            if not (prefix == "head." and p is getattr(model.embed, "weight", None)):  # a tied head is the embedding
                yield prefix + name, p
        for name, child in module.named_children():
            yield from visit(child, f"{prefix}{name}.")
    with torch.no_grad():
        yield from visit(model, "")


def huggingface_config(config, tied, dtype, tokenizer):
    """config.json of transformers' GPT2LMHeadModel or LlamaForCausalLM."""
    common = dict(vocab_size=config.vocab_size, tie_word_embeddings=tied, torch_dtype=str(dtype)[6:],
                  bos_token_id=tokenizer and tokenizer.begin, eos_token_id=tokenizer and sorted(tokenizer.stop_ids))
    if config.kind == "gpt2":
        return dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=config.context, n_embd=config.width, n_layer=config.blocks,
                    n_head=config.heads, n_inner=config.ffn, activation_function="gelu_new", layer_norm_epsilon=config.norm_eps, **common)
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], max_position_embeddings=config.context, hidden_size=config.width,
                num_hidden_layers=config.blocks, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, intermediate_size=config.ffn,
                rms_norm_eps=config.norm_eps, rope_theta=config.rope_base, hidden_act="silu", attention_bias=False, mlp_bias=False,
                head_dim=config.head_size, **common)


def export(model, tokenizer, out, dtype=torch.float32):
    """Write a dense Hugging Face folder, a shard at a time; it appears when it is complete."""
    out = Path(out)
    check_folder(out, new=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    column = model.config.kind
    prefix = "transformer." if column == "gpt2" else "model."
    shards, shard, size, names = [], {}, 0, set()
    for name, tensor in dense_tensors(model):
        theirs = their_name(name, column)
        if column == "gpt2" and tensor.dim() == 2 and name.startswith("blocks."):
            tensor = tensor.T  # their Conv1D keeps (in, out)
        shard[theirs if name.startswith("head.") else prefix + theirs] = tensor.to(dtype).contiguous()
        size += tensor.numel() * dtype.itemsize
        names.add(name)
        if size > SHARD_BYTES:
            shards, shard, size = shards + [_write_shard(partial, len(shards), shard)], {}, 0
    if shard:
        shards.append(_write_shard(partial, len(shards), shard))
    _name_shards(partial, shards)
    config = huggingface_config(model.config, "head.weight" not in names, dtype, tokenizer)
    write_atomic(partial / "config.json", json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)


def _write_shard(folder, number, tensors):
    file = f"shard{number}.safetensors"
    write_tensors(folder / file, tensors)
    return file, {n: t.nbytes for n, t in tensors.items()}


def _name_shards(folder, shards):
    """The names and the index that transformers expects, known only when all shards are written."""
    if len(shards) == 1:
        os.replace(folder / shards[0][0], folder / "model.safetensors")
        return
    weight_map = {}
    for i, (file, sizes) in enumerate(shards):
        new = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / file, folder / new)
        weight_map |= dict.fromkeys(sizes, new)
    total = sum(sum(sizes.values()) for _, sizes in shards)
    write_atomic(folder / "model.safetensors.index.json", json.dumps(dict(metadata=dict(total_size=total), weight_map=weight_map), indent=1) + "\n")
