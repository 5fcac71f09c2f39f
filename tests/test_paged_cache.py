"""paged_cache.py: the pool against a model of it, attention by blocks in float64, models against transformers and KVCache."""
import random

import pytest
import torch
from test_model import GPT2, LLAMA, pair

from beyond.paged_cache import PagedCache, Pool, Sequence, bytes_per_token
from common.cli import InputError
from common.generate import generate
from model import Config

SMALL = Config("llama", blocks=1, heads=4, kv_heads=2, width=32, ffn=8, vocab_size=10)

@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_paged_cache_gives_the_logits_of_transformers(config, size):
    """A prompt of 20, then a piece of 5 at once, then one token at a time."""
    ours, theirs = pair(config)
    tokens = torch.randint(0, config.vocab_size, (2, 30))
    pool, start, pieces = Pool(config, 80, size), 0, []
    cache = PagedCache([Sequence(pool), Sequence(pool)])
    with torch.no_grad():
        for length in (20, 5, 1, 1, 1, 1, 1):
            pieces.append(ours(tokens[:, start:start + length], cache))
            start += length
        b = theirs(tokens).logits
    assert (torch.cat(pieces, 1) - b).abs().max() < 1e-5 * b.abs().max()

@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_generate_writes_the_same_with_a_paged_cache(config, size):
    ours, _ = pair(config)
    prompts = [[1, 2, 3], [4] * 20, [7, 8], list(range(45))]  # the last one ends at the context
    pool = Pool(config, 48 * 4 // size + 8, size)
    contiguous = list(generate(ours, prompts, 12, temperature=0))
    sequences = [Sequence(pool) for _ in prompts]
    assert list(generate(ours, prompts, 12, temperature=0, cache=PagedCache(sequences))) == contiguous
    for i, prompt in enumerate(prompts):
        alone = [s[0] for s in generate(ours, [prompt], 12, temperature=0, cache=PagedCache([Sequence(pool)]))]
        assert alone == [step[i] for step in contiguous if step[i] is not None]

def test_what_the_cache_holds_already_is_not_read_again():
    """As a chat does: the second prompt begins with the first and its answer."""
    ours, _ = pair(LLAMA)
    cache, read = PagedCache([Sequence(Pool(LLAMA, 20, 4))]), []
    hook = ours.embed.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].shape[1]))
    first = [s[0] for s in generate(ours, [[1, 2, 3, 4, 5]], 6, temperature=0, cache=cache)]
    text = [1, 2, 3, 4, 5] + first + [9, 8, 7]
    assert cache.end == 10, "the last token was written down, not read"
    second = [s[0] for s in generate(ours, [text], 6, temperature=0, cache=cache)]
    assert read == [5] + [1] * 5 + [4] + [1] * 5
    hook.remove()
    assert second == [s[0] for s in generate(ours, [text], 6, temperature=0)]

def filled_batch(lengths, size, blocks, dtype=torch.float32):
    """A batch whose rows hold `lengths` random tokens, written one by one in turn so that their blocks
    interleave; also what was written, as (k, v) of each row, (kv_heads, length, d)."""
    torch.manual_seed(0)
    pool = Pool(SMALL, blocks, size, dtype=dtype)
    pool.kv.fill_(float("nan"))  # memory that was never written may hold anything
    rows, written = [Sequence(pool) for _ in lengths], [torch.randn(2, 2, n, 8, dtype=dtype) for n in lengths]
    for at in range(max(lengths)):
        todo = [i for i, n in enumerate(lengths) if at < n]
        write([rows[i] for i in todo], [written[i][:, :, at:at + 1] for i in todo])
    return rows, written

def write(sequences, pieces):
    """What a model does in a step, in its one layer."""
    cache, T = PagedCache(sequences), pieces[0].shape[2]
    cache.positions(T)
    cache.mask(T)
    cache.update(0, *torch.stack(pieces, 1))
    cache.advance(T)

def softmax_attention(q, k, v):
    """Equation 1 for one row in float64: q (h, d), k and v (kv_heads, S, d)."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 0), v.double().repeat_interleave(2, 0)
    return ((q[:, None] @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1).matmul(v)[:, 0]

@pytest.mark.parametrize("lengths, size, leave", [
    ([1, 7, 30, 16], 4, ()),       # read as the pool lies
    ([20, 9, 30, 5], 4, (1,)),     # with holes where a row has left
    ([20, 9, 40, 5], 4, (0, 2)),   # with so many holes that blocks are gathered
    ([3, 5, 2], 16, ())])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_attention_by_blocks_is_equation_1(lengths, size, leave, dtype, tolerance):
    rows, written = filled_batch(lengths, size, 64, dtype)
    for i in leave:
        rows[i].cut()
    stay = [i for i in range(len(lengths)) if i not in leave]
    cache = PagedCache([rows[i] for i in stay])
    q, k, v = torch.randn(len(stay), 4, 1, 8, dtype=dtype) * 5, *torch.randn(2, len(stay), 2, 1, 8, dtype=dtype)
    cache.positions(1)
    mask = cache.mask(1)
    y = cache.attend(q, *cache.update(0, k, v), mask)
    for j, i in enumerate(stay):
        wanted = softmax_attention(q[j, :, 0], *(torch.cat((old, new[j]), 1) for old, new in zip(written[i], (k, v))))
        assert (y[j, :, 0] - wanted).abs().max() < tolerance * 4, (i, dtype)

def test_a_pool_through_a_long_random_life():
    """Sequences come, grow, shrink and go; after every step tables and contents are what a plain list says."""
    draw, pool = random.Random(0), Pool(SMALL, 24, 3)
    alive = []  # (sequence, the numbers that it should hold)
    for number in range(600):
        action = draw.choice(["new", "grow", "grow", "grow", "cut", "end"])
        if action == "new":
            alive.append((Sequence(pool), []))
        elif alive:
            i = draw.randrange(len(alive))
            sequence, held = alive[i]
            if action == "grow" and sequence.needs(T := draw.randint(1, 5)) <= len(pool.free):
                values = torch.arange(number, number + T).float()
                before = len(pool.free)
                needed = sequence.needs(T)
                write([sequence], [values[None, None, :, None].expand(2, 2, T, 8)])
                assert before - len(pool.free) == needed
                held.extend(values.tolist())
            elif action == "cut":
                n = draw.randint(0, len(held))
                sequence.cut(n)
                del held[n:]
            elif action == "end":
                sequence.cut()
                alive.pop(i)
        used = []
        for sequence, held in alive:
            assert sequence.length == len(held)
            places = [(sequence.table[j // 3], j % 3) for j in range(len(held))]
            assert [pool.kv[0, 1, block, 1, offset, 7].item() for block, offset in places] == held
            used += sequence.table
        assert sorted(used + pool.free) == list(range(24))

def test_the_bytes_of_a_token():
    assert bytes_per_token(SMALL) == 1 * 2 * 2 * 8 * 4

def test_a_full_pool_says_so():
    ours, _ = pair(GPT2)
    pool = Pool(GPT2, 3, 4)
    with pytest.raises(InputError, match="all 3 blocks of 4 tokens of the cache are in use: give the pool more"):
        list(generate(ours, [[1, 2, 3]], 40, temperature=0, cache=PagedCache([Sequence(pool)])))
    with pytest.raises(InputError, match="a pool needs at least 1 block of 16 tokens, got 0"):
        Pool(GPT2, 0)
