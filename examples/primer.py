# primer.py: python examples/primer.py --model mine --rank 16
#
# Another architecture: GPT-2 with the squared ReLU of Primer, low-rank like any other, in a size of its own.
#
# A model's folder records sizes, not classes: to use it later, start sample.main from a file like this one.
import sys

import torch.nn.functional as F

sys.path.insert(0, ".")  # the repository's root, where this is started

import model  # noqa: E402
from common.cli import command  # noqa: E402

class SquaredReLU(model.FeedForward):
    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())

model.FeedForward = SquaredReLU
model.CONFIGS["mine"] = model.Config(blocks=4, heads=4, kv_heads=4, width=128, ffn=512, context=256)

import train  # noqa: E402

if __name__ == "__main__":
    command(train.main)
