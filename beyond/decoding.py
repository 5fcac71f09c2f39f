"""A step of decoding, one token of each row through the whole model, the fastest way at hand.

    generate(model, prompts, 100, make_step=decoding_step)

On a CPU that is one call of step_cpu.cpp (cpu_step.py). On a GPU it is a CUDA graph: a step of Llama2-7B
at int4 launches some four hundred kernels of a few microseconds each, which takes Python longer than the GPU
to run them. A graph records the launches once, in the time of about four steps, and replays the same kernels
on the same addresses. So nothing that changes from token to token may be a number in Python: tokens and slots
lie in tensors, and attention sees the whole cache, masked beyond each row's slot.
"""
import torch

from beyond.cpu_step import cpu_step
from common.generate import plain_step
from model import KVCache

def decoding_step(model, cache):
    """A step as of common.generate.plain_step, which it is where nothing faster takes the model."""
    step, device = None, torch.device(cache.device).type
    if device == "cpu":
        step = cpu_step(model, cache)
    elif device == "cuda" and type(cache) is KVCache:
        step = GraphStep(model, cache)
    return step or plain_step(model, cache)

class GraphCache(KVCache):
    """A KVCache with the next slot of each row in a tensor, for one token of each row."""
    uniform = False

    def __init__(self, cache):
        self.k, self.v, self.rows, self.device = cache.k, cache.v, cache.rows, cache.device
        self.slot = torch.zeros_like(cache.rows)  # (B, 1)
        self.lengths = [cache.capacity - 1] * len(cache.rows)  # so that attention is of all slots

    def positions(self, T):
        return self.slot

    def advance(self, T):
        pass

class GraphStep:
    """A CUDA graph, recorded at the first token. On a CPU the same step without a graph, for tests."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, GraphCache(cache), None
        self.tokens = self.cache.slot.clone()
        # pinned, so that the copy does not wait; the caller has read the tokens before it asks for others
        self.slots = torch.zeros(self.tokens.shape, dtype=torch.long, pin_memory=self.tokens.is_cuda)

    def __call__(self, tokens, cache):
        self.tokens.copy_(tokens[:, None])
        self.slots.copy_(torch.tensor(cache.lengths)[:, None])
        self.cache.slot.copy_(self.slots, non_blocking=True)
        cache.advance(1)
        if not self.tokens.is_cuda:
            return self.run()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.logits

    def run(self):
        return self.model.head(self.model.hidden(self.tokens, self.cache)[:, -1])

    def record(self):
        """Two runs before let the libraries choose kernels. They write the same keys to the same slots."""
        stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self.run()
