"""Random tensors and small models that a seed fixes, and how far two tensors are apart."""

import math

import torch

from model import GPT, GPTConfig

V, BLOCK = 37, 16


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(vocab_size, B, T, seed=1):
    return torch.randint(vocab_size, (B, T), generator=rng(seed))


def randn(*shape, seed):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def gap(a, b):
    """Largest absolute difference; NaN anywhere counts as infinite."""
    return (a.double() - b.double()).abs().nan_to_num(nan=math.inf).max().item()


def randomize(module, seed=0):
    """Weights far from init, LayerNorms and biases included: at init attention is flat and hides bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            is_gain = p.dim() == 1 and name.endswith("weight")
            p.copy_(is_gain + 0.25 * torch.randn(p.shape, generator=generator))
    return module


def make_gpt(dtype=torch.float64, seed=0, **sizes):
    sizes = dict(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24) | sizes
    return randomize(GPT(GPTConfig(**sizes)), seed).to(dtype)
