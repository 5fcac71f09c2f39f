"""The rank bench of serve.py's page: a model beside itself with any share of its ranks, at 16, 8 or 4 bits.

    python serve.py --model smollm2-135m --teach     decomposed at the start, but for a folder of decompose.py

One decomposition serves every rank. With H = X X^T of the inputs X of the whole model, eigenvectors u_i of
W H W^T and the largest eigenvalue first (beyond/activations.py), the best product of rank r is

    B A X = (u_1 u_1^T + ... + u_r u_r^T) W X       |W X - B A X|^2 = value_(r+1) + value_(r+2) + ...

The directions u_i are orthogonal: what one of them gives does not depend on which others are there. So the
best of rank r is the first r columns of B and rows of A, and a slider only says how many are read.

Each position of the sliders is a model, "rank-50%-8bit", that a request names as it names an adapter.
"""
import copy
import functools
import math
from collections import defaultdict

import torch

from beyond.activations import Moments, walk
from beyond.batching import Engine, ManyLoRALinear
from checkpoint import own_tensors
from common.cli import refuse
from common.data import calibration_batches
from common.loss import head_loss
from lowrank import LowRankLinear, from_factors, swap_layers
from model import count_parameters, dense_weight, is_linear, multiplications
from quant import quantize

TEXT_TOKENS = 2048     # of Python's own text, from which H is
MEASURED_TOKENS = 512  # of a text whose perplexity is asked for, at most
KEPT = 6               # models that stay in memory

def sharing(model):
    """A copy with the same layers, in which others can take their places."""
    return copy.deepcopy(model, {id(m): m for m in model.modules() if not [*m.children()]})

def decompose(layer, moments, ordered):
    """B (out, r), A (r, in), r the largest rank that makes the layer smaller, and as many eigenvalues as its
    full rank. ordered: a LowRankLinear is decompose.py's, its factors in the order of their eigenvalues."""
    most, full = (multiplications(layer) - 1) // (layer.in_features + layer.out_features), None
    (B, A), values = moments.factors(dense_weight(layer), max(1, most))
    if isinstance(layer, LowRankLinear):
        full, (B, A) = layer.rank, (layer.B, layer.A) if ordered else (B, A)
    return B[:, :most], A[:most], values[:full]

class Bench(Engine):
    """The engine of a server with --teach. Requests for the same model advance together."""
    stepped = None  # the model that `single` is a step of

    @torch.no_grad()
    def __init__(self, tokenizer, ordered, model, *args):
        super().__init__(model, *args)
        self.tokenizer, self.whole, self.factors = tokenizer, sharing(model), {}
        swap_layers(self.whole, lambda name, m: m.base if isinstance(m, ManyLoRALinear) else None)
        odd = {type(m).__name__ for m in self.whole.modules() if is_linear(m)} - {"Linear", "LowRankLinear"}
        refuse(odd, f"--teach needs a model of 16 bits, dense or low-rank, not with {', '.join(odd)}: leave "
               "--bits out, and give the model that it was made from")
        self.settings = {f"rank-{share}%-{bits}bit": (share, bits) for share in range(1, 101)
                         for bits in (16, 8, 4)}
        self.adapters.names |= self.settings.keys()
        self.model_of = functools.lru_cache(KEPT)(self.make)

        def look(layers, H):
            moments = Moments(H)
            self.factors |= {name: decompose(layer, moments, ordered) for name, layer in layers.items()}
            return {}
        windows = calibration_batches("builtin", tokenizer, model.config.context, TEXT_TOKENS)
        walk(self.whole, windows, look, "decomposing")
        self.at_bits = {16: self.whole, 8: sharing(self.whole), 4: sharing(self.whole)}
        for bits in (8, 4):  # now: what stays whole need not be quantized when a slider moves
            quantize(self.at_bits[bits], bits)

    def make(self, name):
        """The model at a position of the sliders; for another name the whole one, with its adapters."""
        if name not in self.settings:
            return self.model
        share, bits = self.settings[name]
        model = sharing(self.at_bits[bits])
        for layer_name, (B, A, values) in self.factors.items():
            r = max(1, share * len(values) // 100)
            if r <= len(A):  # else factors would be no smaller
                layer = self.whole.get_submodule(layer_name)
                model.set_submodule(layer_name, from_factors(layer, B[:, :r], A[:r]))
        if bits < 16:
            quantize(model, bits)
        return model

    def advance(self, requests, tokens):
        whole, groups = self.model, defaultdict(list)
        for request, new in zip(requests, tokens):
            groups[self.model_of(request.adapter)].append((request, new))
        for self.model, group in groups.items():
            if self.model is not self.stepped:
                self.single, self.stepped = None, self.model  # a step is of one model
            super().advance(*zip(*group))
        self.model = whole

    @torch.inference_mode()
    def measure(self, name, text):
        """Perplexity of a text, parameters and bytes (what is not quantized counts as 16 bit) of a model."""
        refuse(name not in self.settings, f"{name} is not measured: name one like rank-50%-8bit")
        ids, most = self.tokenizer.encode(text, around=True), min(MEASURED_TOKENS, self.model.config.context)
        refuse(not 2 <= len(ids) <= most, f"the measured text has {len(ids)} tokens: give 2 to {most}")
        model, tokens = self.model_of(name), torch.tensor([ids], device=self.pool.device)
        loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:]).item()
        size = sum(t.numel() * min(2, t.element_size()) for t in own_tensors(model).values())
        return dict(perplexity=math.exp(min(loss, 700)), parameters=count_parameters(model), bytes=size)

    @functools.cached_property
    def facts(self):
        """Of each matrix, for the page: its rank; the one from which on it stays whole; and at each share of
        its rank the singular value of W X over the largest, and the share of |W X|^2 that is kept."""
        rows = []
        for name, (_, A, values) in self.factors.items():
            places = [max(1, share * len(values) // 100) - 1 for share in range(1, 101)]
            curves = dict(singular=(values / values[0]).sqrt(), kept=values.cumsum(0) / values.sum())
            curves = {key: v[places].nan_to_num().round(decimals=4).tolist() for key, v in curves.items()}
            rows.append(dict(kind=name.rsplit(".", 1)[1], rank=len(values), whole=len(A) + 1, **curves))
        return rows
