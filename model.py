"""
A GPT-2 transformer with the heads RLHF needs (policy, value, scalar reward) and a KV cache for sampling.

The trunk returns hidden states and the caller applies the heads, because PPO wants logits at response
positions only and a reward model wants none. There is no loss, no sampling and no optimizer in this file.

Shapes: B batch, T sequence length, C width (n_embd), V vocabulary, nh heads of size hd = C / nh.
Sequences are padded on the right only: position ids are 0..T-1 in every row, and since causal attention
never looks right, no real token can see a pad, so a pass over whole sequences needs no attention mask.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)  # frozen, as a dropout that is changed after the layers are built would do nothing
class GPTConfig:
    """Sizes of a GPT. Raises ValueError for sizes that cannot be built."""
    block_size: int       # longest sequence: prompt and response together
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # 0 for PPO: its ratio compares two passes, and dropout would make them differ
    bias: bool = True     # biases in linear and LayerNorm layers, as in GPT-2

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")


class KVCache:
    """Keys and values of the positions seen so far: k[layer] and v[layer], (B, nh, max_len, hd) each.

    Slot p of a row belongs to position p of that row, so ragged rows need no shifting and no left padding:
    each row's next token simply goes to its own next slot. Written in place, so use it under torch.no_grad().

    Slots beyond a row's position are masked, and a masked slot has weight exactly 0. But 0 * NaN is
    NaN, so the slots must hold finite numbers. They do: zeros at first, then keys and values of token ids
    (pads of a shorter prompt, an earlier use of this cache), finite unless the model itself is broken.

    Raises ValueError if max_len exceeds block_size, as there is no position embedding beyond it."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        empty = torch.empty(batch_size, config.n_head, 0, config.n_embd // config.n_head, device=device, dtype=dtype)
        self.k, self.v = [empty] * config.n_layer, [empty] * config.n_layer
        self.rows = torch.arange(batch_size, device=device)
        self.batch_size, self.block_size, self.max_len = batch_size, config.block_size, 0
        self.grow(max_len)

    def grow(self, max_len):
        """Makes room for max_len positions, by copying. A decoding step reads every slot, because a short cache is
        faster than a slice of a long one, whose rows lie far apart."""
        if max_len > self.block_size:
            raise ValueError(f"a cache of max_len={max_len} exceeds block_size={self.block_size}")
        for layers in (self.k, self.v):
            for layer, x in enumerate(layers):  # one by one, so that a single one has its old and its new memory
                layers[layer] = F.pad(x, (0, 0, 0, max_len - self.max_len))
        self.max_len = max_len

    def check(self, batch_size, length):
        """Raises ValueError for a wrong batch size or a write past max_len. Python ints: no device sync."""
        if batch_size != self.batch_size:
            raise ValueError(f"{batch_size} rows cannot use a cache made for {self.batch_size}")
        if length > self.max_len:
            raise ValueError(f"{length} positions do not fit in a cache of max_len={self.max_len}")

    def update(self, layer, k, v, positions):
        """Store k, v (B, nh, T, hd) of one layer; return those to attend to."""
        if positions is None:  # prefill: slots 0..T-1 of every row, which see only each other
            self.k[layer][:, :, :k.size(2)] = k
            self.v[layer][:, :, :k.size(2)] = v
            return k, v
        self.k[layer][self.rows, :, positions] = k[:, :, 0]
        self.v[layer][self.rows, :, positions] = v[:, :, 0]
        return self.k[layer], self.v[layer]  # (B, nh, max_len, hd) each


def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(hd)) v, (B, nh, T, hd), for q (B, nh, T, hd) and k, v (B, nh, S, hd). `mask`, broadcast to
    (B, nh, T, S), is True where a query may look; None means causal, with T = S."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # Written out, because torch's own bfloat16 kernels for a CPU take 1.3 to 5 times as long (docs/benchmarks.md).
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    weights = (q / math.sqrt(q.size(3)) @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(weights, dim=-1, dtype=weights.dtype)  # dtype: else autocast makes it float32, and slow
    return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hd) each
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, nh, T, hd)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # GPT-2 was trained with the tanh form; the exact erf GELU moves every logit a little
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, positions, mask)
        return x + self.mlp(self.ln_2(x))


class Trunk(nn.Module):
    """Embeddings, blocks and the final norm: everything but the heads.

    With `recompute` set, a pass with gradients keeps each block's input only, and the backward pass computes the rest
    again [activation checkpointing, Chen et al. 2016, 1604.06174]: the same gradients to the last bit, dropout
    included, for about a third more arithmetic."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                # 2 * n_layer layers add to the residual stream; this keeps its variance independent of depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, cache=None, positions=None):
        """Token ids idx (B, T) -> hidden states (B, T, C) after the final norm.

        No cache: a pass over whole sequences, all rows at positions 0..T-1.
        Cache, no positions (prefill): the same, and slots 0..T-1 of the cache are filled.
        Cache and positions (B,) (decode): idx is (B, 1); row b's token is at positions[b], is stored
        there and attends to slots 0..positions[b].

        Raises ValueError if T exceeds block_size, or if idx, cache and positions do not agree."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens exceeds block_size={self.config.block_size}")
        mask = None
        if positions is None:
            if cache is not None:
                cache.check(B, T)
            where = torch.arange(T, device=idx.device)  # (T,)
        else:
            if cache is None or T != 1:
                raise ValueError(f"positions are for decoding: one token per row and a cache, got T={T}")
            # On a GPU the positions are not looked at, as that would make it wait.
            cache.check(B, int(positions.max()) + 1 if positions.device.type == "cpu" else 0)
            where = positions.unsqueeze(1)  # (B, 1)
            mask = (torch.arange(cache.max_len, device=idx.device) <= where)[:, None, None]  # (B, 1, 1, max_len)
        x = self.dropout(self.wte(idx) + self.wpe(where))  # (B, T, C)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x, cache, positions, mask)
        return self.ln_f(x)


def upcast(x):
    """float32 or wider. A bfloat16 log-softmax is wrong by up to 0.08 nats, several times a PPO step."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class ScalarHead(nn.Module):
    """One number per position: hidden (..., C) -> (...). The value head of a GPT, and a reward model's score.

    Starts at exactly 0 everywhere, so that PPO's first advantages are not the noise of a random critic."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden):
        return self.linear(hidden).squeeze(-1)

    @torch.no_grad()
    def shift(self, amount):
        """Adds a number to the output everywhere."""
        self.linear.bias.add_(amount)


class GPT(nn.Module):
    """A trunk shared by two heads: the policy (logits over the vocabulary) and the value function."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.value_head = ScalarHead(config)

    @property
    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, cache=None, positions=None):
        """Hidden states (B, T, C); the arguments are Trunk.forward's."""
        return self.trunk(idx, cache, positions)

    def policy_head(self, hidden):
        """Hidden states (..., C) -> logits (..., V). Exactly V: a padded id could be sampled, not decoded."""
        return F.linear(hidden, self.trunk.wte.weight)  # tied to the token embedding, as in GPT-2
