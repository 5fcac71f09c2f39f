"""Continue a text with a model (sections III.C.2 and V.C: generation with a cache of keys and values).

    python sample.py --model out/train --prompt "The file"
    python sample.py --model smollm2-135m --prompt "The capital of France is" --temperature 0
    python sample.py --model smollm2-135m --chat
"""
import argparse
import sys
import time

import torch

from checkpoint import load_model
from model import generate
from runtime import InputError, command, find_device
from tokenizer import render_chat


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/train", help="a model folder, a file, or a known name (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights while loading (default: %(default)s)")
    p.add_argument("--prompt", default="\n", help="the text to continue (default: a new line)")
    p.add_argument("--chat", action="store_true", help="talk with an instruction-tuned model, in its own chat format")
    p.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write at most (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: %(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all (default: %(default)s)")
    p.add_argument("--top-p", type=float, default=0.95,
                   help="draw from the likeliest tokens that have this probability together (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (default: %(default)s)")
    p.add_argument("--no-cache", action="store_true", help="read the whole text again for every token, as in section III.C.2 (slow)")
    return p.parse_args(argv)


def write(model, tokenizer, ids, args, generator):
    """Stream the continuation of ids to the terminal; returns its text and the count of tokens."""
    stream, text, count = tokenizer.stream(), "", 0
    for step in generate(model, [ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.stop_ids, generator,
                         use_cache=not args.no_cache, vocabulary=tokenizer.vocab_size):
        count += 1
        if step[0] not in tokenizer.stop_ids:
            piece = stream.feed(step[0])
            text += piece
            print(piece, end="", flush=True)
    return text, count


def chat(model, tokenizer, args, generator):
    """Read lines, answer each with the whole conversation as the prompt, until an empty line or the end of input."""
    messages = []
    while line := _ask():
        messages.append(dict(role="user", content=line))
        ids = tokenizer.encode(render_chat(tokenizer, messages), special=True)
        text, _ = write(model, tokenizer, ids, args, generator)
        print()
        messages.append(dict(role="assistant", content=text.strip()))


def _ask():
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main(argv=None):
    args = parse(argv)
    device = find_device("float32")
    model, tokenizer = load_model(args.model, device.torch_device, getattr(torch, args.dtype), args.bits)
    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")
    generator = torch.Generator(device.torch_device).manual_seed(args.seed)
    if args.chat:
        if not tokenizer.chat_template:
            raise InputError(f"{args.model} has no chat template: use --prompt")
        return chat(model, tokenizer, args, generator)
    ids = tokenizer.encode(args.prompt)
    ids = ids if tokenizer.begin is None else [tokenizer.begin] + ids
    if not ids:
        raise InputError("the prompt is empty: give --prompt at least one character")
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    _, count = write(model, tokenizer, ids, args, generator)
    seconds = time.perf_counter() - start
    print()
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s on {device.name}]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    command(main)
