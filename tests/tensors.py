"""Random tensors that a seed fixes, and their difference."""

import math

import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(vocab_size, B, T, seed=1):
    return torch.randint(vocab_size, (B, T), generator=rng(seed))


def randn(*shape, seed):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def gap(a, b):
    """Largest absolute difference; NaN anywhere counts as infinite."""
    return (a.double() - b.double()).abs().nan_to_num(nan=math.inf).max().item()
