"""Tests of model.py: against a second implementation, against transformers, the KV cache, GPT-2 files."""
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

import model
from model import GPT, GPTConfig, KVCache
from tensors import gap, random_ids

V, BLOCK = 37, 16
ids = partial(random_ids, V)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def randomize(module, seed=0):
    """Weights far from init, LayerNorms and biases included: at init attention is flat and hides bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            is_gain = "ln_" in name and name.endswith("weight")
            p.copy_(is_gain + 0.25 * torch.randn(p.shape, generator=generator))
    return module


def make_gpt(dtype=torch.float64, seed=0, **sizes):
    sizes = dict(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24) | sizes
    return randomize(GPT(GPTConfig(**sizes)), seed).to(dtype)


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
    monkeypatch.setattr(model, "checkpoint", lambda block, x, use_reentrant: again.append(block) or block(x))
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
    with pytest.raises(ValueError, match="max_len=17 exceeds block_size=16"):
        KVCache(gpt.config, 2, 17, "cpu", torch.float64)
    with pytest.raises(ValueError, match="max_len=17 exceeds block_size=16"):
        KVCache(gpt.config, 2, 16, "cpu", torch.float64).grow(17)
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


# -----------------------------------------------------------------------------
# GPT-2 checkpoints

@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of our own making, and the model in it."""
    gpt = make_gpt(torch.float32)
    gpt.to_gpt2(tmp_path / "hf")
    return tmp_path / "hf", gpt


def same_trunk(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.trunk.parameters(), b.trunk.parameters(), strict=True))


def rewrite(path, change):
    """Replace the weights of a checkpoint folder by change(weights)."""
    torch.save(change(torch.load(path / "pytorch_model.bin")), path / "pytorch_model.bin")


def hf_model(**sizes):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=BLOCK, n_layer=2, **sizes)
    return randomize(transformers.GPT2LMHeadModel(config).eval(), seed=4)


@pytest.mark.parametrize("form", ["folder safetensors", "folder bin", "file safetensors", "file bin"])
def test_from_gpt2_gives_transformers_logits(tmp_path, form):
    pytest.importorskip("safetensors")
    hf = hf_model(n_head=2, n_embd=128)  # heads of size 64, so that a bare file can be read
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    path = tmp_path
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")  # with lm_head.weight, as in old files
    if form.startswith("file"):
        path = next(p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin"))
    gpt = GPT.from_gpt2(str(path))
    assert gpt.config == GPTConfig(BLOCK, V, 2, 2, 128)
    idx = ids(3, BLOCK)
    with torch.no_grad():
        expected = hf(idx).logits
        logits = gpt.policy_head(gpt(idx))
    assert expected.std() > 1 and gap(logits, expected) < 1e-4
    assert (gpt.value_head(gpt(idx)) == 0).all()


def test_to_gpt2_is_read_by_transformers(folder):
    path, gpt = folder
    transformers = pytest.importorskip("transformers")
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(hf) is transformers.GPT2LMHeadModel and hf.dtype == torch.float32
    assert not any(info.values()), info
    idx = ids(3, BLOCK)
    with torch.no_grad():
        expected = hf.eval()(idx).logits
        assert expected.std() > 0.5 and gap(gpt.policy_head(gpt(idx)), expected) < 1e-4
    assert hf.config.eos_token_id == hf.config.bos_token_id == V - 1


def test_to_gpt2_file_layout(folder):
    """GPT-2's own names and its (in, out) linear layers, which a round trip cannot see."""
    path, gpt = folder
    weights = torch.load(path / "pytorch_model.bin")
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    layers = [f"h.{i}.{part}" for i in range(2) for part in parts] + ["ln_f"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert set(weights) == {"transformer." + name for name in names + ["wte.weight", "wpe.weight"]}
    for name, w in weights.items():
        ours = gpt.trunk.get_parameter(name.removeprefix("transformer.").replace("h.", "blocks."))
        assert torch.equal(w, ours.T if ".c_" in name and name.endswith("weight") else ours), name


def test_gpt2_round_trip_is_exact(folder, tmp_path):
    path, gpt = folder
    back = GPT.from_gpt2(path)
    assert back.config == gpt.config and same_trunk(back, gpt)
    (tmp_path / "empty").mkdir()
    back.to_gpt2(tmp_path / "empty")  # an empty folder may be used
    assert same_trunk(GPT.from_gpt2(tmp_path / "empty"), gpt)


def test_from_gpt2_old_file_layouts(folder):
    """No "transformer." prefix, stored causal masks, an lm_head, half precision, dropout: all exist."""
    path, gpt = folder

    def old(weights):
        weights = {name.removeprefix("transformer."): w.half() for name, w in weights.items()}
        weights["lm_head.weight"] = weights["wte.weight"].clone()
        for i in range(2):
            weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK)
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    rewrite(path, old)
    config = json.loads((path / "config.json").read_text())
    for name in model.GPT2_FIXED:
        del config[name]  # absent means GPT-2's own value
    config |= dict(n_inner=4 * 24, resid_pdrop=0.1, attn_pdrop=0.1, activation_function="gelu_pytorch_tanh")
    (path / "config.json").write_text(json.dumps(config))
    back = GPT.from_gpt2(path)
    assert back.config.dropout == 0.0 and {p.dtype for p in back.parameters()} == {torch.float32}
    for p, q in zip(back.trunk.parameters(), gpt.trunk.parameters()):
        assert torch.equal(p, q.half().float())


@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 99),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("tie_word_embeddings", False)])
def test_from_gpt2_refuses_another_architecture(folder, field, value):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"config.json: {field}.*{value}"):
        GPT.from_gpt2(path)


