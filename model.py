"""The decoder-only transformer (section III.A, equations 1 to 3, Fig. 2); its relatives are rows of data.

               GPT-2                              Llama                               as Llama, but
    norm       LayerNorm                          RMSNorm                             Qwen3: of q and k too
    positions  a table, added to the embedding    RoPE, rotating q and k              SmolLM3: some blocks
    attention  one matrix W^QKV, h heads          W^Q, W^K, W^V; heads share k, v     Mistral: in a window
    feed-fwd   W^D gelu(W^U x)                    W^D (silu(W^G x) * W^U x)
    biases     everywhere but in the head         none                                Qwen2: in W^Q, W^K, W^V

The head W^H is the embedding W^E (tied) or a matrix of its own. Low rank, quantization and recomputation
change a model from outside: they swap its layers (lowrank.py, quant.py) or what it calls (recompute.py).

    model = Transformer(config_for("tiny", vocab_size=4096))
    logits = model(tokens)                                   # (B, T) int64 -> (B, T, vocabulary)
    logits = model(new, cache)                               # of new tokens, when a KVCache has the others
"""
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import InputError, refuse
from common.rope import apply_rope, check_rope, rope_tables

@dataclass(frozen=True)
class Architecture:
    """What tells two networks of this file apart, besides their sizes."""
    norm: type      # nn.LayerNorm or nn.RMSNorm
    rope: bool      # positions turn q and k (the paper's [32]); if not, they have a learned table
    inputs: tuple   # the matrices with which attention reads x: W^QKV, or W^Q, W^K and W^V
    gate: bool      # the feed-forward has a gate W^G
    biases: tuple   # the matrices that have a bias
    qk_norm: bool = False  # q and k of each head are normalized

QKV = ("q", "k", "v")
LLAMA = Architecture(nn.RMSNorm, True, inputs=QKV, gate=True, biases=())
ARCHITECTURES = {
    "gpt2": Architecture(nn.LayerNorm, False, inputs=("qkv",), gate=False, biases=("qkv", "o", "up", "down")),
    "llama": LLAMA, "mistral": LLAMA, "smollm3": LLAMA,
    "qwen2": replace(LLAMA, biases=QKV), "qwen3": replace(LLAMA, qk_norm=True)}

@dataclass(frozen=True)
class Config:
    """A network: its architecture and its sizes. The paper's n is `width`, its h `heads`, its N `blocks`."""
    kind: str = "gpt2"            # a row of ARCHITECTURES
    vocab_size: int = 50257
    context: int = 1024           # the longest sequence
    blocks: int = 12
    heads: int = 12
    kv_heads: int = 12            # fewer than heads: grouped-query attention
    width: int = 768
    ffn: int = 3072               # the width inside the feed-forward
    tied: bool = True             # the head is the embedding's matrix
    norm_eps: float = 1e-5
    rope_base: float = 10000.0    # with RoPE only
    dropout: float = 0.0          # the 12th: up to here of all models, from here on of some
    head_dim: int = 0             # of each head; 0: width / heads
    attention_bias: bool = False  # W^Q, W^K, W^V and W^O have a bias
    no_rope: tuple = ()           # blocks without RoPE
    window: int = 0               # a query sees so many tokens, its own the last of them; 0: all
    rope_scaling: str = "linear"  # common/rope.py has its kinds, and what the numbers mean
    rope_factor: float = 1.0
    rope_original: int = 0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_attention: float = 1.0

    def __post_init__(self):
        for name in ("vocab_size", "context", "blocks", "heads", "kv_heads", "width", "ffn"):
            refuse(getattr(self, name) < 1, f"{name} must be at least 1, got {getattr(self, name)}")
        refuse(self.kind not in ARCHITECTURES, f"kind is {self.kind}, none of {', '.join(ARCHITECTURES)}")
        refuse(self.width % self.heads and not self.head_dim,
               f"width {self.width} is not divisible by {self.heads} heads")
        refuse(self.heads % self.kv_heads, f"{self.heads} heads can't share {self.kv_heads} key/value heads")
        refuse(not 0 <= self.dropout < 1, f"dropout must be in 0..1 (1 excluded), got {self.dropout}")
        refuse(not {*self.no_rope} <= set(range(self.blocks)),
               f"no_rope {self.no_rope} must be blocks 0..{self.blocks - 1}")
        if self.architecture.rope:
            check_rope(self)

    @property
    def architecture(self):
        return ARCHITECTURES[self.kind]

    @property
    def head_size(self):
        return self.head_dim or self.width // self.heads

    @property
    def biases(self):
        return self.architecture.biases + ((*QKV, "o") if self.attention_bias else ())

    def make_norm(self, size=None):
        return self.architecture.norm(size or self.width, eps=self.norm_eps)

    def as_dict(self):
        """The settings of all models, and those of some where they are not as above."""
        items = enumerate(asdict(self).items())
        return {name: value for i, (name, value) in items if i < 12 or value != getattr(Config, name)}

