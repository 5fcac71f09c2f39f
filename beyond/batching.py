"""Continuous batching (sections III.C.2 and V.C): many requests, each with its own adapter, through one base.

A batch that waits for its longest text leaves most rows idle. Here the batch is made anew before every step:
a request that ended gives its blocks back (paged_cache.py), the next one that waits is read and joins:

    step          1    2    3    4    5    6    7
    request a     P    t    t    t    .              P: the prompt is read, and gives the first token
    request b     P    t    .                        t: one more token, in one product with all other rows
    request c     waits     P    t    t    t    t

When the pool is full the request that came last gives its blocks up, and is read again later. Each request
draws from a random generator of its own, and a row of a product does not know of the others. So in float32
its tokens are what they would be alone, unless two are as likely to some five digits: products of more rows
add up in another order. In bfloat16, of two digits, half of the answers differ.

    adapters = Adapters(model, {"news": "out/news", "tweets": "out/tweets"})
    engine = Engine(model, Pool(model.config, blocks=512), adapters=adapters)
    for request in engine.run([Request([1, 2, 3], adapter="news"), Request([4, 5])]):    # as they end
        print(request.tokens)
"""
from collections import deque
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from beyond.decoding import decoding_step
from beyond.paged_cache import PagedCache, Sequence
from common.adapters import read_adapter
from common.cli import refuse
from common.generate import check_prompt, sample
from model import Layer, multiplications

@dataclass(eq=False)
class Request:
    prompt: list                # token ids
    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1
    adapter: str = None         # None: the bare base
    top: int = None             # note each token's log-probability, and the likeliest `top` at its place
    tokens: list = field(default_factory=list)  # the answer
    scores: list = field(default_factory=list)  # of each token: (logprob, [(token, logprob), ...])
    cancelled: bool = False     # set it at any time: the request ends before the next step
    sequence: Sequence = None   # its keys and values, while it is in the batch
    generator: torch.Generator = None
    ended: bool = False

class ManyLoRALinear(Layer):
    """Equation 7 with an adapter for each row of a batch: y_i = base(x_i) + (alpha/r) B_i A_i x_i. One
    product with the base serves all rows; smaller ranks are padded with zeros."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.multiplications, self.bias = multiplications(base), None
        self.base = base.requires_grad_(False)
        self.factors = {}  # name -> A (r, in) and (alpha/r) B^T (r, out)
        self.chosen = None

    def select(self, names):
        """names: of the adapter of each row, None for the bare base. One name serves a batch of any size."""
        self.chosen = None
        if set(names) & set(self.factors):
            names = names[:1] if len(set(names)) == 1 else names
            none = [f[:0] for f in next(iter(self.factors.values()))]
            factors = zip(*[self.factors.get(name, none) for name in names])
            self.chosen = [pad_sequence(rows, batch_first=True) for rows in factors]

    def forward(self, x):
        if self.chosen is None:
            return self.base(x)
        A, Bt = self.chosen  # (B or 1, r, in), (B or 1, r, out)
        return self.base(x) + x @ A.transpose(1, 2) @ Bt  # (B, T, in) -> (B, T, r) -> (B, T, out)

class Adapters:
    """Many adapters beside one base. folders: name -> folder in PEFT's format."""

    def __init__(self, model, folders=None, base_id=None):
        self.model, self.layers, self.names = model, {}, set()  # name of a layer -> ManyLoRALinear
        self.selected = None  # names of the rows of the last batch
        for name, folder in (folders or {}).items():
            self.add(name, read_adapter(folder, model, base_id))

    def add(self, name, adapter):
        """adapter: as of adapters.read_adapter, with factors (name of our layer -> A, B) and scale."""
        reference = self.model.norm.weight
        for layer, factors in adapter.factors.items():
            if layer not in self.layers:
                self.layers[layer] = ManyLoRALinear(self.model.get_submodule(layer))
                self.model.set_submodule(layer, self.layers[layer])
            A, B = (f.to(reference.device, reference.dtype) for f in factors)
            self.layers[layer].factors[name] = A, (adapter.scale * B).T.contiguous()
        self.names.add(name)
        self.selected = None  # it may have been another adapter of this name

    def select(self, names):
        """As ManyLoRALinear.select, in all layers."""
        if names != self.selected:
            for layer in self.layers.values():
                layer.select(names)
            self.selected = names

