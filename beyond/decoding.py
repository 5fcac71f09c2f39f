"""A step of decoding: one token of each row through the whole model, the fastest way at hand.

    generate(model, prompts, 100, make_step=decoding_step)

make_step(model, cache), called when the cache has read the prompts, returns a step, or None:

    step(tokens, lengths) -> logits     tokens (B,), logits (B, vocabulary); lengths: slots of each row of the
                                        cache that are taken. Keys and values go to the next slots; the caller
                                        advances the cache
"""
from beyond.paged_cache import PagedCache
from model import KVCache


def decoding_step(model, cache):
    """A CUDA graph on a GPU, one call of kernels_cpu.cpp on a CPU; None where neither takes the model."""
    if type(cache) is PagedCache and cache.pool.kv.is_cuda or type(cache) not in (KVCache, PagedCache):
        return None
    if type(cache) is KVCache and cache.k[0].is_cuda:
        from beyond.cuda_graph import GraphStep
        return GraphStep(model, cache)
    from beyond.cpu_step import cpu_step
    return cpu_step(model, cache)
