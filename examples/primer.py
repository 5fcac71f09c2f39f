"""Another architecture: GPT-2 with the squared ReLU of Primer, low-rank like any other, in a size of its own.

    python -m examples.primer --model mine --rank 16

A model's folder records sizes, not classes: to use it later, start sample.main from a file like this one.
"""
import torch.nn.functional as F

import model
import train
from common.cli import command

class SquaredReLU(model.FeedForward):
    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())

model.FeedForward = SquaredReLU
model.CONFIGS["mine"] = model.Config(blocks=4, heads=4, kv_heads=4, width=128, ffn=512, context=256)

if __name__ == "__main__":
    command(train.main)
