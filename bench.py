"""Every figure that the README quotes, measured again on the machine at hand. Each is a file of benches/.

    python bench.py NAME              run it and print its table
    python bench.py NAME --json FILE  also write {"device": ..., "rows": [...]} to a file
    python bench.py NAME --help       its own options

What is compared is timed in turn (a, b, c, a, b, c, ...) in one run, and medians are quoted: shared machines drift by more than most
differences. Ratios carry over to other machines, absolute times do not.
"""
import argparse
import importlib
import json
import subprocess
import sys
import time

import torch

from runtime import command, write_atomic

BENCHES = {
    "train": "training GPT-2: full rank against r = 192, 96, 48",
    "memory": "Tables III and IV: bytes of a training step, counted without running it",
    "recompute": "what recomputation costs in time and saves in bytes",
    "pipeline": "utilization of GPipe and 1F1B, beside the formula and torch's",
    "plan": "Llama2-70B on 512 GPUs, simulated: stages, memory, bubble, messages",
    "decompose": "decomposing all layers, against a loop of torch.linalg.svd",
    "decode": "tokens a second at batch 1: ranks, bits, with and without the cache",
    "kernels": "each CUDA kernel against the copy bandwidth and its peers (needs a GPU)",
    "quant": "perplexity of each way to round the weights to 8 and 4 bits",
    "finetune": "LoRA on a quantized base, against transformers + peft",
    "serve": "one after another, batched, paged; one adapter and sixteen",
    "eval": "PIQA, against EleutherAI's lm-evaluation-harness",
}


def main(argv=None):
    listing = "\n".join(f"  {name:<12}{what}" for name, what in BENCHES.items())
    parser = argparse.ArgumentParser(usage="bench.py NAME [options]", description=__doc__, epilog="NAME is one of\n" + listing,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHES, metavar="NAME")
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv[:1]).name
    module = importlib.import_module(f"benches.{name}")
    p = argparse.ArgumentParser(prog=f"bench.py {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.arguments(p)
    p.add_argument("--json", help="write the rows to this file too")
    args = p.parse_args(argv[1:])
    device, rows = module.bench(args)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = dict(command=" ".join(["python bench.py", *argv]), device=device.name, torch=torch.__version__, commit=commit,
                      date=time.strftime("%Y-%m-%d"), rows=rows)
        write_atomic(args.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
