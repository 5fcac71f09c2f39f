"""Continuous batching (sections III.C.2 and V.C): many requests, each with its own length and adapter, through one base.

A batch that waits for its longest text leaves most rows idle. Here the batch is made anew before every step: a request that ended
leaves it and gives its blocks back (kvcache.py), the next one that waits is read (its whole prompt at once) and joins:

    step          1    2    3    4    5    6    7
    request a     P    t    t    t    .              P: the prompt is read, and gives the first token
    request b     P    t    .                        t: one more token, in one product with all other rows
    request c     waits     P    t    t    t    t

A prompt that begins as the text of a running request does (the same instructions, say) shares its blocks. When the pool is full the
request that came last gives its blocks up; it is read again later, with the tokens that it has. The tokens of a request are what
they would be alone: a row of a product does not know of the others, and each request draws from a random generator of its own.

    engine = Engine(model, Pool(model.config, blocks=512), adapters=Adapters(model, {"news": "out/news", "tweets": "out/tweets"}))
    for request in engine.run([Request([1, 2, 3], adapter="news"), Request([4, 5])]):    # as they end
        print(request.tokens, request.error)
"""
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from beyond.paged_cache import PagedCache, Sequence, usage
from common.adapters import read_adapter
from common.cli import InputError
from common.generate import check_sampling, sample
from model import Layer, multiplications


@dataclass(eq=False)
class Request:
    prompt: list                # token ids
    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    adapter: str = None         # None: the bare base
    tokens: list = field(default_factory=list)  # the answer
    error: str = None           # why there is none
    started: float = None       # when its prompt was first read, when its first token was there, when it ended
    first: float = None
    ended: float = None

    @property
    def text(self):
        return self.prompt + self.tokens


class ManyLoRALinear(Layer):
    """Equation 7 with an adapter for each row of a batch: y_i = base(x_i) + (alpha/r) B_i A_i x_i. One product with the base serves all rows.

    Adapters come and go in `factors`, the base is never touched. `select` says which adapter each row of the following batches has; it
    gathers the rows' A and B once, not at every step. Smaller ranks are padded with zeros; a row without an adapter has zeros alone.
    """

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)
        self.factors = {}  # name -> A (r, in) and (alpha/r) B^T (r, out)
        self.chosen = None

    def add(self, name, A, B, scale):
        """B^T, as the product of a row reads it: its r rows lie in one piece."""
        self.factors[name] = A.contiguous(), (scale * B).T.contiguous()

    def select(self, names):
        """names: of the adapter of each row, None for the bare base. One name serves a batch of any size."""
        used = set(names) & set(self.factors)
        if not used:
            self.chosen = None
        elif len(set(names)) == 1:
            self.chosen = self.factors[names[0]]  # (r, in), (r, out)
        else:
            self.chosen = self.gathered(names, 0), self.gathered(names, 1)

    def gathered(self, names, i):
        """A (i = 0) or B^T (i = 1) of each row: (B, r, in) or (B, r, out)."""
        r, like = max(len(f[i]) for f in self.factors.values()), next(iter(self.factors.values()))[i]
        padded = {n: F.pad(self.factors[n][i], (0, 0, 0, r - len(self.factors[n][i]))) if n in self.factors else like.new_zeros(r, like.shape[1])
                  for n in set(names)}
        return torch.stack([padded[n] for n in names])

    def forward(self, x):
        if self.chosen is None:
            return self.base(x)
        A, Bt = self.chosen
        if A.dim() == 2:
            if isinstance(self.base, Layer):  # a quantized base on a GPU: one launch for a few rows
                y = self.base.with_lora(x, A, Bt.T, 1.0)
                if y is not None:
                    return y
            return self.base(x) + x @ A.T @ Bt
        h = torch.bmm(x, A.transpose(1, 2))  # (B, T, in) (B, in, r) -> (B, T, r)
        return torch.baddbmm(self.base(x), h, Bt)  # + (B, T, r) (B, r, out) -> (B, T, out)

    @property
    def multiplications(self):
        return multiplications(self.base)

    @property
    def bias(self):
        return self.base.bias


