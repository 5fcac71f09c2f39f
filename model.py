"""The decoder-only transformer of the paper (section III.A, equations 1 to 3, Fig. 2), as one network with two settings.

               GPT-2                               Llama 2
    norm       LayerNorm                           RMSNorm
    positions  learned, added to the embedding     RoPE, rotating q and k
    attention  one matrix W^QKV, h heads           W^Q, W^K, W^V; several query heads may share a k, v head
    feed-fwd   W^D gelu(W^U x)                     W^D (silu(W^G x) * W^U x)
    biases     yes                                 no
    head W^H   the embedding W^E, shared (tied)    a matrix of its own

Nothing here knows about low rank, quantization or recomputation: those change a model from outside, by swapping its
linear layers (lowrank.py, quant.py) or the functions it calls (recompute.py).

    from model import Transformer, config_for
    model = Transformer(config_for("tiny", vocab_size=4096))
    logits = model(tokens)                            # (B, T) int64 -> (B, T, vocabulary)
    for step in generate(model, [prompt], 100): ...   # with a KV cache
"""
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import InputError


@dataclass(frozen=True)
class Config:
    """The architecture. `width` is the paper's n, `heads` its h, `blocks` its N, `ffn` the width inside the feed-forward."""
    kind: str = "gpt2"            # gpt2 or llama
    vocab_size: int = 50257
    context: int = 1024           # the longest sequence
    blocks: int = 12
    heads: int = 12
    kv_heads: int = 12            # fewer than heads: grouped-query attention
    width: int = 768
    ffn: int = 3072
    tied: bool = True             # the head is the embedding's matrix
    norm_eps: float = 1e-5
    rope_base: float = 10000.0    # llama only
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "context", "blocks", "heads", "kv_heads", "width", "ffn"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind not in ("gpt2", "llama"):
            raise InputError(f"kind must be gpt2 or llama, got {self.kind}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by {self.heads} heads: choose heads that divide it")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads can't share {self.kv_heads} key/value heads: the one must divide the other")
        if self.kind == "llama" and self.head_size % 2:
            raise InputError(f"RoPE turns pairs: the head size must be even, got {self.head_size} = {self.width}/{self.heads}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in 0..1 (1 excluded), got {self.dropout}")

    @property
    def head_size(self):
        return self.width // self.heads

    def as_dict(self):
        return asdict(self)


def _gpt2(blocks, heads, width, **more):
    return Config("gpt2", blocks=blocks, heads=heads, kv_heads=heads, width=width, ffn=4 * width, **more)


def _llama(blocks, heads, kv_heads, width, ffn, **more):
    return Config("llama", **dict(dict(vocab_size=32000, context=4096, tied=False, norm_eps=1e-5), **more),
                  blocks=blocks, heads=heads, kv_heads=kv_heads, width=width, ffn=ffn)


CONFIGS = {
    "tiny": _gpt2(4, 4, 128, context=256),
    "small": _gpt2(8, 8, 256, context=256),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "llama2-7b": _llama(32, 32, 32, 4096, 11008),
    "llama2-13b": _llama(40, 40, 40, 5120, 13824),
    "llama2-70b": _llama(80, 64, 8, 8192, 28672),
    "smollm2-135m": _llama(30, 9, 3, 576, 1536, vocab_size=49152, context=8192, tied=True, rope_base=100000.0),
}


def config_for(name, **changes):
    """The configuration of a known name, with some fields changed."""
    if name not in CONFIGS:
        raise InputError(f"no model is called {name!r}: known names are {', '.join(CONFIGS)}")
    return replace(CONFIGS[name], **changes)


# ----------------------------------------------------------------------------- what may take the place of a layer

class Layer(nn.Module):
    """The protocol of what other files put in the place of an nn.Linear, or (tokens for x, no in_features) of an nn.Embedding.

        in_features, out_features, bias     as of nn.Linear
        forward(x: (..., in))               -> (..., out)
        multiplications                     of one token, an int
        dense_weight()                      W (out, in) of the dense layer that computes the same
    """
    in_features = None

    def init_weights(self, std):
        """Random values, in place of a dense layer of deviation std."""
        raise InputError(f"a {type(self).__name__} has no random start: its values come from a trained layer")

    def with_lora(self, x, A, B, scale):
        """forward(x) + scale B (A x) in one launch, or None where there is no kernel for that."""
        return None

    def last_product(self, x, dtype):
        """h (..., k) and W (out, k) such that forward(x) = h W^T + bias; None where y is no such product.

        A loss in chunks multiplies with W itself (common/loss.py). dtype: of a W that is made for it, dequantized.
        """
        return None


