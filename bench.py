"""Every figure of results/, measured again on the machine at hand. Each bench is a file of benches/.

    python bench.py NAME              run it and print its table
    python bench.py NAME --json FILE  also write {"device": ..., "rows": [...]} to a file
    python bench.py NAME --help       its own options
    python bench.py tables            make results/README.md again from the files in results/

What is compared is timed in turn (a, b, c, a, b, c, ...) in one run, and medians are quoted: shared machines
drift by more than most differences. Ratios carry over to other machines, absolute times do not.
"""
import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.cli import InputError, check_folder, command, write_atomic

BENCHES = {
    "train": "training GPT-2: full rank against r = 192, 96, 48",
    "memory": "Tables III and IV: bytes of a training step, counted without running it",
    "recompute": "what recomputation costs in time and saves in bytes",
    "pipeline": "utilization of GPipe and 1F1B, beside the formula and torch's",
    "decompose": "decomposing all layers, against a loop of torch.linalg.svd",
    "decode": "tokens a second at batch 1: ranks, bits, with and without the cache",
    "kernels": "each CUDA kernel against the copy bandwidth and its peers (needs a GPU)",
    "quant": "perplexity of each way to round the weights to 8 and 4 bits",
    "paper": "Tables V, VI and IX on the device at hand",
    "finetune": "LoRA on a quantized base, against transformers + peft",
    "serve": "one after another, batched, paged; one adapter and sixteen",
    "quality": "the loss of full rank, plain low rank, and what is meant to help, on the same tokens",
    "scores": "the seven tasks at 16, 8 and 4 bit",
    "chance": "the paper's accuracies, with what chance alone does",
    "eval": "PIQA, against EleutherAI's lm-evaluation-harness",
}


def tables(text, folder=Path(__file__).parent / "results"):
    """The text with every block `<!-- FILE.json -->...<!-- end -->` made anew: the table of that record and
    its origin."""
    def block(match):
        file = folder / match[1]
        if not file.exists():
            raise InputError(f"results/README.md shows {match[1]}, which is not there: make it with "
                             f"bench.py NAME --json results/{match[1]}")
        record = json.loads(file.read_text())
        report = importlib.import_module(f"benches.{record['command'].split()[2]}").report
        origin = (f"`{record['command']}`, {record['device']}, torch {record['torch']}, {record['date']}, "
                  f"commit {record['commit']}; [rows]({match[1]})")
        return f"<!-- {match[1]} -->\n{report(record['rows'])}\n\n<sub>{origin}</sub>\n<!-- end -->"
    return re.sub(r"<!-- (\S+\.json) -->.*?<!-- end -->", block, text, flags=re.S)


def main(argv=None):
    listing = "\n".join(f"  {name:<12}{what}" for name, what in BENCHES.items())
    parser = argparse.ArgumentParser(usage="bench.py NAME [options]", description=__doc__,
                                     epilog="NAME is one of\n" + listing,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*BENCHES, "tables"], metavar="NAME")
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv[:1]).name
    if name == "tables":
        readme = Path(__file__).parent / "results" / "README.md"
        return write_atomic(readme, tables(readme.read_text()))
    module = importlib.import_module(f"benches.{name}")
    p = argparse.ArgumentParser(prog=f"bench.py {name}", description=module.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    module.arguments(p)
    p.add_argument("--json", help="write the rows to this file too")
    args = p.parse_args(argv[1:])
    if args.json:
        check_folder(Path(args.json).parent)
    device, rows = module.bench(args)
    print(module.report(rows))
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True).stdout.strip()
        # another machine has other folders
        words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
        record = dict(command=" ".join(["python bench.py", *words]), device=device.name,
                      torch=torch.__version__, commit=commit,
                      date=time.strftime("%Y-%m-%d"), rows=rows)
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
