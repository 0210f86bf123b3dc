"""
A GPT-2 transformer with the heads RLHF needs (policy, value, scalar reward), a KV cache for sampling, and
GPT-2 weights in and out.

The trunk returns hidden states and the caller applies the heads, because PPO wants logits at response
positions only and a reward model wants none. There is no loss, no sampling and no optimizer in this file.

Shapes: B batch, T sequence length, C width (n_embd), V vocabulary, nh heads of size hd = C / nh.
Sequences are padded on the right only: position ids are 0..T-1 in every row, and since causal attention
never looks right, no real token can see a pad, so a pass over whole sequences needs no attention mask.
"""

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

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

    What stands beyond a row's position is masked, and a masked slot has weight exactly 0. But 0 * NaN is
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
        Cache and positions (B,) (decode): idx is (B, 1); row b's token stands at positions[b], is stored
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

    @classmethod
    def from_gpt2(cls, path_or_name):
        """A GPT with the weights of a Hugging Face GPT-2 checkpoint, in float32; dropout 0, value head 0.

        path_or_name is a folder with config.json and model.safetensors or pytorch_model.bin; or a weights
        file (.safetensors, or anything torch.load reads), whose sizes are read off the shapes, with heads of
        size 64; or one of GPT2_NAMES, downloaded once.

        Raises FileNotFoundError for a path that is not there, OSError for a failed download, ImportError for
        a safetensors file without that package, ValueError for a checkpoint that is not exactly a GPT-2."""
        path = Path(path_or_name)
        if not path.exists():
            if str(path_or_name) in GPT2_NAMES:
                return download_gpt2(str(path_or_name))
            raise FileNotFoundError(f"{path} does not exist: give a folder with config.json and "
                                    "model.safetensors or pytorch_model.bin, a weights file, or one of "
                                    + ", ".join(GPT2_NAMES))
        if path.is_dir():
            config = config_from_json(path / "config.json")
            file = path / "model.safetensors"  # first, as in transformers: a .bin beside it may be stale
            file = file if file.exists() else path / "pytorch_model.bin"
            if not file.exists():
                raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
            weights = read_weights(file)
        else:
            weights = read_weights(path)
            config = config_from_shapes(weights, path)

        model = cls(config)
        names = {gpt2_name(name): p for name, p in model.trunk.named_parameters()}
        missing, unknown = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
        if missing or unknown:
            raise ValueError(f"{path} is not a GPT-2 of {config.n_layer} layers: {len(missing)} weights are "
                             f"missing {missing[:4]}, {len(unknown)} are unknown {unknown[:4]}")
        with torch.no_grad():
            for name, p in names.items():
                w, shape = weights[name], p.shape[::-1] if is_conv1d(name) else p.shape
                if w.shape != shape or not w.is_floating_point():
                    raise ValueError(f"{path}: {name} is {w.dtype} of shape {list(w.shape)}, but floats "
                                     f"of shape {list(shape)} is needed")
                p.copy_(w.t() if is_conv1d(name) else w)
        return model

    def to_gpt2(self, path):
        """Write the folder `path` (config.json, pytorch_model.bin) for transformers' GPT2LMHeadModel.

        The value head is not part of that format and is left out. The end-of-text id is taken to be the last
        one, as in GPT-2. Raises ValueError for a model without biases, FileExistsError if `path` exists and
        is not an empty folder."""
        path = Path(path)
        if not self.config.bias:
            raise ValueError("a model with bias=False cannot be saved as GPT-2, which has biases everywhere")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not an empty folder: choose another path")
        path.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, p in self.trunk.named_parameters():
            w = p.detach().cpu()
            name = gpt2_name(name)
            weights["transformer." + name] = w.t().contiguous() if is_conv1d(name) else w.clone()
        torch.save(weights, path / "pytorch_model.bin")
        c = self.config
        fields = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                      n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                      n_inner=None, embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout,
                      bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1, **GPT2_FIXED)
        (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


# -----------------------------------------------------------------------------
# Hugging Face's GPT-2 format

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
GPT2_URL = "https://huggingface.co/{name}/resolve/main/{file}"

# What config.json may say differently but the trunk above does in one way only. Absent fields mean these.
GPT2_FIXED = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)


def gpt2_name(name):
    """Our trunk's parameter name -> GPT-2's. Only the list of blocks is called differently."""
    return re.sub(r"^blocks\.", "h.", name)


def is_conv1d(name):
    """GPT-2's linear layers are Conv1D modules, which store (in, out) where nn.Linear stores (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def read_weights(file):
    """GPT-2 weights by name, less their optional "transformer." prefix and whatever is not a weight."""
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{file} needs `pip install safetensors`; a .bin file does not") from None
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"{file} is not a plain dictionary of weights, as GPT-2 checkpoints are")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    lm_head = weights.pop("lm_head.weight", None)
    if lm_head is not None and not torch.equal(lm_head, weights.get("wte.weight", lm_head)):
        raise ValueError(f"{file}: lm_head.weight differs from wte.weight; only tied models can be loaded")
    # older checkpoints store each layer's causal mask as if it were a weight
    return {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def config_from_json(file):
    """GPTConfig from a GPT-2 config.json. Raises ValueError naming the field for another architecture."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: without it give the weights file itself")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields["model_type"] != "gpt2":
            raise ValueError(f"{file}: model_type is {fields['model_type']!r}, not 'gpt2'")
        config = GPTConfig(fields["n_positions"], fields["vocab_size"], fields["n_layer"], fields["n_head"],
                           fields["n_embd"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{file} is not a GPT-2 config.json ({error})") from error
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing") from None
    for name, value in dict(GPT2_FIXED, n_inner=4 * config.n_embd).items():
        given = value if fields.get(name) is None else fields[name]
        if given != value and given != "gelu_pytorch_tanh":  # gelu_new by its other name
            raise ValueError(f"{file}: {name}={given!r} is not supported, only {value!r}")
    return config


def config_from_shapes(weights, file):
    """GPTConfig from the shapes of GPT-2 weights. Heads cannot be seen in them; OpenAI's all have size 64."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{file} has no {name}, so it is not a GPT-2")
    (vocab_size, n_embd), block_size = weights["wte.weight"].shape, weights["wpe.weight"].size(0)
    if n_embd % 64:
        raise ValueError(f"{file}: n_embd={n_embd} is not a multiple of 64, the head size assumed without a "
                         "config.json: give a folder that has one")
    layers = {int(name.split(".")[1]) for name in weights if re.match(r"h\.\d+\.", name)}
    return GPTConfig(block_size, vocab_size, max(layers, default=0) + 1, n_embd // 64, n_embd)


def download_gpt2(name):
    """A public GPT-2 by name from torch.hub's cache, downloaded there first if need be (0.3 to 6 GB)."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" / name
    if (folder / "pytorch_model.bin").exists():
        return GPT.from_gpt2(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A connection that closes early looks like the end of the file: only what has loaded enters the cache.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        for file in ("config.json", "pytorch_model.bin"):
            url = GPT2_URL.format(name=name, file=file)
            try:
                torch.hub.download_url_to_file(url, f"{partial}/{file}")
            except OSError as error:
                raise OSError(f"could not download {url} ({error}): check the connection, or give a folder "
                              "with config.json and pytorch_model.bin") from error
        model = GPT.from_gpt2(partial)
        for file in ("config.json", "pytorch_model.bin"):  # weights last: their presence means all is there
            (Path(partial) / file).replace(folder / file)
    return model
