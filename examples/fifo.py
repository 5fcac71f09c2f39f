# fifo.py: torchrun --nproc_per_node 2 examples/fifo.py --model tiny --rank 16 --pipeline 2 --schedule fifo
#
# Another schedule: GPipe whose backward passes come in the order of the forward passes.
#
# A schedule is a list of steps for each stage; the clock table, the picture and the processes all follow it.
import sys

sys.path.insert(0, ".")  # the repository's root, where this is started

import pipeline  # noqa: E402
from common.cli import command  # noqa: E402

known = pipeline.schedule

def schedule(kind, stages, microbatches):
    if kind != "fifo":
        return known(kind, stages, microbatches)
    return [[(step, m, s) for step in "FB" for m in range(microbatches)] for s in range(stages)]

pipeline.schedule, pipeline.SCHEDULES = schedule, (*pipeline.SCHEDULES, "fifo")

import train  # noqa: E402

if __name__ == "__main__":
    command(train.main)
