"""The orthogonalized update (Muon): a step moves a matrix equally far in every direction of its gradient.

A gradient G = U S V^T has a few large singular values, and AdamW's step, made number by number, follows
those. Here the step is U V^T: the same directions, all equally long. It matters most to factors. With y = B A
x, the gradient of A is B^T (dL/dW), so a direction in which B is still small hardly moves A, and as little
moves B in turn: plain B A learns few of its r directions. An orthogonalized step waits for none of them.

U V^T needs no SVD. A polynomial of odd degree acts on the singular values alone, and repeating this one
(Newton-Schulz) takes each of (0, 1] near 1:

    X <- a X + b (X X^T) X + c (X X^T)^2 X,   from X = G / |G|_F

Every X is P X_0 with P a polynomial of S = X_0 X_0^T, an r x r matrix. So the rounds are made on r x r
matrices alone, and the long side n of a factor is met twice, at the beginning and at the end: 4 r^2 n + 34
r^3 operations in place of 20 r^2 n + 10 r^3. That is little beside the gradient itself.

    optimizer = Muon(factors, lr=2e-3, weight_decay=0.1)   # matrices only; AdamW has the rest
    python train.py --rank 192 --optimizer muon
"""
import math

import torch

from common.processes import own_part, whole

# a, b, c of Jordan's Muon: steep at 0, so five rounds are enough; values end in 0.7 to 1.2
ROUNDS = (3.4445, -4.7750, 2.0315)
MOST = 1 << 24  # numbers in a batch of equal matrices

def orthogonalize(G, rounds=5):
    """U V^T, nearly, of each matrix U S V^T in G (..., m, n); float32."""
    if G.shape[-2] > G.shape[-1]:
        return orthogonalize(G.mT, rounds).mT
    a, b, c = ROUNDS
    X = G.float()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    S, Q = X @ X.mT, None  # (..., r, r); what multiplies X at the end
    for i in range(rounds):
        P = b * S + c * (S @ S)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if i < rounds - 1:
            S = P @ S @ P  # polynomials of one matrix commute
    return Q @ X

class Muon(torch.optim.Optimizer):
    """P <- (1 - lr wd) P - lr 0.2 sqrt(max(m, n)) U V^T of the momentum, for every m x n matrix P.

    The factor gives a step the root mean square of AdamW's (Liu et al. 2502.16982), so that one learning rate
    suits both. Matrices of one shape go through the rounds together."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            learning = [P for P in group["params"] if P.grad is not None]
            for matrices in batches_of_equals(learning):
                U = orthogonalize(torch.stack([self.direction(P, group["momentum"]) for P in matrices]))
                size = group["lr"] * 0.2 * math.sqrt(max(U.shape[-2:]))
                for P, update in zip(matrices, U):
                    P.mul_(1 - group["lr"] * group["weight_decay"]).add_(own_part(update, P), alpha=-size)

    def direction(self, P, momentum):
        """Nesterov's: the gradient and the sum of earlier ones with it, whole."""
        M = self.state[P].setdefault("momentum", torch.zeros_like(P))
        return whole(P.grad.add(M.mul_(momentum).add_(P.grad), alpha=momentum))

def batches_of_equals(matrices):
    """Lists of matrices of one shape, at most MOST numbers in each."""
    shapes = {}
    for P in matrices:
        shapes.setdefault(P.shape, []).append(P)
    for shape, same in shapes.items():
        count = max(1, MOST // math.prod(shape))
        for i in range(0, len(same), count):
            yield same[i:i + count]