class Adapters:
    """Many adapters beside one base. `folders` (name -> folder in PEFT's format) are read when first needed; when those in memory pass
    `limit` bytes, the one that was used least recently leaves, and is read again when it is wanted."""

    def __init__(self, model, folders=None, base_id=None, limit=None):
        self.model, self.folders, self.base_id, self.limit = model, dict(folders or {}), base_id, limit
        self.bytes = OrderedDict()  # name -> size of those in memory, the last used at the end
        self.layers = {}            # name of a layer -> ManyLoRALinear
        self.names = None
        for name in self.folders:   # a wrong folder is told now, not in the middle of a run
            self.load(name)

    def add(self, name, adapter):
        """adapter: as of adapters.read_adapter, with factors (name of our layer -> A, B) and scale."""
        reference = self.model.norm.weight
        for layer, (A, B) in adapter.factors.items():
            if layer not in self.layers:
                self.layers[layer] = ManyLoRALinear(self.model.get_submodule(layer))
                self.model.set_submodule(layer, self.layers[layer])
            self.layers[layer].add(name, *(f.to(reference.device, reference.dtype) for f in (A, B)), adapter.scale)
        self.bytes[name] = sum(A.numel() + B.numel() for A, B in adapter.factors.values()) * reference.dtype.itemsize
        self.names = None  # what was selected may be another adapter of this name

    def drop(self, name):
        for layer in self.layers.values():
            layer.factors.pop(name, None)
        del self.bytes[name]
        self.names = None

    def check(self, name):
        if name not in self.folders and name not in self.bytes:
            known = ", ".join(self.folders | self.bytes) or "none is loaded"
            raise InputError(f"no adapter is called {name!r} ({known}): give --adapter {name}=DIR")

    def load(self, name, keep=()):
        """Have an adapter in memory; False if those of `keep`, which are in use, leave no room for it."""
        self.check(name)
        if name not in self.bytes:
            self.add(name, read_adapter(self.folders[name], self.model, self.base_id))
        self.bytes.move_to_end(name)
        if self.limit is None:
            return True
        if self.bytes[name] > self.limit:
            raise InputError(f"the adapter {name} has {self.bytes[name] / 1e6:.1f} MB, the limit for all is {self.limit / 1e6:.1f} MB: raise it")
        readable = [n for n in self.bytes if n in self.folders]  # those that were added without a folder could not come back
        too_much = sum(self.bytes[n] for n in readable) - self.limit
        for other in [n for n in readable if n not in (name, *keep)]:
            if too_much > 0:
                too_much -= self.bytes[other]
                self.drop(other)
        if too_much > 0:
            self.drop(name)
        return too_much <= 0

    def select(self, names):
        """Which adapter each row of the next batches has; None is the bare base."""
        if names != self.names:
            for layer in self.layers.values():
                layer.select(names)
            self.names = names


