"""
A transformer with the heads RLHF needs (policy, value, scalar reward) and a KV cache for sampling. The fields of
GPTConfig make its trunk GPT-2 or a model of the Llama family (Llama 3, SmolLM2, Qwen2, Qwen3).

The trunk returns hidden states and the caller applies the heads, because PPO wants logits at response
positions only and a reward model wants none. There is no loss, no sampling and no optimizer in this file.

Shapes: B batch, T sequence length, C width (n_embd), V vocabulary, nh heads of size hd; nkv heads of keys and values.
Sequences are padded on the right only: position ids are 0..T-1 in every row, and since causal attention
never looks right, no real token can see a pad, so a pass over whole sequences needs no attention mask.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)  # frozen, because a change after the layers are built would have no effect
class GPTConfig:
    """Sizes and kind of a GPT; the defaults are GPT-2's. A size of None becomes the number in its comment. Raises
    ValueError for a model that cannot be built."""
    block_size: int       # longest sequence: prompt and response together
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # 0 for PPO: its ratio compares two passes, and dropout would make them differ
    bias: bool = True     # biases in linear and LayerNorm layers, as in GPT-2
    n_kv_head: Optional[int] = None  # each key head serves n_head / n_kv_head query heads; None: n_head
    head_dim: Optional[int] = None   # None: n_embd / n_head
    mlp_dim: Optional[int] = None    # None: 4 * n_embd
    norm: str = "layer"              # layer | rms
    norm_eps: float = 1e-5
    position: str = "learned"        # learned | rope
    rope_base: float = 10_000.0
    rope_scaling: Optional[tuple] = None  # Llama 3's factor, low_freq_factor, high_freq_factor, original block_size
    mlp: str = "gelu"                # gelu (the tanh form of GPT-2) | gelu_erf (the exact one of nanoGPT) | swiglu
    qkv_bias: bool = False           # biases in c_attn even if bias is False, as in Qwen2
    qk_norm: bool = False            # RMSNorm of each head's query and key, as in Qwen3
    tied: bool = True                # the policy head's weight is the token embedding

    def __post_init__(self):
        self.require_whole("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        for name, value in {"n_kv_head": self.n_head, "head_dim": self.n_embd // self.n_head,
                            "mlp_dim": 4 * self.n_embd}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.require_whole("n_kv_head", "head_dim", "mlp_dim")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be divisible by n_kv_head={self.n_kv_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")
        for name, kinds in (("norm", ("layer", "rms")), ("position", ("learned", "rope")),
                            ("mlp", ("gelu", "gelu_erf", "swiglu"))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(kinds)}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, because RoPE rotates pairs of numbers")

    @property
    def cache_size(self):  # numbers in a KVCache for one position of a row
        return 2 * self.n_layer * self.n_kv_head * self.head_dim

    def require_whole(self, *names):
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")


class KVCache:
    """Keys and values of the positions seen so far: k[layer] and v[layer], (B, nkv, max_len, hd) each.

    Slot p of a row belongs to position p of that row, so ragged rows need no shifting and no left padding:
    each row's next token simply goes to its own next slot. The cache is written in place: use it under torch.no_grad().

    Slots beyond a row's position are masked, and a masked slot has weight exactly 0. But 0 * NaN is
    NaN, so the slots must hold finite numbers. They hold zeros at first, later keys and values of other tokens
    (padding of a shorter prompt, an earlier use of this cache), which are finite unless the model itself is broken.

    Memory for `room` slots (default: block_size) is allocated once: on a GPU, tensors of growing sizes would leave gaps
    of their own size. A prefill writes each row to `copies` consecutive rows. Raises ValueError if max_len exceeds
    room, or if room exceeds block_size, beyond which the model knows no position."""

    def __init__(self, config, batch_size, max_len, device, dtype, room=None, copies=1):
        self.room = config.block_size if room is None else room
        if self.room > config.block_size:
            raise ValueError(f"a cache with room={self.room} exceeds block_size={config.block_size}")
        self.shape = batch_size, config.n_kv_head, config.head_dim
        self.memory = [torch.empty(math.prod(self.shape) * self.room, device=device, dtype=dtype)
                       for _ in range(2 * config.n_layer)]
        self.rows = torch.arange(batch_size, device=device)
        self.batch_size, self.max_len, self.copies = batch_size, 0, copies
        self.grow(max_len)

    def grow(self, max_len):
        """Makes max_len positions usable. A decoding step reads every slot: a short cache is faster than a slice of a
        long one, whose rows lie far apart in memory. So growing the cache copies its rows farther apart."""
        if max_len > self.room:
            raise ValueError(f"a cache of max_len={max_len} exceeds its room={self.room}")
        (B, heads, size), views = self.shape, []
        for memory in self.memory:  # one by one, so that only one at a time exists twice
            old, new = (memory[:B * heads * n * size].view(B, heads, n, size) for n in (self.max_len, max_len))
            old = old.clone()  # because it shares its memory with the first rows of new
            new[:, :, self.max_len:] = 0
            new[:, :, :self.max_len] = old
            views.append(new)
        self.k, self.v, self.max_len = views[:len(views) // 2], views[len(views) // 2:], max_len

    def check(self, batch_size, length):
        """Raises ValueError for a wrong batch size or a write past max_len. Takes Python ints: no device sync."""
        if batch_size != self.batch_size:
            raise ValueError(f"{batch_size} rows cannot use a cache made for {self.batch_size}")
        if length > self.max_len:
            raise ValueError(f"{length} positions do not fit in a cache of max_len={self.max_len}")

    def update(self, layer, k, v, positions):
        """Stores k, v (B, nkv, T, hd) of one layer. Returns the keys and values to attend to."""
        for slots, new in ((self.k[layer], k), (self.v[layer], v)):
            if positions is None:  # prefill: slots 0..T-1 of every row, which see only each other
                slots[:, :, :k.size(2)].unflatten(0, (-1, self.copies))[:] = new.unsqueeze(1)
            else:
                slots[self.rows, :, positions] = new[:, :, 0]
        return (k, v) if positions is None else (self.k[layer], self.v[layer])  # (B, nkv, max_len, hd) each


def rope(config, where):
    """cos and sin of RoPE's angles [Su et al. 2021, 2104.09864] at positions `where`, (T,) or (B, T): (1, T, hd / 2) or
    (B, 1, T, hd / 2), float32 even under autocast: in bfloat16 an angle at position 8,000 can be half a turn off."""
    freqs = 1 / config.rope_base ** (torch.arange(0, config.head_dim, 2, device=where.device) / config.head_dim)
    if config.rope_scaling:  # Llama 3.1: low frequencies are divided by factor; those that turn often in training stay
        factor, low, high, original = config.rope_scaling
        keep = ((original * freqs / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / factor
    angles = (where.unsqueeze(-1) * freqs).unsqueeze(-3)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates x (B, n, T, hd) by the angles of its positions. The pairs are (i, i + hd / 2), as in Hugging Face's
    files; Meta's own files pair (2i, 2i + 1)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(hd)) v, (B, nh, T, hd), for q (B, nh, T, hd) and k, v (B, nkv, S, hd): query head h looks at
    key head h * nkv // nh. `mask`, broadcast to (B, nh, T, S), is Trunk.forward's; None means causal, with T = S."""
    group = q.size(1) // k.size(1)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout,
                                              enable_gqa=group > 1)
    # Written out, because torch's own bfloat16 kernels for a CPU take 1.2 to 5 times as long (docs/benchmarks.md).
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    weights = (q / math.sqrt(q.size(3)) @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(weights, dim=-1, dtype=weights.dtype)  # without dtype, autocast takes slow float32
    return F.dropout(weights, dropout) @ v


def norm(config, size):
    if config.norm == "rms":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of q, k and v
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=config.norm_eps) for _ in range(2))
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None, positions=None, mask=None):
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, nh + 2 nkv, T, hd)
        q, k, v = qkv.split(self.heads, dim=1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation:  # before the cache, so that it holds rotated keys and no step rotates them again
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = attention(q, k, v, mask, self.config.dropout if self.training else 0.0)  # (B, nh, T, hd)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind, gates = config.mlp, config.mlp == "swiglu"
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim * (1 + gates), bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:  # the two forms of GELU differ a little in every logit
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        return self.resid_dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, *where):
        x = x + self.attn(self.ln_1(x), *where)
        return x + self.mlp(self.ln_2(x))


