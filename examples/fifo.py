"""Another schedule: GPipe whose backward passes come in the order of the forward passes.

    torchrun --nproc_per_node 2 -m examples.fifo --model tiny --rank 16 --pipeline 2 --schedule fifo

A schedule is a list of steps for each stage; the clock table, the picture and the processes all follow it.
"""
import pipeline
import train
from common.cli import command

known = pipeline.schedule

def schedule(kind, stages, microbatches):
    if kind != "fifo":
        return known(kind, stages, microbatches)
    return [[(step, m, s) for step in "FB" for m in range(microbatches)] for s in range(stages)]

pipeline.schedule, pipeline.SCHEDULES = schedule, (*pipeline.SCHEDULES, "fifo")

if __name__ == "__main__":
    command(train.main)
