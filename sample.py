"""Continue texts with a model (sections III.C.2 and V.C: generation with a cache of keys and values).

    python sample.py --model out/train --prompt "The file"
    python sample.py --model smollm2-135m --prompt "The capital of France is" --temperature 0
    python sample.py --model smollm2-135m --chat
    python sample.py --model smollm2-135m --adapter news=out/news --adapter tweets=out/tweets --prompts FILE.jsonl > answers.jsonl

A line of FILE.jsonl is {"prompt": "...", "adapter": "news"}; the adapter may be left out, null is the bare base. All lines advance together
(serve.py); each answer is a line of the output as soon as it is complete: {"line": 1, "text": "...", "tokens": [...], ...}.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from beyond.batching import Adapters, Engine, Request, common_length
from beyond.decoding import decoding_step
from beyond.paged_cache import SIZE, PagedCache, Pool, Sequence, bytes_per_token
from checkpoint import load_model
from common.adapters import base_id
from common.cli import InputError, check_positive, command
from common.device import find_device
from common.generate import check_sampling, generate
from common.tokenizer import render_chat


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", default="out/train", help="a model folder, a file, or a known name (default: %(default)s)")
    g.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights while loading (default: %(default)s)")
    g.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (default: %(default)s)")
    g.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                   help="an adapter of finetune.py or PEFT; several times with names for --prompts (default: the bare base)")
    g = p.add_argument_group("what to write")
    g.add_argument("--prompt", help="the text to continue (default: a new line)")
    g.add_argument("--prompts", metavar="FILE.jsonl", help="many texts at once, one a line; the answers go to standard output (default: --prompt)")
    g.add_argument("--chat", action="store_true", help="talk with an instruction-tuned model, in its own chat format")
    g = p.add_argument_group("draws")
    g.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write at most, for each prompt (default: %(default)s)")
    g.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: %(default)s)")
    g.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all (default: %(default)s)")
    g.add_argument("--top-p", type=float, default=0.95,
                   help="draw from the likeliest tokens that have this probability together (default: %(default)s)")
    g.add_argument("--seed", type=int, default=1, help="of the draws; line n of --prompts has seed + n - 1 (default: %(default)s)")
    g = p.add_argument_group("memory")
    g.add_argument("--no-cache", action="store_true", help="read the whole text again for every token, as in section III.C.2 (slow)")
    g.add_argument("--batch-size", type=int, default=32, help="prompts that advance together at most (default: %(default)s)")
    g.add_argument("--kv-memory", type=float, default=1024, metavar="MB", help="for keys and values, at most, of --prompts and --chat (default: %(default)s)")
    g.add_argument("--adapter-memory", type=float, metavar="MB", help="adapters in memory, at most; the least recently used leave (default: no limit)")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------- one text

def write(model, tokenizer, ids, args, generator, cache=None):
    """Stream the continuation of ids to the terminal; returns its text and its tokens."""
    stream, text, tokens = tokenizer.stream(), "", []
    for step in generate(model, [ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.stop_ids, generator,
                         use_cache=not args.no_cache, vocabulary=tokenizer.vocab_size, cache=cache,
                         make_step=decoding_step):
        tokens.append(step[0])
        if step[0] not in tokenizer.stop_ids:
            piece = stream.feed(step[0])
            text += piece
            print(piece, end="", flush=True)
    return text, tokens


def chat(model, tokenizer, args, generator):
    """Read lines, answer each with the whole conversation as the prompt, until an empty line or the end of input.

    What the cache has read of the conversation stays there between turns; the next prompt begins with nearly all of it.
    """
    pool = make_pool(model, args.kv_memory, model.config.context)
    cache, messages, read = None if args.no_cache else PagedCache([Sequence(pool)]), [], []
    while line := _ask():
        messages.append(dict(role="user", content=line))
        ids = tokenizer.encode(render_chat(tokenizer, messages), special=True)
        if cache:
            cache.lengths = [min(cache.end, common_length(read, ids[:-1]))]
        try:
            text, tokens = write(model, tokenizer, ids, args, generator, cache)
        except InputError as e:  # too long for the context, or for --kv-memory: the conversation goes on without it
            print(f"\nerror: {e}. This message is dropped; a larger --kv-memory or a new chat have more room", flush=True)
            messages.pop()
            read = []
            continue
        print()
        read = ids + tokens
        messages.append(dict(role="assistant", content=text.strip()))


def _ask():
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def one(model, tokenizer, args, generator, device):
    prompt = "\n" if args.prompt is None else args.prompt
    ids = with_begin(tokenizer, prompt)
    if not ids:
        raise InputError("the prompt is empty: give --prompt at least one character")
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    _, tokens = write(model, tokenizer, ids, args, generator)
    seconds = time.perf_counter() - start
    print()
    print(f"[{len(tokens)} tokens in {seconds:.1f} s, {len(tokens) / seconds:.1f} tokens/s on {device.name}]", file=sys.stderr)


def with_begin(tokenizer, text):
    ids = tokenizer.encode(text)
    return ids if tokenizer.begin is None else [tokenizer.begin] + ids


def make_pool(model, megabytes, tokens):
    """A pool for so many tokens, or as many as the memory holds."""
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    block = SIZE * bytes_per_token(model.config, dtype)
    if megabytes * 1e6 < block:
        raise InputError(f"--kv-memory {megabytes} MB is less than one block of {SIZE} tokens of this model, {block / 1e6:.1f} MB: raise it")
    return Pool(model.config, int(min(megabytes * 1e6 // block, -(-tokens // SIZE))), SIZE, device, dtype)


# ----------------------------------------------------------------------------- many texts

def read_prompts(file, tokenizer, args, default):
    """(line number, Request, its prompt) of every line that is not empty. A line that is wrong gives a Request with the error."""
    try:
        lines = Path(file).read_bytes().splitlines()
    except OSError as e:
        raise InputError(f"--prompts {file}: {e.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompt, adapter = read_line(line, default)
                error = None
            except InputError as e:
                prompt, adapter, error = "", None, str(e)
            rows.append((number, Request(with_begin(tokenizer, prompt), args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                                         args.seed + number - 1, adapter, error=error), prompt))
    if not rows:
        raise InputError(f'--prompts {file} is empty: write lines like {{"prompt": "..."}}')
    return rows


def read_line(line, default):
    """(prompt, adapter) of a line of --prompts."""
    form = 'a line is {"prompt": "...", "adapter": "NAME"}'
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"not JSON ({e}): {form}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise InputError(f"it has no text as its prompt: {form}")
    if unknown := sorted(set(row) - {"prompt", "adapter"}):
        raise InputError(f"unknown key {unknown[0]!r}: {form}")
    if not isinstance(row.get("adapter"), str | None):
        raise InputError(f"its adapter is no name: {form}")
    try:
        row["prompt"].encode()
    except UnicodeEncodeError as e:
        raise InputError(f"its prompt has half of a surrogate pair (character {e.start}): {form}") from None
    return row["prompt"], row.get("adapter", default)


def answer(number, request, prompt, tokenizer, start):
    """The line of output of a request that ended."""
    if request.error:
        return dict(line=number, prompt=prompt, error=request.error)
    seconds = request.ended - request.started
    return dict(line=number, prompt=prompt, adapter=request.adapter, text=tokenizer.decode([t for t in request.tokens if t not in tokenizer.stop_ids]),
                tokens=request.tokens, waited_seconds=round(request.started - start, 4), first_token_seconds=round(request.first - request.started, 4),
                seconds=round(seconds, 4), tokens_per_second=round(len(request.tokens) / seconds, 2))


def many(model, tokenizer, args, adapters, default):
    """Answer every line of --prompts."""
    rows = read_prompts(args.prompts, tokenizer, args, default)
    of = {id(request): (number, request, prompt) for number, request, prompt in rows}
    wanted = sum(len(r.prompt) + r.max_new_tokens + SIZE for _, r, _ in rows)
    engine = Engine(model, make_pool(model, args.kv_memory, wanted), tokenizer.stop_ids, tokenizer.vocab_size, adapters, args.batch_size)
    start, written, failed = time.perf_counter(), 0, []
    with tqdm(total=len(rows), unit=" prompts", disable=None) as bar:
        for request in engine.run(request for _, request, _ in rows):
            row = answer(*of[id(request)], tokenizer, start)
            print(json.dumps(row, ensure_ascii=False), flush=True)
            written += len(request.tokens)
            failed += [f"line {row['line']}: {row['error']}"] if "error" in row else []
            bar.set_postfix_str(f"{written / (time.perf_counter() - start):.1f} tokens/s", refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    print(f"[{len(rows) - len(failed)} prompts, {written} tokens in {seconds:.1f} s, {written / seconds:.1f} tokens/s; keys and values took "
          f"{engine.peak[0] / 1e6:.1f} MB at most, {engine.peak[1] / 1e6:.1f} MB of it in use]", file=sys.stderr)
    if failed:
        done = ", the others are done" if len(failed) < len(rows) else ""
        raise InputError(f"{len(failed)} of {len(rows)} lines of {args.prompts} failed{done}: " + "; ".join(failed[:3]))


def read_adapters(model, args):
    """(the adapters of --adapter, the name of the one that is used where none is asked for)."""
    folders = {}
    for word in args.adapter:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).is_dir():
            name, folder = word, word
        if not folder:
            raise InputError(f"--adapter {word} has no folder: write NAME=DIR")
        if name in folders:
            raise InputError(f"two adapters are called {name}: give each a name of its own")
        folders[name] = folder
    limit = args.adapter_memory and args.adapter_memory * 1e6
    adapters = Adapters(model, folders, base_id(args.model) if folders else None, limit)
    return adapters, next(iter(folders)) if len(folders) == 1 else None


def check(args):
    check_sampling(args.temperature, args.top_k, args.top_p, args.max_new_tokens)
    if args.prompt is not None and (args.prompts or args.chat):
        raise InputError("--prompt goes neither with --prompts nor with --chat: leave one out")
    if args.prompts and (args.chat or args.no_cache):
        raise InputError("--prompts goes neither with --chat nor with --no-cache: leave one out")
    if len(args.adapter) > 1 and not args.prompts:
        raise InputError(f"{len(args.adapter)} adapters, and nothing says which one to use: give one, or --prompts with a name in each line")
    check_positive(args, "batch_size", "kv_memory", *(["adapter_memory"] if args.adapter_memory is not None else []))
    if abs(args.seed) >= 1 << 62:
        raise InputError(f"--seed must be below 2^62, got {args.seed}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that can't show a character shows its number


def main(argv=None):
    args = parse(argv)
    check(args)
    device = find_device("float32")
    model, tokenizer = load_model(args.model, device.torch_device, getattr(torch, args.dtype), args.bits)
    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")
    adapters, default = read_adapters(model, args)
    if args.prompts:
        return many(model, tokenizer, args, adapters, default)
    adapters.select([default])
    generator = torch.Generator(device.torch_device).manual_seed(args.seed)
    if args.chat:
        if not tokenizer.chat_template:
            raise InputError(f"{args.model} has no chat template: use --prompt")
        return chat(model, tokenizer, args, generator)
    return one(model, tokenizer, args, generator, device)


if __name__ == "__main__":
    command(main)
