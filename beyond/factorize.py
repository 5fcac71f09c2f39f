"""The best factors of a matrix, W -> B A, and the best ranks of many under one budget (section IV.A, method 2); decompose.py does it to a model.

Plain.  B A is the matrix of rank r nearest to W if it keeps the r largest singular values. They and their vectors come from a symmetric
eigenproblem on W's smaller side, W W^T = U S^2 U^T, several times as fast as the SVD of W itself:

    out <= in   W W^T                          U_r its top eigenvectors:  B = U_r,      A = U_r^T W
    out > in    W^T W                          V_r its top eigenvectors:  B = W V_r,    A = V_r^T

With activations.  A layer is to give the right y = W x for the x that occur. With the second moments H = X X^T of its inputs, the loss
||W X - B A X||^2 is smallest for the top eigenvectors of another matrix:

    out <= in   W H W^T                        B = U_r,      A = U_r^T W
    out > in    C^T W^T W C,  H = C C^T        B = W C V_r,  A = V_r^T C^-1

and what is lost is the sum of the other eigenvalues.

Ranks.  An eigenvalue says what one more rank would save, and that rank costs in + out parameters: `choose_ranks` buys where a parameter saves
most, up to a budget.

    [(B, A)], eigenvalues = factorize(W[None], [r], prepare(H, W.shape))
"""
import math

import torch

from common.cli import InputError

RIDGE = 1e-4              # of the mean of H's diagonal: directions that the text never showed count a little, too
FLOAT32_IS_ENOUGH = 1e-3  # see `eigen`


# ----------------------------------------------------------------------------- one batch of matrices

def gram(W, H, C):
    """The symmetric matrices (L, m, m), m the smaller side of W (L, out, in), whose eigenvectors are wanted."""
    if W.shape[1] <= W.shape[2]:
        return (W if H is None else W @ H) @ W.mT
    inner = W.mT @ W  # (L, in, in)
    return inner if H is None else C.mT @ inner @ C


def eigenvalues(W, H=None, C=None):
    """Of the matrices of `gram` for W (L, out, in), in float64: (L, m), largest first."""
    return torch.linalg.eigvalsh(gram(W.double(), H, C)).flip(-1).clamp_min(0)


def eigen(W, H, C, ranks):
    """Eigenvalues (L, m), largest first, and their vectors as columns (L, m, m) of the matrices of `gram`, exact enough to cut at `ranks`.

    Squaring squares the condition: an eigenvalue below 1e-7 of the largest is lost in float32. That matters only where what is cut off
    is that small; where it is below 1e-3 of the largest eigenvalue, the matrix is done again in float64 (which costs twice the time).
    """
    def solve(W):
        values, vectors = torch.linalg.eigh(gram(W, *(t if t is None else t.to(W.dtype) for t in (H, C))))
        return values.flip(-1).clamp_min(0).double(), vectors.flip(-1)

    values, vectors = solve(W)
    cut = torch.stack([v[r:].sum() for v, r in zip(values, ranks)])
    again = (cut < FLOAT32_IS_ENOUGH * values[:, 0]).nonzero().flatten()
    if len(again):
        exact, better = solve(W[again].double())
        values[again], vectors[again] = exact, better.float()
    return values, vectors


def prepare(H, *shapes):
    """(H, C) for matrices of these shapes, float64: H with a ridge, without which it has no inverse where there are fewer tokens than inputs;
    H = C C^T if a matrix has more outputs than inputs, else None."""
    H = H.to(torch.float64, copy=True)
    H.diagonal().add_(RIDGE * H.diagonal().mean().clamp_min(1e-30))
    return H, torch.linalg.cholesky(H) if any(out > in_ for out, in_ in shapes) else None


def balanced(B, A):
    """The same product with columns of B and rows of A of equal norm, so that one learning rate suits both."""
    b, a = B.norm(dim=0), A.norm(dim=1)
    scale = (a / b).sqrt().nan_to_num(1).clamp(1e-10, 1e10)  # either may be 0 where W has a lower rank
    return (B * scale).contiguous(), (A / scale[:, None]).contiguous()


