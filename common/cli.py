"""What every command needs: errors in one line, flags, a folder of its own, files never half written."""
import argparse
import errno
import fcntl
import itertools
import locale
import math
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from common.processes import rank, world_size

class InputError(ValueError):
    """The user's input is wrong. The message says what, with the values, and what to do."""

def refuse(wrong, message):
    """An InputError if the condition holds."""
    if wrong:
        raise InputError(message)

def cache_dir():
    """Where what was downloaded or tokenized once is kept: $FINGPT_CACHE, or ~/.cache/fingpt-hpc."""
    return Path(os.environ.get("FINGPT_CACHE") or Path.home() / ".cache" / "fingpt-hpc")

def say(*words):
    """Print a line, from the first process only."""
    if rank() == 0:
        print(*words, flush=True)

def interrupt(number, frame):
    raise KeyboardInterrupt(signal.Signals(number).name)

def command(main):
    """Run main() as a command: bad input and a full disk are one line on stderr and exit code 2."""
    if locale.getpreferredencoding(False).lower() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # all text is UTF-8, also where the locale is another
        os.execv(sys.executable, sys.orig_argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # of a character that it lacks the number
    signal.signal(signal.SIGINT, interrupt)
    if world_size() == 1:  # a process that waits for others would not hear it, and torchrun speaks for all
        signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main())
    except InputError as e:
        line = str(e)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        space = "free some space, or " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        if not e.filename and not space:
            raise  # nothing about a place that the user chose
        line = (f"{e.strerror}: {e.filename or 'while writing'}: {space}choose another --out-dir or "
                "$FINGPT_CACHE")
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not re.search("out of memory|allocate", str(e)):
            raise
        line = "out of memory: half the --batch-size, or --recompute block, needs less"
    except KeyboardInterrupt as e:
        print(f"\nstopped by {e}: what was not saved before is lost", file=sys.stderr)
        sys.exit(128 + signal.Signals[str(e)])
    print(f"error: {line}" if world_size() == 1 else f"error (process {rank()}): {line}", file=sys.stderr)
    sys.exit(2)

def check_folder(path, new=False):
    """Refuse what can't become a folder to write to; new: also what is one with something in it."""
    refuse(not str(path), "the name of the folder to write to is empty")
    whole = Path(path).absolute()
    there = next(p for p in (whole, *whole.parents) if p.exists())
    refuse(not there.is_dir(), f"{path}: {there} is a file: choose another folder")
    refuse(new and whole == Path.cwd(), f"{path} is the current folder: choose a new one")
    refuse(new and there == whole and any(whole.iterdir()), f"{path} is not empty: choose a new folder")

def move_aside(folder):
    """Move what is in a folder to the first FOLDER-N that is free, and return that."""
    folder = Path(folder)
    refuse(folder.absolute() == Path.cwd(), f"{folder.absolute()} holds earlier results and is the current "
           "folder, which can't be moved aside: choose another --out-dir")
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    aside.mkdir()
    for file in folder.iterdir():  # the folder itself stays, and its lock
        shutil.move(file, aside)
    return aside

@contextmanager
def alone_in(folder):
    """Inside, no other process comes here with this folder. A lock ends with its process, however that ends.
    Of torchrun's processes the first one has it. A new folder goes if it stays empty."""
    check_folder(folder)
    if rank() > 0:
        yield
        return
    new = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locks, inode = Path("/proc/locks"), os.fstat(handle).st_ino
        holder = re.search(rf"(\d+) \S+:{inode} ", locks.read_text()) if locks.exists() else None
        who = f"process {holder[1]}" if holder else "another process"
        raise InputError(f"{who} uses {folder}: wait for its end, or choose another --out-dir") from None
    except OSError as e:  # some file systems of a network have no locks
        say(f"{folder} can't be locked ({e.strerror}): start nothing else with this --out-dir")
    try:
        yield
    finally:
        with suppress(OSError):
            if new:
                os.rmdir(folder)  # while it is still ours
        os.close(handle)

def write_atomic(path, text):
    """A reader finds the old text or the new one, never a part: written beside, synced, renamed."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)

def markdown(header, rows, left=2):
    """A Markdown table; the first `left` columns are aligned at the left, the others at the right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * (w + 1) + ("-" if i < left else ":") for i, w in enumerate(widths)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's opening as it is, and the default behind each flag that has one."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, so that `command` prints one line and exits with 2."""

    def __init__(self, doc=None, **more):
        super().__init__(description=doc, formatter_class=Help, **more)

    def error(self, message):
        raise InputError(f"{message} (see --help)")

def number(kind, holds, wanted):
    """An argparse type: kind(text), refused with `wanted` unless holds(value)."""
    def convert(text):
        with suppress(ValueError):
            if holds(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
    return convert

at_least_0 = number(int, lambda n: n >= 0, "a whole number, at least 0")
at_least_1 = number(int, lambda n: n >= 1, "a whole number, at least 1")
seed = number(int, lambda n: 0 <= n < 1 << 62, "a whole number from 0 to 2^62")
positive = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
not_negative = number(float, lambda x: 0 <= x < math.inf, "a finite number, at least 0")
share = number(float, lambda x: 0 < x < 1, "between 0 and 1")
