"""A language small enough to list: every response of it, so that an expectation is a sum and not a sample."""

import itertools
import math

import torch

EOS = 0


def enumerate_responses(vocab_size, max_len):
    """Every response over ids 0..vocab_size-1 that ends with EOS (id 0), or is cut at max_len tokens without it.

    Returns tokens (N, R) long, padded with EOS on the right, and mask (N, R) bool, True up to and including EOS,
    R = max_len. N is 40 for 4 tokens and length 3."""
    words, rows = range(1, vocab_size), []
    for n in range(max_len):
        rows += [(*body, EOS) for body in itertools.product(words, repeat=n)]
    rows += list(itertools.product(words, repeat=max_len))
    lens = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + (EOS,) * (max_len - len(row)) for row in rows])
    return tokens, torch.arange(max_len) < lens.unsqueeze(1)


def enumerate_batches(probs, size):
    """Every batch of `size` independent draws from N outcomes of probabilities (N,), whatever their order.

    Returns rows (M, size) long, M = (N + size - 1 choose size), and the probability of each batch (M,)."""
    rows = torch.combinations(torch.arange(len(probs)), size, with_replacement=True)
    times = torch.zeros(len(rows), len(probs), dtype=probs.dtype).scatter_add(1, rows, torch.ones_like(probs[rows]))
    orders = (math.lgamma(size + 1) - torch.lgamma(times + 1).sum(1)).exp()
    return rows, orders * probs[rows].prod(1)
