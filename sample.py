"""Continue texts with a model (sections III.C.2 and V.C: generation with a cache of keys and values).

    python sample.py --model out/train --prompt "The file"
    python sample.py --model smollm2-135m --prompt "The capital of France is" --temperature 0
    python sample.py --model smollm2-135m --chat
    python sample.py --model smollm2-135m --adapter news=out/a --adapter tweets=out/b --prompts FILE.jsonl

A line of FILE.jsonl is {"prompt": "...", "adapter": "news"}; the adapter may be left out, null is the bare
base. All lines advance together (beyond/batching.py); each answer is a line of the output as soon as it is
complete: {"line": 1, "adapter": "news", "text": "...", "tokens": [...]}.
"""
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_model
from common.adapters import base_id, load_adapter
from common.cli import InputError, Parser, at_least_1, command, not_negative, refuse
from common.device import find_device
from common.generate import generate
from common.tokenizer import Utf8Decoder, render_chat
from model import KVCache
from tasks.sets import read_jsonl

TOP_P = 0.95         # draw from the likeliest tokens that have this probability together
SEED = 1             # of the draws; line n of --prompts has SEED + n - 1
KV_MEMORY = 1 << 30  # bytes for the keys and values of many texts

def named_folders(words):
    """name -> folder of each NAME=DIR; the name of a DIR alone is the folder."""
    folders = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).is_dir():
            name = folder = word
        refuse(name in folders, f"two adapters are called {name}: give each a name of its own")
        folders[name] = folder
    return folders

def write(model, tokenizer, ids, args, generator, cache=None):
    """Stream the continuation of ids to the terminal; returns its text and its tokens."""
    from beyond.decoding import decoding_step
    decoder, text, tokens = Utf8Decoder("replace"), "", []
    steps = generate(model, [ids], args.max_new_tokens, args.temperature, TOP_P, tokenizer.stop_ids,
                     generator, vocabulary=tokenizer.vocab_size, cache=cache, make_step=decoding_step)
    for (token,) in steps:
        tokens.append(token)
        if token not in tokenizer.stop_ids:
            piece = decoder.decode(tokenizer.piece(token))
            text += piece
            print(piece, end="", flush=True)
    print()
    return text, tokens

def chat(model, tokenizer, args, generator):
    """Answer each line with the whole conversation as the prompt, until an empty line or the end of input.
    The cache stays between turns; the next prompt begins with nearly all that it has read."""
    refuse(not tokenizer.chat_template, f"{args.model} has no chat template: use --prompt")
    cache = KVCache(model.config, 1, model.config.context, model.norm.weight.device)
    messages, known = [], []
    with suppress(EOFError):  # the end of input
        while line := input("> ").strip():
            messages.append(dict(role="user", content=line))
            ids = tokenizer.encode(render_chat(tokenizer, messages), special=True)
            cache.lengths = [min(cache.end, len(os.path.commonprefix([known, ids[:-1]])))]
            try:
                text, tokens = write(model, tokenizer, ids, args, generator, cache)
            except InputError as e:  # too long for the context: the conversation goes on without this message
                print(f"\nerror: {e}. This message is dropped; a new chat has more room", flush=True)
                messages.pop()
                continue
            known = ids + tokens
            messages.append(dict(role="assistant", content=text.strip()))

def make_pool(model):
    """As many blocks as KV_MEMORY holds."""
    from beyond.paged_cache import SIZE, Pool, bytes_per_token
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    return Pool(model.config, KV_MEMORY // (SIZE * bytes_per_token(model.config, dtype)), SIZE, device, dtype)

def many(model, tokenizer, args, device):
    """Answer every line of --prompts. All are read and checked before the first is answered."""
    from beyond.batching import Adapters, Engine, Request
    folders = named_folders(args.adapter)
    adapters = Adapters(model, folders, base_id(args.model) if folders else None)
    engine = Engine(model, make_pool(model), tokenizer.stop_ids, tokenizer.vocab_size, adapters)
    default = next(iter(folders)) if len(folders) == 1 else None
    lines, start = {}, time.perf_counter()  # Request -> number of its line
    refuse(not Path(args.prompts).is_file(), f"--prompts {args.prompts}: there is no such file")
    for row, number in read_jsonl(Path(args.prompts), prompt=str):
        ids, adapter = tokenizer.encode(row["prompt"], around=True), row.get("adapter", default)
        request = Request(ids, args.max_new_tokens, args.temperature, TOP_P, SEED + number - 1, adapter)
        try:
            refuse(row.keys() - {"prompt", "adapter"}, 'a line is {"prompt": "...", "adapter": "NAME"}, the '
                   "adapter may be left out")
            engine.check(request)
        except InputError as e:
            raise InputError(f"{args.prompts}, line {number}: {e}") from None
        lines[request] = number
    refuse(not lines, f'--prompts {args.prompts} is empty: write lines like {{"prompt": "..."}}')
    for r in tqdm(engine.run(lines), total=len(lines), unit=" prompts", disable=None):
        text = tokenizer.decode([t for t in r.tokens if t not in tokenizer.stop_ids])
        row = dict(line=lines[r], adapter=r.adapter, text=text, tokens=r.tokens)
        print(json.dumps(row, ensure_ascii=False), flush=True)
    say_rate(sum(len(r.tokens) for r in lines), start, device)

def open_model(name, bits):
    """(model, tokenizer, device), in float32."""
    device = find_device("float32")
    model, tokenizer = load_model(name, device.torch_device, bits=bits)
    refuse(tokenizer is None, f"{name} has no tokenizer beside its weights: put a tokenizer.json there")
    return model, tokenizer, device

def say_rate(tokens, start, device):
    seconds = time.perf_counter() - start
    print(f"[{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s on {device.name}]",
          file=sys.stderr)

def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--model", default="out/train", help="folder, file or known name (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                   help="of finetune.py or PEFT; several with names for --prompts (default: the bare base)")
    p.add_argument("--bits", type=int, default=16, help="8 or 4: quantize (default: %(default)s)")
    given = p.add_mutually_exclusive_group()
    given.add_argument("--prompt", default="\n", help="the text to continue (default: a new line)")
    given.add_argument("--prompts", metavar="FILE.jsonl", help="many texts, one a line (default: --prompt)")
    given.add_argument("--chat", action="store_true", help="talk with an instruction-tuned model")
    p.add_argument("--max-new-tokens", type=at_least_1, default=200, help="at most (default: %(default)s)")
    p.add_argument("--temperature", type=not_negative, default=0.8, help="0: greedy (default: %(default)s)")
    args = p.parse_args(argv)
    refuse(len(args.adapter) > 1 and not args.prompts, f"{len(args.adapter)} adapters, and nothing says "
           "which one to use: give one, or --prompts with a name in each line")
    model, tokenizer, device = open_model(args.model, args.bits)
    if args.prompts:
        return many(model, tokenizer, args, device)
    for folder in named_folders(args.adapter).values():
        load_adapter(model, folder, base_id(args.model))
    generator = torch.Generator(device.torch_device).manual_seed(SEED)
    if args.chat:
        return chat(model, tokenizer, args, generator)
    start = time.perf_counter()
    print(args.prompt, end="", flush=True)
    _, tokens = write(model, tokenizer, tokenizer.encode(args.prompt, around=True), args, generator)
    return say_rate(len(tokens), start, device)

if __name__ == "__main__":
    command(main)