CONFIGS = {name: Config(*row) for name, *row in (
    #                kind     vocabulary context blocks heads kv_heads width    ffn   tied
    ("tiny",         "gpt2",    50257,    256,     4,    4,    4,       128,    512),
    ("gpt2",         "gpt2",    50257,   1024,    12,   12,   12,       768,   3072),
    ("gpt2-medium",  "gpt2",    50257,   1024,    24,   16,   16,      1024,   4096),
    ("gpt2-large",   "gpt2",    50257,   1024,    36,   20,   20,      1280,   5120),
    ("gpt2-xl",      "gpt2",    50257,   1024,    48,   25,   25,      1600,   6400),
    ("llama2-7b",    "llama",   32000,   4096,    32,   32,   32,      4096,  11008, False),
    ("llama2-13b",   "llama",   32000,   4096,    40,   40,   40,      5120,  13824, False),
    ("llama2-70b",   "llama",   32000,   4096,    80,   64,    8,      8192,  28672, False),
    ("smollm2-135m", "llama",   49152,   8192,    30,    9,    3,       576,   1536, True, 1e-5, 1e5))}

def config_for(name, **changes):
    """The configuration of a known name, with some fields changed."""
    refuse(name not in CONFIGS, f"no model is called {name!r}: known names are {', '.join(CONFIGS)}")
    return replace(CONFIGS[name], **changes)

class Layer(nn.Module):
    """The protocol of what replaces an nn.Linear, or (tokens for x, no in_features) an nn.Embedding.

        in_features, out_features, bias     as of nn.Linear
        forward(x: (..., in))               -> (..., out)
        multiplications                     of one token, an int
        dense_weight()                      W (out, in) of the dense layer that computes the same
        init_weights(std)                   random values in place of a dense layer's of deviation std"""
    in_features = None

    def with_lora(self, x, A, B, scale):
        """forward(x) + scale B (A x) in one launch, or None where there is no kernel for that."""
        return None

    def last_product(self, x, dtype):
        """h (..., k) and W (out, k) such that forward(x) = h W^T + bias, for common/loss.py, which multiplies
        with W itself; None where y is no such product. dtype: of a W that is made for it."""
        return None

    def with_weight(self, W):
        """A layer of the same format whose weight is W (out, in), for merging an adapter."""
        raise InputError(f"an adapter can't be merged into a {type(self).__name__}: take the 16-bit base")

class Packed(nn.Module):
    """Weights that are no parameters, as integers are: `packed_weights` of them."""

def is_linear(module):
    return isinstance(module, nn.Linear) or isinstance(module, Layer) and module.in_features is not None

def multiplications(layer):
    """Of one token, in any layer."""
    return layer.multiplications if isinstance(layer, Layer) else layer.in_features * layer.out_features

def dense_weight(layer):
    """W (out, in) of any layer."""
    return layer.dense_weight() if isinstance(layer, Layer) else layer.weight

