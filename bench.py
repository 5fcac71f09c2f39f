"""Every figure of results/, measured again on the machine at hand. Each bench is a file of benches/.

    python bench.py NAME              run it and print its table
    python bench.py NAME --json FILE  also write {"device": ..., "rows": [...]} to a file
    python bench.py NAME --help       its own options
    python bench.py tables            make results/README.md again from the files in results/

What is compared is timed in turn (a, b, c, a, b, c, ...) in one run, and medians are quoted: shared machines
drift by more than most differences. Ratios carry over to other machines, absolute times do not.
"""
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.cli import Parser, check_folder, command, write_atomic

FILES = [f for f in sorted(Path(__file__).parent.glob("benches/*.py")) if f.stem != "common"]
BENCHES = {f.stem: f.read_text().split("\n")[0].strip('"') for f in FILES}  # name -> its first line
RESULTS = Path(__file__).parent / "results"

def tables(text, folder=RESULTS):
    """The text with every block `<!-- FILE.json -->...<!-- end -->` made anew: the table of that record and
    its origin."""
    def block(match):
        record = json.loads((folder / match[1]).read_text())
        report = importlib.import_module(f"benches.{record['command'].split()[2]}").report
        origin = (f"`{record['command']}`, {record['device']}, torch {record['torch']}, {record['date']}, "
                  f"commit {record['commit']}; [rows]({match[1]})")
        return f"<!-- {match[1]} -->\n{report(record['rows'])}\n\n<sub>{origin}</sub>\n<!-- end -->"
    return re.sub(r"<!-- (\S+\.json) -->.*?<!-- end -->", block, text, flags=re.S)

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<12}{what}" for name, what in BENCHES.items())
    parser = Parser(__doc__, usage="bench.py NAME [options]", epilog="NAME is one of\n" + listing)
    parser.add_argument("name", choices=[*BENCHES, "tables"], metavar="NAME")
    name = parser.parse_args(argv[:1]).name
    if name == "tables":
        return write_atomic(RESULTS / "README.md", tables((RESULTS / "README.md").read_text()))
    from benches.common import parse
    module = importlib.import_module(f"benches.{name}")
    args = parse(name, module, argv[1:])
    if args.json:
        check_folder(Path(args.json).parent)
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items())
    device, rows = module.bench(args)
    print(f"{module.report(rows)}\n{device.name}, {flags}")
    if args.json:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        # another machine has other folders
        words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
        record = dict(command=" ".join(["python bench.py", *words]), device=device.name,
                      torch=torch.__version__, commit=git.stdout.strip(), date=time.strftime("%Y-%m-%d"),
                      rows=rows)
        write_atomic(args.json, json.dumps(record, indent=1) + "\n")
    return 0

if __name__ == "__main__":
    command(main)
