"""Tests of model.py: against a second implementation, the KV cache, compilation."""
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import GPT, GPTConfig, KVCache
from tensors import BLOCK, V, gap, make_gpt, randn, random_ids, rng

ids = partial(random_ids, V)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


# -----------------------------------------------------------------------------
# a second implementation: numpy, one sequence, one head and one query at a time

def oracle(gpt, sequence):
    """Hidden states (T, C) of one list of ids, in float64: the GPT-2 description, token by token."""
    w = {name: p.detach().double().numpy() for name, p in gpt.trunk.named_parameters()}
    nh, C = gpt.config.n_head, gpt.config.n_embd
    hd = C // nh

    def norm(x, name):
        x = x - x.mean()
        return x / np.sqrt((x ** 2).mean() + 1e-5) * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0.0)

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))) / 2

    stream = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(sequence)]
    for i in range(gpt.config.n_layer):
        qkv = [np.split(linear(norm(x, f"blocks.{i}.ln_1"), f"blocks.{i}.attn.c_attn"), 3) for x in stream]
        for t in range(len(sequence)):
            heads = []
            for h in range(nh):
                part = slice(h * hd, (h + 1) * hd)
                weights = np.exp([qkv[t][0][part] @ qkv[s][1][part] / math.sqrt(hd) for s in range(t + 1)])
                heads.append(sum(a * qkv[s][2][part] for s, a in enumerate(weights / weights.sum())))
            x = stream[t] + linear(np.concatenate(heads), f"blocks.{i}.attn.c_proj")
            inner = gelu(linear(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp.c_fc"))
            stream[t] = x + linear(inner, f"blocks.{i}.mlp.c_proj")
    return torch.tensor(np.stack([norm(x, "ln_f") for x in stream]))


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_second_implementation(dtype, bias):
    gpt = make_gpt(dtype, bias=bias)
    idx = ids(3, BLOCK)
    hidden = gpt(idx)
    assert hidden.shape == (3, BLOCK, 24) and hidden.dtype == dtype
    expected = torch.stack([oracle(gpt, row) for row in idx.tolist()])
    assert gap(hidden, expected) < TOLERANCE[dtype]
    logits = gpt.policy_head(hidden)
    assert gap(logits, expected @ gpt.trunk.wte.weight.double().T) < 10 * TOLERANCE[dtype]
    value = expected @ gpt.value_head.linear.weight.double()[0] + gpt.value_head.linear.bias.double()
    got = gpt.value_head(hidden)
    assert got.shape == (3, BLOCK) and gap(got, value) < TOLERANCE[dtype]


def test_causal_and_blind_to_right_padding():
    gpt, idx = make_gpt(), ids(2, BLOCK)
    hidden = gpt(idx)
    for t in range(BLOCK):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        moved = (gpt(changed) - hidden).abs().amax(dim=(0, 2)) > 1e-9
        assert not moved[:t].any() and moved[t:].all(), t
    for length in (1, 5, BLOCK - 1):
        junk = idx.clone()
        junk[:, length:] = ids(2, BLOCK, seed=9)[:, length:]
        assert torch.equal(gpt(junk)[:, :length], hidden[:, :length])
        assert gap(gpt(idx[:, :length]), hidden[:, :length]) < 1e-12


@DTYPES
def test_rows_do_not_depend_on_their_batch(dtype):
    gpt, idx = make_gpt(dtype), ids(6, 11)
    for chunk in (1, 4):
        assert gap(torch.cat([gpt(part) for part in idx.split(chunk)]), gpt(idx)) < TOLERANCE[dtype]


def test_block_size_is_the_longest_sequence():
    gpt = make_gpt()
    assert gpt(ids(1, BLOCK)).shape == (1, BLOCK, 24)
    # No ids are looked at before the check: these would be out of the vocabulary.
    with pytest.raises(ValueError, match="17 tokens exceeds block_size=16"):
        gpt(torch.full((1, BLOCK + 1), 10 ** 6))


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("autocast", [False, True])
def test_written_out_bfloat16_attention_is_torchs_own_up_to_rounding(length, autocast):
    """A weight is at most 1, so rounding it to bfloat16 moves it by at most 2^-9. A mean of values of at most L moves
    by as many times L as there are values, and the result is rounded once more."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, dy = (torch.randn(3, 2, 7, 8, generator=generator).bfloat16() for _ in range(4))
    causal = length == 7
    q, dy = (q, dy) if causal else (q[:, :, :1], dy[:, :, :1])
    mask = None if causal else (torch.arange(7) < torch.tensor([length, 7, 2])[:, None])[:, None, None]

    def run(attend, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attend(*inputs)
        out.backward(dy.to(out.dtype))
        return [out, *(x.grad for x in inputs)]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = run(lambda q, k, v: model.attention(q, k, v, mask, 0.0), q, k, v)
    expected = run(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal), q.double(), k.double(), v.double())
    assert all(x.dtype == torch.bfloat16 for x in found)
    bound = 8 * 2 ** -9 * v.abs().max()
    assert gap(found[0], expected[0]) < bound
    for mine, theirs in zip(found[1:], expected[1:]):
        assert gap(mine, theirs) < bound * dy.abs().max()
    if not causal:
        hidden = ~mask[:, 0, 0]
        assert all((x.transpose(1, 2)[hidden] == 0).all() for x in found[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, (torch.arange(7) < 4).view(1, 1, 1, 7)], ids=["causal", "mask"])
def test_each_key_head_serves_a_group_of_query_heads(dtype, mask):
    """Heads 0 to 2 look at key head 0, and 3 to 5 at key head 1."""
    q, (k, v) = randn(3, 6, 7, 8, seed=1).to(dtype), (randn(3, 2, 7, 8, seed=s).to(dtype) for s in (2, 3))
    found = model.attention(q, k, v, mask, 0.0)
    one_by_one = [model.attention(q[:, h:h + 1], k[:, h // 3:h // 3 + 1], v[:, h // 3:h // 3 + 1], mask, 0.0)
                  for h in range(6)]
    assert gap(found, torch.cat(one_by_one, dim=1)) < (1e-6 if dtype == torch.float32 else 0.02)


def test_the_written_out_attention_drops_weights_as_torchs_own_does():
    ones = torch.ones(1, 1, 400, 1, dtype=torch.bfloat16)
    whole, dropped = (model.attention(ones, ones, ones, None, p)[0, 0, 200:, 0] for p in (0.0, 0.5))
    assert gap(whole, torch.ones(200)) < 0.02
    assert abs(dropped.float().mean() - 1) < 0.02 and dropped.float().std() > 0.03


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients_to_the_last_bit(dropout, bf16):
    gpt, gradients = make_gpt(torch.float32, dropout=dropout), []
    for gpt.trunk.recompute in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = gpt.policy_head(gpt(ids(3, 9))).float().logsumexp(-1).square().sum()
        loss.backward()
        gradients.append([p.grad for p in gpt.trunk.parameters()])
        gpt.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_recomputed_without_gradients_or_with_a_cache(monkeypatch):
    gpt, again = make_gpt(), []
    monkeypatch.setattr(model, "checkpoint", lambda block, *args, use_reentrant: again.append(block) or block(*args))
    gpt.trunk.recompute = True
    with torch.no_grad():
        gpt(ids(3, 9))
        gpt(ids(3, 9), cache=KVCache(gpt.config, 3, 9, "cpu", torch.float64))
    assert not again
    gpt(ids(3, 9))
    assert again == list(gpt.trunk.blocks)


# -----------------------------------------------------------------------------
# the KV cache

def decode_all(gpt, idx, lens, cache):
    """Hidden (B, T, C) through the cache: ragged prefill, then one token a step, and room for it where there is none.
    NaN where not computed."""
    B, T = idx.shape
    P = int(lens.max())
    out = torch.full((B, T, gpt.config.n_embd), math.nan, dtype=gpt.trunk.wte.weight.dtype)
    with torch.no_grad():
        hidden = gpt(idx[:, :P], cache=cache)
        for b in range(B):
            out[b, :lens[b]] = hidden[b, :lens[b]]
        for step in range(T - P):
            positions = lens + step
            token = idx.gather(1, positions[:, None])
            cache.grow(max(cache.max_len, P + step + 1))
            hidden = gpt(token, cache=cache, positions=positions)
            out[torch.arange(B), positions] = hidden[:, 0].to(out.dtype)
    return out


LENS = torch.tensor([1, 7, 4, 7])


def reached(T):
    """(B, T): the positions that decode_all gets to."""
    return torch.arange(T) < (LENS + T - LENS.max())[:, None]


@DTYPES
@pytest.mark.parametrize("slots", [7, 9, BLOCK], ids=["grows from the prompt on", "grows later", "does not grow"])
def test_ragged_decode_equals_full_forward(dtype, slots):
    gpt, idx = make_gpt(dtype), ids(4, BLOCK)
    cache = KVCache(gpt.config, 4, slots, "cpu", dtype)
    got, seen = decode_all(gpt, idx, LENS, cache), reached(BLOCK)
    assert all(x.size(2) == cache.max_len == BLOCK for x in cache.k + cache.v)
    assert gap(got[seen], gpt(idx)[seen]) < TOLERANCE[dtype]
    assert got[~seen].isnan().all() and seen.sum() == 4 * 9 + LENS.sum()


def test_decode_ignores_stale_cache_and_prompt_padding():
    gpt, idx = make_gpt(), ids(4, BLOCK)
    fresh = decode_all(gpt, idx, LENS, KVCache(gpt.config, 4, BLOCK, "cpu", torch.float64))
    seen = reached(BLOCK)

    stale = KVCache(gpt.config, 4, BLOCK, "cpu", torch.float64)
    for k, v in zip(stale.k, stale.v):
        k.fill_(1e20), v.fill_(-1e20)
    assert torch.equal(decode_all(gpt, idx, LENS, stale)[seen], fresh[seen])
    decode_all(gpt, ids(4, BLOCK, seed=5), LENS.flip(0), stale)  # another batch, then the first one again
    assert torch.equal(decode_all(gpt, idx, LENS, stale)[seen], fresh[seen])

    # Prefill writes keys for the pads of short prompts too: each must be overwritten when its row gets there.
    junk = KVCache(gpt.config, 4, BLOCK, "cpu", torch.float64)
    padded = torch.where(torch.arange(7) < LENS[:, None], idx[:, :7], ids(4, 7, seed=6))
    with torch.no_grad():
        gpt(padded, cache=junk)
        for step in range(9):
            token = idx.gather(1, LENS[:, None] + step)
            hidden = gpt(token, cache=junk, positions=LENS + step)
            assert torch.equal(hidden[:, 0], fresh[torch.arange(4), LENS + step])


def test_a_cache_grows_in_the_memory_that_it_took_at_first():
    """What it holds stays, the new slots are 0, and there is no gap between its rows."""
    cache = KVCache(make_gpt().config, 4, 3, "cpu", torch.float64, room=9)
    numbers = [torch.randn(4, 3, 3, 8, generator=rng(seed)).double() for seed in range(4)]
    for memory, new, old in zip(cache.memory, cache.k + cache.v, numbers, strict=True):
        memory.fill_(7)
        new.copy_(old)
        assert len(memory) == 4 * 3 * 9 * 8
    for slots in (5, 9):
        cache.grow(slots)
        for memory, new, old in zip(cache.memory, cache.k + cache.v, numbers, strict=True):
            assert torch.equal(new, F.pad(old, (0, 0, 0, slots - 3))) and new.is_contiguous()
            assert new.data_ptr() == memory.data_ptr()


def test_decode_writes_one_slot_per_row_and_layer():
    gpt, idx = make_gpt(), ids(3, 5)
    cache = KVCache(gpt.config, 3, 12, "cpu", torch.float64)
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v] == 2 * [(3, 3, 12, 8)]
    with torch.no_grad():
        gpt(idx, cache=cache)
        written = (torch.stack(cache.k) != 0).all(-1).all(2)  # (n_layer, B, max_len)
        assert torch.equal(written, (torch.arange(12) < 5).expand(2, 3, 12))
        before = torch.stack(cache.k), torch.stack(cache.v)
        positions = torch.tensor([11, 2, 5])
        gpt(idx[:, :1], cache=cache, positions=positions)
    for old, new in zip(before, (cache.k, cache.v)):
        changed = (old != torch.stack(new)).any(-1).any(2)  # (n_layer, B, max_len)
        assert torch.equal(changed, (torch.arange(12) == positions[:, None]).expand(2, 3, 12))


def test_cache_under_bfloat16_autocast():
    gpt, idx = make_gpt(torch.float32), ids(4, BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(gpt.config, 4, BLOCK, "cpu", torch.bfloat16)
        got = decode_all(gpt, idx, LENS, cache)
        full = gpt(idx)
    seen = reached(BLOCK)
    assert (got - full)[seen].abs().mean() < 0.05 and full.dtype == torch.float32


def test_cache_overflow_and_misuse_raise():
    gpt = make_gpt()
    with pytest.raises(ValueError, match="room=17 exceeds block_size=16"):
        KVCache(gpt.config, 2, 6, "cpu", torch.float64, room=17)
    with pytest.raises(ValueError, match="max_len=17 exceeds its room=16"):
        KVCache(gpt.config, 2, 17, "cpu", torch.float64)
    with pytest.raises(ValueError, match="max_len=7 exceeds its room=6"):
        KVCache(gpt.config, 2, 6, "cpu", torch.float64, room=6).grow(7)
    cache = KVCache(gpt.config, 2, 6, "cpu", torch.float64)
    token, positions = ids(2, 1), torch.tensor([5, 6])
    with torch.no_grad():
        gpt(ids(2, 6), cache=cache)
        gpt(token, cache=cache, positions=torch.tensor([5, 5]))
        kept = torch.stack(cache.k)
        with pytest.raises(ValueError, match="7 positions do not fit in a cache of max_len=6"):
            gpt(ids(2, 7), cache=cache)
        with pytest.raises(ValueError, match="7 positions do not fit in a cache of max_len=6"):
            gpt(token, cache=cache, positions=positions)
        with pytest.raises(ValueError, match="1 rows cannot use a cache made for 2"):
            gpt(ids(1, 3), cache=cache)
        with pytest.raises(ValueError, match="3 rows cannot use a cache made for 2"):
            gpt(ids(3, 1), cache=cache, positions=torch.tensor([1, 1, 1]))
        with pytest.raises(ValueError, match="one token per row"):
            gpt(ids(2, 2), cache=cache, positions=torch.tensor([1, 1]))
        with pytest.raises(ValueError, match="one token per row and a cache"):
            gpt(token, positions=torch.tensor([1, 1]))
    assert torch.equal(torch.stack(cache.k), kept)


# -----------------------------------------------------------------------------
# heads, init, dropout, config

def test_policy_head_is_tied_and_has_exactly_v_logits():
    gpt, idx = make_gpt(), torch.tensor([[3, 5, 3, 8]])
    assert gpt.policy_head(gpt(idx)).shape == (1, 4, V)
    assert gpt.policy_head(gpt(idx)[0, -1]).shape == (V,)
    assert [n for n, p in gpt.state_dict().items() if V in p.shape] == ["trunk.wte.weight"]

    wte = gpt.trunk.wte.weight
    direction = torch.randn(1, 4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradient(logits):
        return torch.autograd.grad((logits * direction).sum(), wte)[0]

    both = gradient(gpt.policy_head(gpt(idx)))
    as_head = gradient(gpt.policy_head(gpt(idx).detach()))
    as_embedding = gradient(torch.nn.functional.linear(gpt(idx), wte.detach()))
    assert (as_head.abs().amax(1) > 0).all()
    assert (as_embedding.abs().amax(1) > 0).nonzero().flatten().tolist() == [3, 5, 8]
    assert gap(both, as_head + as_embedding) < 1e-12


def test_value_head_starts_at_zero_and_can_learn():
    gpt = GPT(GPTConfig(BLOCK, V, 2, 2, 16))
    values = gpt.value_head(gpt(ids(2, 5)))
    assert values.shape == (2, 5) and (values == 0).all()
    (values - 1).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in gpt.value_head.parameters())


def test_init_statistics():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 300, 8, 2, 64))
    for name, p in gpt.trunk.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02  # 1 / sqrt(2 * 8 layers)
            # 4096 numbers or more: the sample std is within 1.1% (one sigma), so 6% cannot flake
            assert abs(p.std().item() / std - 1) < 0.06 and abs(p.mean().item()) < std / 8, name
    assert gpt(ids(2, 30)).std().item() == pytest.approx(1, abs=0.05)


def test_parameter_count_is_gpt2s():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(1024, 50257, 12, 12, 768))
    assert gpt.n_params == 124_439_808 + 769  # OpenAI's "124M", and the value head
    assert len(gpt.state_dict()) == len(list(gpt.parameters())) == 148 + 2


def test_dropout_acts_in_training_only():
    idx = ids(2, 9)
    still, noisy = make_gpt(), make_gpt(dropout=0.5)
    noisy.load_state_dict(still.state_dict())
    assert torch.equal(still.train()(idx), still(idx))
    assert torch.equal(noisy.eval()(idx), still(idx))
    noisy.train()
    assert gap(noisy(idx), noisy(idx)) > 0.1
    for module in noisy.modules():  # the attention weights have no Dropout module of their own
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert gap(noisy(idx), noisy(idx)) > 0.1


@pytest.mark.parametrize("field, value, message", [
    ("n_embd", 25, "n_embd=25 must be divisible by n_head=3"), ("block_size", 0, "block_size=0 must be"),
    ("vocab_size", -5, "vocab_size=-5 must be"), ("n_layer", 2.0, "n_layer=2.0 must be"),
    ("n_head", True, "n_head=True must be"), ("n_head", None, "n_head=None must be"),
    ("dropout", 1.0, "dropout=1.0 must be"), ("dropout", -0.1, "dropout=-0.1 must be"),
    ("dropout", math.nan, "dropout=nan must be")])
def test_config_that_cannot_be_built_raises(field, value, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(dict(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24) | {field: value}))


def test_compile_leaves_the_state_dict_alone():
    gpt, plain = make_gpt(), make_gpt()
    gpt.trunk.compile()  # nothing is compiled before the first call
    assert gpt.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(gpt.state_dict(), strict=True)