def last_product(layer, x, dtype):
    """h and W of the product that ends any layer, or None: see Layer.last_product."""
    return layer.last_product(x, dtype) if hasattr(layer, "last_product") else (x, layer.weight)

def visible(queries, keys, window=0):
    """Whether a query sees a key: positions (T,) or (B, T) and (S,) or (B, S) -> (1 or B, 1, T, S)."""
    queries, keys = queries[..., :, None], keys[..., None, :]
    seen = (keys <= queries) & (keys > queries - (window or 1 << 40))
    return seen.reshape(-1, 1, *seen.shape[-2:])

def attend(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v, equation 1. q (B, h, T, d); k, v (B, h_kv, S, d) -> (B, h, T, d).

    mask (B, 1, T, S): True where it may look. None: causal if T = S, everything if T = 1."""
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                                          enable_gqa=q.shape[1] != k.shape[1])

class Attention(nn.Module):
    attend = staticmethod(attend)  # recompute.py puts another function here

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.turns = layer not in config.no_rope
        n, d, biases = config.width, config.head_size, config.biases
        sizes = {"qkv": 3 * config.heads * d, "q": config.heads * d}
        for name in config.architecture.inputs:
            self.add_module(name, nn.Linear(n, sizes.get(name, config.kv_heads * d), bias=name in biases))
        self.q_norm = config.make_norm(d) if config.architecture.qk_norm else None
        self.k_norm = config.make_norm(d) if config.architecture.qk_norm else None
        self.o = nn.Linear(config.heads * d, n, bias="o" in biases)

    def forward(self, x, rope=None, cache=None, mask=None):
        B, T, _ = x.shape
        fused = self.config.architecture.inputs == ("qkv",)
        parts = self.qkv(x).chunk(3, dim=-1) if fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(B, T, -1, self.config.head_size).transpose(1, 2) for p in parts)  # (B, heads, T, d)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and self.turns:
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
        n, m, biases = config.width, config.ffn, config.biases
        self.gate = nn.Linear(n, m, bias="gate" in biases) if config.architecture.gate else None
        self.up = nn.Linear(n, m, bias="up" in biases)
        self.down = nn.Linear(m, n, bias="down" in biases)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))  # equation 3

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = config.make_norm()
        self.attention = Attention(config, layer)
        self.norm2 = config.make_norm()
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), rope, cache, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))

class Transformer(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocabulary). A loss can take `hidden` and `head` apart."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)  # W^E
        self.positions = None if config.architecture.rope else nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.blocks))
        self.norm = config.make_norm()
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)  # W^H
        self.dropout = nn.Dropout(config.dropout)
        self.init_weights()

    def tie(self):
        if self.config.tied and isinstance(self.head, nn.Linear) and isinstance(self.embed, nn.Embedding):
            self.head.weight = self.embed.weight

    def init_weights(self):
        """GPT-2's: deviation 0.02, smaller by sqrt(2N) for the two matrices that add to the residual."""
        self.tie()  # again after to_empty, which gives head and embedding a tensor each
        for name, module in self.named_modules():
            adds = {"o", "down"} & set(name.split("."))
            std = 0.02 / (math.sqrt(2 * self.config.blocks) if adds else 1)
            if isinstance(module, Layer):
                module.init_weights(std)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_dropout(self, p):
        """Change the dropout of a model that was loaded."""
        self.config = replace(self.config, dropout=p)
        for block in self.blocks:
            block.attention.config, block.dropout.p = self.config, p
        self.dropout.p = p

    def layout(self, tokens, cache=None):
        """Of tokens (B, T): positions, RoPE's tables, and the mask."""
        c, T = self.config, tokens.shape[1]
        end = T + (cache.end if cache else 0)
        why = " (more would turn the keys in a cache anew)" if c.rope_scaling == "dynamic" else ""
        refuse(end > c.context and (cache or not why), f"{end} tokens do not fit the context of "
               f"{c.context}{why}: shorten the prompt or the window")
        positions = cache.positions(T) if cache else torch.arange(T, device=tokens.device)
        rope = rope_tables(positions, c, end) if c.architecture.rope else None
        window = c.window if c.window < end else 0
        mask = cache.mask(T, window) if cache else None
        if window and not cache:
            mask = visible(positions, positions, window)
        return positions, rope, mask

    def begin(self, tokens, cache=None):
        """The embeddings (B, T, C), and the rope tables and the mask that every block is given."""
        positions, rope, mask = self.layout(tokens, cache)
        x = self.embed(tokens).to(self.norm.weight.dtype)  # of integers it is float32
        if self.positions is not None:
            x = x + self.positions(positions)
        return self.dropout(x), rope, mask

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

def count_parameters(model):
    """Every number the model stores as a weight, a shared one once."""
    packed = sum(m.packed_weights for m in model.modules() if isinstance(m, Packed))
    return packed + sum(p.numel() for p in model.parameters())

def matmul_weights(module):
    """The multiplications of a token, which has one addition with each: in all layers, the head too."""
    if isinstance(module, (nn.Linear, Layer)):
        return multiplications(module)
    return sum(matmul_weights(child) for child in module.children())

def flops_per_token(model, length, training=False):
    """Floating-point operations a token of a sequence of `length`: 2 for each weight, and in each block
    2 x 2 x length/2 x heads x d for q k^T and s v over half of it. Training is three times that."""
    attention = 2 * length * model.config.heads * model.config.head_size * model.config.blocks
    return (2 * matmul_weights(model) + attention) * (3 if training else 1)

class Cache:
    """The protocol of what remembers keys and values, so that only new tokens are read.

        lengths, end          tokens of each row that are in it; the longest
        positions(T)          of the next T tokens: (T,) or (B, T)
        mask(T, window=0)     of the next T tokens: (1 or B, 1, T, S), or None where all may be seen
        update(layer, k, v)   store k, v of the next T tokens in a layer; returns all keys and values
        advance(T)            after the last layer: T more tokens are in it
        attend                in place of the model's own attention (None: that one)"""
    attend = None

class KVCache(Cache):
    """Keys and values of the tokens seen so far (section V.C): each (B, kv_heads, length, d) in every layer.

    Rows may have different lengths. A row's next token goes to its own next slot, and a query at position p
    looks at the slots 0..p: what lies beyond a row's end (padding) is not seen, and is overwritten."""

    def __init__(self, config, batch, length, device="cpu"):
        self.capacity, self.device = length, device
        self.lengths, self.rows = [0] * batch, torch.arange(batch, device=device)[:, None]
        self.k = [None] * config.blocks
        self.v = [None] * config.blocks

    @property
    def end(self):
        return max(self.lengths)

    @property
    def uniform(self):
        return min(self.lengths) == max(self.lengths)

    def positions(self, T):
        begin = self.end if self.uniform else torch.tensor(self.lengths, device=self.device)[:, None]
        return torch.arange(T, device=self.device) + begin

    def mask(self, T, window=0):
        """True where the key's slot is not after the query's position, nor before its window."""
        if self.uniform and not window and (T == 1 or self.end == 0):
            return None
        return visible(self.positions(T), torch.arange(self.end + T, device=self.device), window)

    def update(self, layer, k, v):
        """k, v (B, kv_heads, T, d) -> all keys and values, (B, kv_heads, S, d)."""
        B, H, T, d = k.shape
        if self.k[layer] is None:
            self.k[layer], self.v[layer] = (k.new_zeros(B, H, self.capacity, d) for _ in range(2))
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.uniform:
                store[:, :, self.end:self.end + T] = new
            else:
                store[self.rows, :, self.positions(T)] = new.transpose(1, 2)
        return self.k[layer][:, :, :self.end + T], self.v[layer][:, :, :self.end + T]

    def advance(self, T):
        self.lengths = [n + T for n in self.lengths]