class Trunk(nn.Module):
    """Embeddings, blocks and the final norm: everything but the heads.

    With `recompute` set, a pass with gradients keeps only each block's input, and the backward pass computes the rest
    again [activation checkpointing, Chen et al. 2016, 1604.06174]. On a CPU this gives the same gradients to the last
    bit, dropout included, for about a third more arithmetic."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = norm(config, config.n_embd)

        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                # 2 * n_layer layers add to the residual stream; this keeps its variance independent of depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, cache=None, positions=None, mask=None):
        """Token ids idx (B, T) -> hidden states (B, T, C) after the final norm.

        No cache: a pass over whole sequences, all rows at positions 0..T-1.
        Cache, no positions (prefill): the same, and slots 0..T-1 of the cache are filled.
        Cache and positions (B,) (decode): idx is (B, 1); row b's token is at positions[b], is stored
        there and attends to slots 0..positions[b].
        Positions (B, T) and mask (B, 1, T, T): a row holds several texts, and mask is True where a token may attend.

        Raises ValueError if T exceeds block_size, or if idx, cache and positions do not agree."""
        B, T = idx.shape
        if T > self.config.block_size and mask is None:
            raise ValueError(f"a sequence of {T} tokens exceeds block_size={self.config.block_size}")
        where = positions
        if positions is None:
            if cache is not None:
                cache.check(B * cache.copies, T)
            where = torch.arange(T, device=idx.device)  # (T,)
        elif mask is None:
            if cache is None or T != 1:
                raise ValueError(f"positions are for decoding: one token per row and a cache, got T={T}")
            # On a GPU the positions are not checked, because reading them would wait for the device.
            cache.check(B, int(positions.max()) + 1 if positions.device.type == "cpu" else 0)
            where = positions.unsqueeze(1)  # (B, 1)
            mask = (torch.arange(cache.max_len, device=idx.device) <= where)[:, None, None]  # (B, 1, 1, max_len)
        x = self.wte(idx)  # (B, T, C)
        if mask is not None and mask.device.type != "cpu":  # else each layer would convert it to a bias
            autocast = torch.is_autocast_enabled(mask.device.type)
            dtype = torch.get_autocast_dtype(mask.device.type) if autocast else x.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        rotation = rope(self.config, where) if self.config.position == "rope" else None
        if rotation is None:
            x = x + self.wpe(where)
        x = self.dropout(x)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, rotation, None, None, mask, use_reentrant=False) if recompute else \
                block(x, rotation, cache, positions, mask)
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
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, cache=None, positions=None):
        """Hidden states (B, T, C); the arguments are Trunk.forward's."""
        return self.trunk(idx, cache, positions)

    def policy_head(self, hidden):
        """Hidden states (..., C) -> logits (..., V)."""
        return F.linear(hidden, self.unembedding)

    @property
    def unembedding(self):
        """The policy head's weight (V, C)."""
        return (self.trunk.wte if self.config.tied else self.lm_head).weight