def is_linear(module):
    return isinstance(module, nn.Linear) or isinstance(module, Layer) and module.in_features is not None


def multiplications(layer):
    """Of one token: an nn.Linear's, or what a Layer says."""
    return layer.multiplications if isinstance(layer, Layer) else layer.in_features * layer.out_features


def dense_weight(layer):
    """W (out, in) of any layer."""
    return layer.dense_weight() if isinstance(layer, Layer) else layer.weight


def last_product(layer, x, dtype):
    """h and W of the product that ends any layer, or None: see Layer.last_product."""
    return layer.last_product(x, dtype) if isinstance(layer, Layer) else (x, layer.weight)


# ----------------------------------------------------------------------------- the network

def rope_tables(positions, config):
    """cos and sin of the angles of RoPE (the paper's [32]): positions (..., T) -> two of (..., T, d/2), float32."""
    d = config.head_size
    frequency = config.rope_base ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)  # (d/2,)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Turn the pairs (x_i, x_{i+d/2}) of x (B, heads, T, d) by the angles of their positions."""
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in (cos, sin))  # (1 or B, 1, T, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v, equation 1. q (B, h, T, d); k, v (B, h_kv, S, d); mask (B, 1, T, S), True where it may look.

    Without a mask, T = S means causal, and T = 1 that the one query sees every key.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    attend = staticmethod(attend)  # recompute.py puts another function here

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        n, d, bias = config.width, config.head_size, config.kind == "gpt2"
        if config.kind == "gpt2":
            self.qkv = nn.Linear(n, 3 * n, bias=bias)
        else:
            self.q = nn.Linear(n, config.heads * d, bias=bias)
            self.k = nn.Linear(n, config.kv_heads * d, bias=bias)
            self.v = nn.Linear(n, config.kv_heads * d, bias=bias)
        self.o = nn.Linear(config.heads * d, n, bias=bias)

    def forward(self, x, rope=None, cache=None, mask=None):
        B, T, C = x.shape
        parts = self.qkv(x).split(C, dim=-1) if self.config.kind == "gpt2" else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(B, T, -1, self.config.head_size).transpose(1, 2) for p in parts)  # (B, heads, T, d)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        attend = self.attend
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, kv_heads, S, d)
            attend = cache.attend or attend
        y = attend(q, k, v, mask, self.config.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, m, bias = config.width, config.ffn, config.kind == "gpt2"
        self.gate = None if config.kind == "gpt2" else nn.Linear(n, m, bias=bias)
        self.up = nn.Linear(n, m, bias=bias)
        self.down = nn.Linear(m, n, bias=bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))  # equation 3


