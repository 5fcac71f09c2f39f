"""When a process of a run is gone: the others end with a line that names it, instead of an address they can't reach, or a wait without end.

    with Watchdog():
        train()          # under torchrun; with --max-restarts the run then goes on from its last checkpoint
"""
import os
import sys
import threading
import time

import torch
import torch.distributed as dist


class Watchdog(threading.Thread):
    """Ends this process with a line that names the lost one, where it would fail with an address or wait forever.

    Every process counts up a number in the store that torchrun keeps. One whose number stands still is gone. It is looked for when a
    message fails (gloo raises at once), and from time to time (NCCL waits). Use as `with Watchdog(): ...`; without other processes it does nothing.
    """

    def __init__(self, beat=0.5, patience=60.0):
        super().__init__(daemon=True)
        self.beat, self.patience, self.ended = beat, patience, threading.Event()
        self.world, self.me = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def __enter__(self):
        if self.world > 1:
            started = torch.tensor(time.time_ns())
            dist.broadcast(started, 0)
            self.prefix = f"watch {started.item()}"  # after a restart the store may still hold what dead processes wrote
            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self.store.set(self.key("where", self.me), f"on {os.uname().nodename}, pid {os.getpid()}")
            self.store.set(self.key("beat", self.me), "0")
            self.start()
        return self

    def key(self, what, process):
        return f"{self.prefix}/{what}/{process}"

    def counts(self):
        return self.store.multi_get([self.key("beat", p) for p in range(self.world)])

    @staticmethod
    def still(before, now):
        """Processes whose count has not changed, and that did not end well."""
        return [p for p, (a, b) in enumerate(zip(before, now)) if a == b != b"done"]

    def run(self):
        count, seen, since = 0, [], time.monotonic()
        while not self.ended.wait(self.beat):
            count += 1
            try:
                self.store.set(self.key("beat", self.me), str(count))
                if time.monotonic() - since > self.patience:
                    now, since = self.counts(), time.monotonic()
                    if lost := self.still(seen, now):
                        self.leave(lost)
                    seen = now
            except RuntimeError as e:
                if not self.ended.is_set():
                    self.leave([], e)

    def leave(self, lost, error=None):
        """End at once, without a farewell to the others, which would wait for the lost one."""
        if lost:
            why = "lost " + ", ".join(f"process {p} ({self.store.get(self.key('where', p)).decode()})" for p in lost)
        else:
            why = f"lost the machine of process 0, where torchrun keeps its store ({str(error).splitlines()[0]})"
        advice = "torchrun --max-restarts 3, or --resume, goes on from the last checkpoint"
        print(f"error (process {self.me}): {why}. {advice}", file=sys.stderr, flush=True)
        os._exit(1)

    def explain(self):
        """After a message failed: if a process is gone, leave. It may take it a moment to die."""
        try:
            for _ in range(3):
                before = self.counts()
                time.sleep(3 * self.beat)
                if lost := self.still(before, self.counts()):
                    self.leave(lost)
        except RuntimeError as e:
            self.leave([], e)

    def __exit__(self, kind, error, traceback):
        if self.world == 1:
            return
        if isinstance(error, RuntimeError):
            self.explain()
        self.ended.set()
        self.join()
        if error is None:
            self.store.set(self.key("beat", self.me), "done")