@pytest.mark.parametrize("content, message", [
    ("{", "not a GPT-2 config.json"), ("[1]", "not a GPT-2 config.json"), ("\xff", "not a GPT-2 config.json"),
    ('{"model_type": "gpt2", "n_positions": 16}', "the field 'vocab_size' is missing"),
    ("{}", "the field 'model_type' is missing")])
def test_from_gpt2_refuses_a_broken_config(folder, content, message):
    path, _ = folder
    (path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        GPT.from_gpt2(path)


def drop(name):
    return lambda weights: {n: w for n, w in weights.items() if n != "transformer." + name}


def put(name, value):
    return lambda weights: weights | {name: value}


@pytest.mark.parametrize("change, message", [
    (drop("h.1.mlp.c_fc.bias"), r"1 weights are missing \['h.1.mlp.c_fc.bias'\], 0 are unknown"),
    (drop("wte.weight"), r"missing \['wte.weight'\]"),
    (put("score.weight", torch.zeros(1, 24)), r"missing \[\], 1 are unknown \['score.weight'\]"),
    (put("h.2.ln_1.weight", torch.zeros(24)), r"GPT-2 of 2 layers.*unknown \['h.2.ln_1.weight'\]"),
    (put("transformer.wpe.weight", torch.zeros(8, 24)), r"wpe.weight .*\[8, 24\].*\[16, 24\]"),
    (put("transformer.h.0.mlp.c_fc.weight", torch.zeros(96, 24)), r"h.0.mlp.c_fc.*\[96, 24\].*\[24, 96\]"),
    (put("transformer.ln_f.weight", torch.ones(24, dtype=torch.long)), "ln_f.weight is torch.int64"),
    (put("lm_head.weight", torch.zeros(V, 24)), "lm_head.weight differs from wte.weight"),
    (put("iter", 3), "not a plain dictionary of weights"),
    (lambda weights: [1, 2], "not a plain dictionary of weights")])
def test_from_gpt2_is_strict(folder, change, message):
    path, _ = folder
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_gpt2(path)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "last byte"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_from_gpt2_names_a_damaged_file(folder, file, damage):
    path, gpt = folder
    if file == "model.safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(torch.load(path / "pytorch_model.bin"), path / file)
    whole = (path / file).read_bytes()
    (path / file).write_bytes({"half": whole[:len(whole) // 2], "last byte": whole[:-1]}.get(damage, damage))
    with pytest.raises(ValueError, match=f"{file} cannot be read as weights"):
        GPT.from_gpt2(path)


def test_from_gpt2_prefers_safetensors_and_says_when_it_cannot(folder, monkeypatch):
    path, gpt = folder
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(torch.load(path / "pytorch_model.bin"), path / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    assert same_trunk(GPT.from_gpt2(path), gpt)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        GPT.from_gpt2(path)


def test_from_gpt2_refuses_what_is_not_there(folder, tmp_path):
    path, _ = folder
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder.*gpt2-xl"):
        GPT.from_gpt2(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="n_embd=24 is not a multiple of 64"):
        GPT.from_gpt2(path / "pytorch_model.bin")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no wte.weight, so it is not a GPT-2"):
        GPT.from_gpt2(tmp_path / "other.pt")
    (path / "pytorch_model.bin").rename(path / "weights.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        GPT.from_gpt2(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        GPT.from_gpt2(path)


def test_to_gpt2_refuses_to_overwrite_and_bias_free_models(folder, tmp_path):
    path, gpt = folder
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for taken in (path, path / "config.json"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            make_gpt(seed=7).to_gpt2(taken)
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ValueError, match="bias=False"):
        make_gpt(bias=False).to_gpt2(tmp_path / "no_bias")
    assert not (tmp_path / "no_bias").exists()


def test_download_by_name(folder, tmp_path, monkeypatch, capfd):
    source, gpt = folder
    remote, hub = tmp_path / "remote" / "gpt2", tmp_path / "hub"
    remote.parent.mkdir()
    source.rename(remote)
    weights = remote / "pytorch_model.bin"
    whole = weights.read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(model, "GPT2_URL", remote.parent.as_uri() + "/{name}/{file}")

    # A download that fails, or ends early as if the file were over, leaves nothing for a later call to take.
    weights.unlink()
    with pytest.raises(OSError, match="could not download file://.*pytorch_model.bin.*give a folder"):
        GPT.from_gpt2("gpt2")
    assert not [p for p in hub.rglob("*") if p.is_file()]
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        GPT.from_gpt2("gpt2")
    assert not [p for p in hub.rglob("*") if p.is_file()]

    weights.write_bytes(whole)
    capfd.readouterr()
    assert same_trunk(GPT.from_gpt2("gpt2"), gpt)
    assert "100" in capfd.readouterr().err  # torch.hub's progress bar: tqdm's, or its own where tqdm is missing
    assert {p.name for p in (hub / "checkpoints" / "gpt2").iterdir()} == {"config.json", "pytorch_model.bin"}
    weights.unlink()
    assert same_trunk(GPT.from_gpt2("gpt2"), gpt)  # the second time it comes from the cache
    with pytest.raises(FileNotFoundError, match="gpt3 does not exist"):
        GPT.from_gpt2("gpt3")
    gpt.to_gpt2(tmp_path / "gpt2-xl")
    assert same_trunk(GPT.from_gpt2("gpt2-xl"), gpt)  # a path that exists is taken before a name