def make_norm(config):
    return (nn.LayerNorm if config.kind == "gpt2" else nn.RMSNorm)(config.width, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = Attention(config, layer)
        self.norm2 = make_norm(config)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), rope, cache, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocabulary). `hidden` and `head` are apart so that a loss can take both."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)  # W^E
        self.positions = nn.Embedding(config.context, config.width) if config.kind == "gpt2" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.blocks))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)  # W^H
        self.dropout = nn.Dropout(config.dropout)
        self.tie()
        if not self.norm.weight.is_meta:
            self.init_weights()

    def tie(self):
        if self.config.tied and isinstance(self.head, nn.Linear) and isinstance(self.embed, nn.Embedding):
            self.head.weight = self.embed.weight

    def materialize(self, device="cpu"):
        """Give a model built under torch.device("meta") its memory, not yet its values."""
        self.to_empty(device=device)
        self.tie()  # to_empty gives each place its own tensor
        return self

    def init_weights(self):
        """GPT-2's: deviation 0.02, and smaller by sqrt(2N) for the two matrices of a block that write to the residual stream."""
        def visit(module, name):
            std = 0.02 / (math.sqrt(2 * self.config.blocks) if name in ("o", "down") else 1)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, Layer):
                module.init_weights(std)
            else:
                for child_name, child in module.named_children():
                    visit(child, child_name)
        visit(self, "")

    def set_dropout(self, p):
        """Change the dropout of a model that was loaded."""
        self.config = replace(self.config, dropout=p)
        for module in self.modules():
            if isinstance(module, Attention):
                module.config = self.config
            elif isinstance(module, nn.Dropout):
                module.p = p

    def begin(self, tokens, cache=None):
        """What comes before the blocks: embeddings (B, T, C), and the rope tables and mask that every block is given."""
        T, start = tokens.shape[1], 0 if cache is None else cache.end
        if start + T > self.config.context:
            raise InputError(f"{start + T} tokens do not fit the context of {self.config.context}: shorten the prompt or the window")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions(T)
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        rope = rope_tables(positions, self.config) if self.config.kind == "llama" else None
        return self.dropout(x), rope, None if cache is None else cache.mask(T)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> what the head reads, (B, T, C)."""
        x, rope, mask = self.begin(tokens, cache)
        for block in self.blocks:
            x = block(x, rope, cache, mask)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def forward(self, tokens, cache=None):
        return self.head(self.hidden(tokens, cache))


# ----------------------------------------------------------------------------- counting

def count_parameters(model):
    """Every number the model stores as a weight, a shared one once."""
    return sum(p.numel() for p in model.parameters()) + sum(getattr(m, "packed_weights", 0) for m in model.modules())


def matmul_weights(model):
    """Weights that a token is multiplied with, one multiplication and one addition each: of all linear layers, the head included."""
    def visit(module):
        if isinstance(module, (nn.Linear, Layer)):
            return multiplications(module)
        return sum(visit(child) for child in module.children())
    return visit(model)


def flops_per_token(model, length, training=False):
    """Floating-point operations a token of a sequence of `length`: 2 for each weight, and for q k^T and s v, which look at
    half of the sequence on average, 2 x 2 x length/2 x (heads x head size) in each block. Training is three times that: the backward
    pass multiplies twice. Recomputation is not counted: it is no progress."""
    attention = 2 * length * model.config.heads * model.config.head_size * model.config.blocks
    return (2 * matmul_weights(model) + attention) * (3 if training else 1)


# ----------------------------------------------------------------------------- generation

class Cache:
    """The protocol of what remembers keys and values, so that only new tokens are read.

        lengths, end                  tokens of each row that are in it; the longest
        positions(T), mask(T)         of the next T tokens: (T,) or (B, T); (1 or B, 1, T, S), or None where all may be seen
        update(layer, k, v)           store k, v of the next T tokens in a layer; returns all keys and values
        advance(T)                    after the last layer: T more tokens are in it
        attend                        in place of the model's own attention (None: that one)
    """
    attend = None


class KVCache(Cache):
    """Keys and values of the tokens seen so far (section V.C), one contiguous block a layer: (B, kv_heads, length, d).

    Rows may have different lengths. A row's next token goes to its own next place, and a query at position p looks at
    the places 0..p, so what lies beyond a row's end (padding of a shorter prompt) is never seen, and is overwritten.
    """

    def __init__(self, config, batch, length, device="cpu"):
        self.capacity, self.device = length, device
        self.lengths = [0] * batch
        self.k = [None] * config.blocks
        self.v = [None] * config.blocks

    @property
    def end(self):
        return max(self.lengths)

    def positions(self, T):
        """Of the next T tokens of every row: (T,) if all rows are equally long, else (B, T)."""
        steps = torch.arange(T, device=self.device)
        return steps + self.end if self.uniform else steps + torch.tensor(self.lengths, device=self.device)[:, None]

    def mask(self, T):
        """(1 or B, 1, T, S), True where the key's place is not after the query's position; None where no mask is needed."""
        if self.uniform and (T == 1 or self.end == 0):
            return None
        keys = torch.arange(self.end + T, device=self.device)
        return (keys <= self.positions(T)[..., None]).reshape(-1, 1, T, self.end + T)

    def update(self, layer, k, v):
        """Store k, v (B, kv_heads, T, d) of the next T tokens; returns all keys and values, (B, kv_heads, S, d)."""
        B, H, T, d = k.shape
        if self.k[layer] is None:
            self.k[layer], self.v[layer] = (torch.zeros(B, H, self.capacity, d, dtype=k.dtype, device=k.device) for _ in range(2))
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.uniform:
                store[:, :, self.end:self.end + T] = new
            else:
                rows = torch.arange(B, device=k.device)[:, None]
                store[rows, :, self.positions(T)] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.end + T], self.v[layer][:, :, :self.end + T]

    def advance(self, T):
        self.lengths = [n + T for n in self.lengths]

    @property
    def uniform(self):
        return min(self.lengths) == max(self.lengths)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a token from each row of logits (B, V) -> (B,). Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p, order = logits.softmax(-1), None
    if top_p < 1:
        likeliest, order = p.topk(min(1024, p.shape[-1]))  # sorting a whole vocabulary takes several times as long, and is seldom needed
        if (likeliest.sum(-1) < top_p).any():
            likeliest, order = p.sort(descending=True)
        p = likeliest.masked_fill(likeliest.cumsum(-1) - likeliest >= top_p, 0)  # the likeliest token always stays
    draw = torch.multinomial(p, 1, generator=generator)
    return (draw if order is None else order.gather(-1, draw))[:, 0]


def check_sampling(temperature, top_k, top_p, max_new_tokens):
    for name, value, holds, range_ in (("temperature", temperature, temperature >= 0, "at least 0"), ("top-k", top_k, top_k >= 0, "at least 0"),
                                       ("top-p", top_p, 0 < top_p <= 1, "in 0..1, 0 excluded"),
                                       ("max-new-tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")):
        if not holds:
            raise InputError(f"{name} must be {range_}, got {value}")


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), generator=None, use_cache=True, vocabulary=None, cache=None,
             make_step=None):
    """Continue prompts (lists of token ids, of any lengths); yields after each step the new token of every row, None for a row that ended.

    A row ends at a token of `stop` (which is still yielded), after max_new_tokens, or where the context is full.
    Without the cache every step reads the whole text again, as in section III.C.2. `vocabulary`: draw from so many tokens only, where
    the tokenizer knows fewer than the model has. `cache`: in place of a new one; what it holds already are beginnings of the prompts,
    which are not read again (the longest beginning and the longest rest must fit the context together). `make_step(model, cache)` gives what
    takes single tokens (cudagraph.py, cpustep.py), or None where that can't be had.
    """
    check_sampling(temperature, top_k, top_p, max_new_tokens)
    config, device = model.config, next(model.parameters()).device
    for row in prompts:
        if not 1 <= len(row) <= config.context:
            raise InputError(f"a prompt has {len(row)} tokens: the model reads 1 to {config.context}")
        if max(row) >= config.vocab_size or min(row) < 0:
            wrong = max(row) if min(row) >= 0 else min(row)
            raise InputError(f"token {wrong} is outside the vocabulary 0..{config.vocab_size - 1}: is this the model's tokenizer?")
    rows, longest = [list(p) for p in prompts], max(map(len, prompts))
    if use_cache and cache is None:
        cache = KVCache(config, len(rows), min(config.context, longest + max_new_tokens), device)
    alive, new, take_one = [True] * len(rows), None, None
    for _ in range(max_new_tokens):
        alive = [a and len(r) <= config.context for a, r in zip(alive, rows)]
        if not any(alive):
            return
        if new is None or cache is None:  # whole prompts, padded at the right
            unread = [r[n:] for r, n in zip(rows, cache.lengths)] if cache else rows
            length = max(map(len, unread))
            tokens = torch.tensor([r + [0] * (length - len(r)) for r in unread], device=device)[:, :config.context]
            h = model.hidden(tokens, cache)  # (B, T, C)
            h = h[torch.arange(len(rows)), [min(len(r), h.shape[1]) - 1 for r in unread]]  # (B, C)
            if cache is not None:
                cache.lengths = [len(r) for r in rows]
            logits = model.head(h)  # (B, V)
        else:
            cache.lengths = [n if a else 0 for n, a in zip(cache.lengths, alive)]  # a row that ended writes where nobody looks
            if make_step:
                take_one, make_step = make_step(model, cache), None
            if take_one:
                logits = take_one(new, cache.lengths)
                cache.advance(1)
            else:
                logits = model.head(model.hidden(new[:, None], cache)[:, -1])
        new = sample(logits[:, :vocabulary], temperature, top_k, top_p, generator)  # (B,)
        step = [t if a else None for t, a in zip(new.tolist(), alive)]
        rows = [r + [t] if a else r for r, t, a in zip(rows, new.tolist(), alive)]
        alive = [a and t not in stop for a, t in zip(alive, step)]
        yield step