class Engine:
    """Requests in, tokens out. `step` reads the prompts of requests that may join and then writes one token of every running request."""

    def __init__(self, model, pool, stop=(), vocabulary=None, adapters=None, batch_size=32):
        self.model, self.pool, self.stop, self.vocabulary, self.batch_size = model, pool, stop, vocabulary, batch_size
        self.adapters = adapters or Adapters(model)
        self.waiting, self.running = deque(), []  # running: (request, its sequence, its generator), in the order of joining
        self.peak = (0, 0)                        # bytes of the cache reserved and used, when most were reserved

    def run(self, requests):
        """Yield each request when it has ended."""
        yield from (r for r in requests if not self.submit(r))
        while self.waiting or self.running:
            yield from self.step()

    def submit(self, request):
        """Let a request wait for its turn; or say in request.error why it can never have one, and return False."""
        try:
            request.error or self.check(request)
        except InputError as e:
            request.error = str(e)
        if request.error:
            return False
        self.waiting.append((request, torch.Generator(self.pool.device).manual_seed(request.seed)))
        return True

    def check(self, request):
        config, n = self.model.config, len(request.prompt)
        check_sampling(request.temperature, request.top_k, request.top_p, request.max_new_tokens)
        if not 1 <= n <= config.context:
            raise InputError(f"the prompt has {n} tokens: the model reads 1 to {config.context}")
        if min(request.prompt) < 0 or max(request.prompt) >= config.vocab_size:
            raise InputError(f"the prompt has tokens outside the vocabulary 0..{config.vocab_size - 1}: is this the model's tokenizer?")
        needed, there = self.pool.blocks_for(self.longest(request)), len(self.pool.users)
        if needed > there:
            raise InputError(f"{n} tokens and up to {request.max_new_tokens} new ones need {needed} blocks of {self.pool.size}, the whole pool has {there}: "
                             "raise --kv-memory, or lower --max-new-tokens")
        if request.adapter is not None:
            self.adapters.check(request.adapter)

    def longest(self, request):
        """Tokens that the cache may hold of it: the last new one is never read."""
        return min(self.model.config.context, len(request.prompt) + request.max_new_tokens - 1)

    @torch.inference_mode()
    def step(self):
        """One step of every running request; returns those that ended."""
        ended = []
        while self.waiting and len(self.running) < self.batch_size and self.join():
            ended += self.leave()
        if self.running:
            self.make_room()
            tokens = torch.tensor([[r.tokens[-1]] for r, *_ in self.running], device=self.pool.device)
            self.append(self.running, self.read(tokens, self.running))
            self.peak = max(self.peak, usage([s for _, s, _ in self.running]))
            ended += self.leave()
        return ended

    def join(self):
        """Read the prompt of the request that waits longest, if there is room for it and for the next block of each running one that will need one."""
        request, generator = self.waiting[0]
        text, sequence = request.text, self.beginning(request)
        others = sum(self.pool.blocks_for(self.longest(r)) > len(s.table) or s.writes_shared() for r, s, _ in self.running)
        fits = sequence.needs(len(text) - sequence.length) + others <= len(self.pool.free) or not self.running
        in_use = [r.adapter for r, *_ in self.running]
        if not fits or request.adapter is not None and not self.adapters.load(request.adapter, keep=in_use):
            sequence.cut()
            return False
        self.waiting.popleft()
        request.started = request.started or time.perf_counter()
        row = (request, sequence, generator)
        self.append([row], self.read(torch.tensor([text[sequence.length:]], device=self.pool.device), [row]))
        self.running.append(row)
        return True

    def beginning(self, request):
        """A sequence with as much of the request's text as a running one with the same adapter has in its blocks, if that is a block or more.

        At least one token is left to read: what follows is drawn from it.
        """
        best, length, text = None, self.pool.size - 1, request.text
        for other, sequence, _ in self.running:
            if other.adapter == request.adapter:
                n = common_length(text[:-1], other.text[:sequence.length])
                best, length = (sequence, n) if n > length else (best, length)
        return best.share(length) if best else Sequence(self.pool)

    def make_room(self):
        """Every running request needs a place for its next token: while blocks are missing, the one that joined last gives its own back."""
        while sum(s.needs(1) for _, s, _ in self.running) > len(self.pool.free):
            request, sequence, generator = self.running.pop()
            sequence.cut()
            self.waiting.appendleft((request, generator))

    def read(self, tokens, rows):
        """tokens (B, T), the next ones of these rows -> logits of what follows (B, vocabulary)."""
        self.adapters.select([r.adapter for r, *_ in rows])
        cache = PagedCache([s for _, s, _ in rows])
        h = self.model.hidden(tokens, cache)[:, -1]  # (B, C)
        return self.model.head(h)[:, :self.vocabulary]

    def append(self, rows, logits):
        """Draw the next token of each row, from its own generator."""
        greedy = logits.argmax(-1).tolist()
        for i, (r, _, generator) in enumerate(rows):
            r.tokens.append(greedy[i] if r.temperature == 0 else sample(logits[i:i + 1], r.temperature, r.top_k, r.top_p, generator).item())
            r.first = r.first or time.perf_counter()

    def leave(self):
        """Take out what has ended: at a stop token, at max_new_tokens, or where the context is full."""
        def over(r):
            return r.tokens[-1] in self.stop or len(r.tokens) == r.max_new_tokens or len(r.prompt) + len(r.tokens) > self.model.config.context
        ended = [row for row in self.running if over(row[0])]
        self.running = [row for row in self.running if not over(row[0])]
        for request, sequence, _ in ended:
            sequence.cut()
            request.ended = time.perf_counter()
        return [request for request, *_ in ended]


def common_length(a, b):
    """Of how many tokens two texts agree from their beginnings."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
