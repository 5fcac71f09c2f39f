"""Decoding as a CUDA graph: the launches of a whole step are recorded once and replayed for each token.

A step of Llama2-7B at int4 launches some four hundred kernels of a few microseconds each; Python takes longer to launch them than the GPU to run them.
A graph replays the same kernels on the same addresses. So nothing that changes from token to token may be a number in Python: the tokens and
their places lie in tensors, and attention sees the whole memory of the cache, masked beyond each row's place.

    generate(model, prompts, 100, make_step=Step)
    step = Step(model, cache)          # cache: a KVCache that has read the prompts
    logits = step(tokens, lengths)     # (B,) -> (B, vocabulary); lengths: how many places of each row are taken

On a CPU the same step runs without a graph, so that tests can compare it with the ordinary one.
"""
import torch

from model import Cache


class StepCache(Cache):
    """A KVCache with its places in a tensor: what model.hidden needs for one token of each row."""
    end = 0  # the caller knows that the tokens fit

    def __init__(self, cache):
        self.k, self.v, self.capacity = cache.k, cache.v, cache.capacity
        self.place = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.device)  # (B, 1)
        self.rows = torch.arange(len(cache.lengths), device=cache.device)[:, None]
        self.keys = torch.arange(cache.capacity, device=cache.device)

    def positions(self, T):
        return self.place

    def mask(self, T):
        return (self.keys <= self.place)[:, None, None]  # (B, 1, 1, S)

    def update(self, layer, k, v):
        """k, v (B, kv_heads, 1, d) of the next token -> all places of the cache, also those that the mask hides."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[self.rows, :, self.place] = new.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def advance(self, T):
        pass


class Step:
    """model.head(model.hidden(tokens)) for one token of each row, recorded at the first call."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, StepCache(cache), None
        self.tokens, self.on_gpu = self.cache.place.clone(), self.cache.place.is_cuda

    def __call__(self, tokens, lengths):
        self.tokens.copy_(tokens[:, None])
        self.cache.place.copy_(torch.tensor(lengths)[:, None])
        if not self.on_gpu:
            return self.run()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.logits

    def run(self):
        return self.model.head(self.model.hidden(self.tokens, self.cache)[:, -1])

    def record(self):
        """The runs before the recording let every library choose its kernels. They write the same keys to the same places, so they may run again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self.run()