class Engine:
    """Requests in, tokens out: `step` reads prompts of requests that may join, then a token of each."""

    def __init__(self, model, pool, stop=(), vocabulary=None, adapters=None, batch_size=32):
        self.model, self.pool, self.stop, self.vocabulary = model, pool, set(stop), vocabulary
        self.adapters, self.batch_size = adapters or Adapters(model), batch_size
        self.single = None  # decoding_step's, for the pool
        self.waiting, self.running = deque(), []  # in the order of joining
        self.peak = (0, 0)  # slots of the cache reserved and used, when most were reserved

    def run(self, requests):
        """Yield each request when it has ended."""
        for request in requests:
            self.submit(request)
        while self.waiting or self.running:
            yield from self.step()

    def submit(self, request):
        self.check(request)
        request.generator = torch.Generator(self.pool.device).manual_seed(request.seed)
        self.waiting.append(request)

    def check(self, request):
        """Refuse what can never be answered."""
        check_prompt(request.prompt, self.model.config)
        name, known = request.adapter, ", ".join(sorted(self.adapters.names)) or "none is loaded"
        refuse(name not in (None, *self.adapters.names),
               f"no adapter is called {name!r} ({known}): give --adapter {name}=DIR")
        # the last new token is never read
        most = min(self.model.config.context, len(request.prompt) + request.max_new_tokens - 1)
        needed, there = self.pool.blocks_for(most), self.pool.blocks
        refuse(needed > there, f"{len(request.prompt)} tokens and up to {request.max_new_tokens} new ones "
               f"need {needed} blocks of {self.pool.size}, the pool has {there}: ask for fewer")

    @torch.inference_mode()
    def step(self):
        """One step of every running request; returns those that ended."""
        ended = self.leave()
        while self.waiting and len(self.running) < self.batch_size and self.join():
            ended += self.leave()
        # each needs a slot for its next token: while blocks are missing, the last one gives its own back
        while sum(r.sequence.needs(1) for r in self.running) > len(self.pool.free):
            request = self.running.pop()
            request.sequence.cut()
            self.waiting.appendleft(request)
        if self.running:
            self.advance(self.running, [r.tokens[-1:] for r in self.running])
            sequences = [r.sequence for r in self.running]
            slots = sum(len(s.table) for s in sequences) * self.pool.size
            self.peak = max(self.peak, (slots, sum(s.length for s in sequences)))
            ended += self.leave()
        return ended

    def join(self):
        """Read the prompt that waits longest, if it has room, and each running request one block more."""
        request = self.waiting[0]
        text = request.prompt + request.tokens
        needed = self.pool.blocks_for(len(text)) + len(self.running)
        if self.running and needed > len(self.pool.free):
            return False
        self.running.append(self.waiting.popleft())
        request.sequence = Sequence(self.pool)
        self.advance([request], [text])
        return True

    def advance(self, requests, tokens):
        """Read the next tokens of these requests, T of each, and draw what follows."""
        self.adapters.select([r.adapter for r in requests])
        tokens = torch.tensor(tokens, device=self.pool.device)  # (B, T)
        logits = self.logits(tokens, PagedCache([r.sequence for r in requests]))[:, :self.vocabulary]
        for request, token, row in zip(requests, logits.argmax(-1).tolist(), logits.split(1)):
            if request.temperature > 0:
                token = sample(row, request.temperature, request.top_p, request.generator).item()
            if request.top is not None:
                logprobs = row[0].float().log_softmax(-1)
                best, place = logprobs.topk(min(request.top, len(logprobs)))
                request.scores.append((logprobs[token].item(), list(zip(place.tolist(), best.tolist()))))
            request.tokens.append(token)

    def logits(self, tokens, cache):
        """Of what follows tokens (B, T): (B, vocabulary)."""
        if tokens.shape[1] > 1 or self.adapters.layers:
            return self.model.head(self.model.hidden(tokens, cache)[:, -1:])[:, 0]
        self.single = self.single or decoding_step(self.model, cache)
        return self.single(tokens[:, 0], cache)

    def leave(self):
        """Take out what has ended: at a stop token, at max_new_tokens, with a full context, or cancelled."""
        ended, context = [], self.model.config.context
        for r in [*self.running, *self.waiting]:
            full = len(r.tokens) == r.max_new_tokens or len(r.prompt) + len(r.tokens) > context
            if r.cancelled or full or not self.stop.isdisjoint(r.tokens[-1:]):
                r.ended = True
                ended.append(r)
                if r.sequence:
                    r.sequence.cut()
        self.running = [r for r in self.running if not r.ended]
        self.waiting = deque(r for r in self.waiting if not r.ended)
        return ended