def factorize(W, ranks, moments=None):
    """Optimal factors of matrices W (L, out, in), one rank each: [(B (out, r), A (r, in))] in float32, and the eigenvalues (L, m)."""
    W, (H, C) = W.float(), (None, None) if moments is None else moments
    values, vectors = eigen(W, H, C, ranks)
    factors = []
    for w, V, r in zip(W, vectors, ranks):
        V = V[:, :r]
        if W.shape[1] <= W.shape[2]:
            B, A = V, V.T @ w  # (out, r), (r, in)
        elif C is None:
            B, A = w @ V, V.T
        else:
            A = torch.linalg.solve_triangular(C.T, V.double(), upper=True).T.float()  # V^T C^-1
            B = w @ (C.float() @ V)
        factors.append(balanced(B, A))
    return factors, values


# ----------------------------------------------------------------------------- ranks under one budget

def dense_from(shape):
    """The rank from which on a factorization is not smaller than the matrix."""
    return -(-shape[0] * shape[1] // sum(shape))


def size(shape, r):
    """Parameters of a matrix kept at rank r; rank 0 means that it stays dense."""
    return r * sum(shape) if r else shape[0] * shape[1]


def check_ratio(shapes, ratio):
    least, everything = sum(map(sum, shapes.values())), sum(a * b for a, b in shapes.values())
    if ratio * everything < least:
        raise InputError(f"--ratio {ratio} leaves {ratio * everything:,.0f} parameters, less than rank 1 everywhere: at least "
                         f"{least / everything:.4f} is needed")


def same_ranks(shapes, r):
    """--rank: one rank for all, where that makes a matrix smaller; 0 elsewhere."""
    return {name: r if r < dense_from(s) else 0 for name, s in shapes.items()}


def uniform_ranks(shapes, ratio):
    """--ranks uniform: the same share of every matrix."""
    return {name: max(1, int(ratio * s[0] * s[1] / sum(s))) for name, s in shapes.items()}


def choose_ranks(losses, shapes, ratio):
    """The ranks (0: dense) within ratio x all parameters that lose least. losses: name -> what each of its eigenvalues costs if it is cut off.

    A rank is worth buying if what it saves exceeds the price of its parameters. Whatever the price, each matrix then has its own best rank,
    alone; the price at which the purchases just fit the budget is found by bisection. A matrix whose rank would come near the point where B A
    is no smaller than W does better to stay dense, and that is one of its choices.
    """
    budget = ratio * sum(a * b for a, b in shapes.values())
    curves, everything = {}, sum(v.double().sum() for v in losses.values()).clamp_min(1e-300)
    for name, (a, b) in shapes.items():
        share = losses[name].double() / everything
        lost = (share.sum() - share.cumsum(0))[:dense_from((a, b)) - 1].clamp_min(0)  # at rank 1, 2, ...
        parameters = (a + b) * torch.arange(1, len(lost) + 1, dtype=torch.float64)
        curves[name] = torch.cat((lost, torch.zeros(1))), torch.cat((parameters, torch.tensor([float(a * b)])))  # the last choice: dense

    def buy(log_price):
        chosen = {name: int((lost + math.exp(log_price) * parameters).argmin()) for name, (lost, parameters) in curves.items()}
        return chosen, sum(curves[name][1][i].item() for name, i in chosen.items())

    low, high = -80.0, 20.0  # logarithms of prices at which everything is bought, and rank 1 alone
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if buy(middle)[1] > budget else (low, middle)
    chosen, spent = buy(high)
    spend_the_rest(chosen, curves, shapes, budget - spent)
    return {name: 0 if i == len(curves[name][0]) - 1 else i + 1 for name, i in chosen.items()}


def spend_the_rest(chosen, curves, shapes, left):
    """At one price the purchases jump (a matrix becomes dense at once): buy single ranks with what is left of the budget, in place."""
    while True:
        gains = {name: (curves[name][0][i] - curves[name][0][i + 1]).item() / sum(shapes[name])
                 for name, i in chosen.items() if i + 2 < len(curves[name][0]) and sum(shapes[name]) <= left}
        if not gains:
            return
        best = max(gains, key=gains.get)
        chosen[best] += 1
        left -= sum(shapes[best])
