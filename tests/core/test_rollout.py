"""
Tests of rollout.py: what was sampled, what was recorded and what is scored again agree, to the last bit
where they can. Two kinds of model: a small GPT with random weights, checked against one unpadded pass per
token, and a Markov chain whose table of next-token logits says in advance what has to come out.
"""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import rollout
from model import GPT, GPTConfig
from pretrained import LLAMA
from rollout import generate, sample_tokens, score_response, score_values
from tensors import gap, random_ids, rng


V, BLOCK, NEW, EOS = 11, 11, 5, 7
ids = partial(random_ids, V)
INF, NAN = math.inf, math.nan
LENS = torch.tensor([6, 1, 3, 6, 2, 4, 5, 1])  # the longest prompt and NEW tokens fill the block exactly


PROMPTS = ids(8, 6)


def gpt(dtype=torch.float64, seed=0, **sizes):
    """Weights far from init: at init the value is 0 and attention is flat, which hides bugs."""
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng(seed := seed + 1)))
    return model.to(dtype).eval()


class Markov(nn.Module):
    """Next-token logits are table[previous token]; the value of a state is its previous token's id."""

    def __init__(self, table, block_size=BLOCK):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table))
        self.config = GPTConfig(block_size, len(table), n_layer=1, n_head=1, n_embd=1)
        self.calls = 0

    def forward(self, idx, cache=None, positions=None):
        self.calls += 1
        return F.one_hot(idx, len(self.table)).to(self.table.dtype)  # also refuses ids that do not exist

    def policy_head(self, hidden):
        # Linear, as a head must be, but no product: 0 * -inf would be NaN
        return self.table[hidden.argmax(-1)] * hidden.amax(-1, keepdim=True)

    def value_head(self, hidden):
        return hidden.argmax(-1).to(self.table.dtype)


def counting():
    """Always emits the previous id + 1: exp(-1000) is exactly 0, so every log-prob is exactly 0."""
    return Markov(1000 * torch.eye(V, dtype=torch.float64).roll(1, dims=1))


def sample(model, prompts=PROMPTS, lens=LENS, new=NEW, *, eos=EOS, seed=0, **options):
    return generate(model, prompts, lens, new, eos=eos, generator=rng(seed), **options)


def unpadded(model, row, prompt_len, n, T):
    """logprobs, values, entropy (3, n) of one row's first n response tokens: one pass per token, over what
    stands before it and nothing else."""
    out = []
    for end in range(prompt_len, prompt_len + n):
        hidden = model(row[None, :end])[0, -1]
        p = torch.softmax(model.policy_head(hidden) / T, -1)
        out.append(torch.stack([p[row[end]].log(), model.value_head(hidden), -(p * p.log()).sum()]))
    return torch.stack(out, 1)


def same_rollout(a, b):
    """Bit-identical in every field."""
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


# -----------------------------------------------------------------------------
# sampled = scored = computed without cache, padding or batch

@pytest.mark.parametrize("dtype, T", [(torch.float64, 1), (torch.float64, 0.5), (torch.float64, 2),
                                      (torch.float32, 1)], ids=str)
@torch.no_grad()
def test_cached_sampling_and_scoring_equal_unpadded_passes(dtype, T):
    """At every place where EOS can stand, and at every temperature."""
    model, tol, places = gpt(dtype), 1e-12 if dtype == torch.float64 else 1e-5, set()
    for eos in range(V):  # whichever tokens come out, each of them ends some response somewhere
        out = sample(model, eos=eos, seed=eos, temperature=T)
        scored = score_response(model, out.tokens, LENS, out.mask.size(1), T)
        for b, n in enumerate(out.response_lens.tolist()):
            expected = unpadded(model, out.tokens[b], int(LENS[b]), n, T)
            assert gap(torch.stack([out.logprobs[b, :n], out.values[b, :n]]), expected[:2]) <= tol
            assert gap(torch.stack([x[b, :n] for x in scored]), expected) <= tol
            places.add((n, out.tokens[b, LENS[b] + n - 1].item() == eos))
        assert all(x.dtype == dtype and x.isfinite().all() for x in (out.logprobs, out.values, *scored))
    assert places == {(n, True) for n in range(1, NEW + 1)} | {(NEW, False)}  # first, middle, last, never


@pytest.mark.parametrize("growth, sizes", [(1, [7, 8, 9, 10]), (2, [8, 10]), (4, [10]), (32, [11])])
def test_the_cache_grows_as_the_responses_do_and_no_sample_changes(growth, sizes, monkeypatch):
    """Prompts of up to 6 tokens, 5 new ones; the last of them is sampled and never read."""
    whole, grow, seen = sample(gpt(), eos=-1), rollout.KVCache.grow, []
    monkeypatch.setattr(rollout, "GROWTH", growth)
    monkeypatch.setattr(rollout.KVCache, "grow", lambda cache, max_len: seen.append(max_len) or grow(cache, max_len))
    parts = sample(gpt(), eos=-1)
    assert seen == sizes and torch.equal(whole.tokens, parts.tokens)
    assert gap(whole.logprobs, parts.logprobs) < 1e-12


def test_a_rollout_after_a_step_holds_nothing_of_the_old_weights():
    model = gpt()
    before = sample(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    score_response(model, before.tokens, LENS, NEW)[0].sum().backward()
    optimizer.step()
    after = sample(model)
    logprobs = score_response(model, after.tokens, LENS, after.mask.size(1))[0]
    assert gap(after.logprobs, logprobs * after.mask) <= 1e-12 and not same_rollout(before, after)


def test_gradients_equal_those_of_unpadded_passes():
    model, tokens, mask = gpt(), ids(8, 9), torch.arange(3) < torch.tensor([3, 1, 2, 3, 3, 1, 2, 3])[:, None]

    def gradients(out):  # of something that weighs the three outputs unequally
        weights = torch.tensor([[1], [0.3], [0.7]])
        return torch.autograd.grad((weights * out).sum(), list(model.parameters()))

    scored = gradients(torch.stack([x[mask] for x in score_response(model, tokens, LENS, 3)]))
    expected = gradients(torch.cat([unpadded(model, *args, 1) for args in zip(tokens, LENS, mask.sum(1))], 1))
    assert all(gap(a, b) <= 1e-12 for a, b in zip(scored, expected))


def test_counting_model_shows_the_alignment_of_tokens_logprobs_and_values():
    """An off-by-one scores a token under another token's distribution: -1000 instead of exactly 0."""
    prompts = torch.tensor([[EOS, 6, 0], [3, 5, 5], [EOS, 1, 2]])  # an EOS in a prompt ends nothing
    model, lens = counting(), torch.tensor([2, 1, 3])
    out = sample(model, prompts, lens)
    assert out.tokens.tolist() == [[7, 6, 7, 7, 7, 7, 7, 7], [3, 4, 5, 6, 7, 7, 7, 7],
                                   [7, 1, 2, 3, 4, 5, 6, 7]]
    assert out.response_lens.tolist() == [1, 4, 5]
    assert out.values.tolist() == [[6, 0, 0, 0, 0], [3, 4, 5, 6, 0], [2, 3, 4, 5, 6]]
    logprobs, values, entropy = score_response(model, out.tokens, lens, 5)
    assert not out.logprobs.any() and not logprobs[out.mask].any() and not entropy.any()
    assert torch.equal(values * out.mask, out.values)


def test_row_does_not_depend_on_its_batch_mates():
    """Each row and step has its own uniform number, so a row meets the same ones beside other mates."""
    model, b = gpt(), 2
    alone = sample(model)
    for seed, lens in enumerate(([6, 1, 3, 6, 2, 4, 5, 1], [1, 5, 3, 4, 2, 6, 1, 6], [3] * 8), 2):
        prompts = torch.where(torch.arange(8)[:, None] == b, PROMPTS, ids(8, 6, seed))
        other, n = sample(model, prompts, torch.tensor(lens)), alone.response_lens[b]
        assert torch.equal(other.tokens[b, :3 + n], alone.tokens[b, :3 + n])
        assert other.response_lens[b] == n
        assert gap(other.logprobs[b, :n], alone.logprobs[b, :n]) <= 1e-12
        assert gap(other.values[b, :n], alone.values[b, :n]) <= 1e-12


@pytest.mark.parametrize("junk", [EOS, 0, -1, 10 ** 9, -2 ** 62, "random"])
def test_what_stands_beyond_the_prompts_is_ignored(junk):
    beyond = torch.arange(6) >= LENS[:, None]
    prompts = torch.where(beyond, ids(8, 6, seed=9) if junk == "random" else junk, PROMPTS)
    given, given_lens = prompts.clone(), LENS.clone()
    assert same_rollout(sample(gpt(), prompts), sample(gpt()))
    assert torch.equal(prompts, given) and torch.equal(LENS, given_lens)  # nor are the inputs written to


def test_prompts_padded_beyond_the_longest_give_the_same_responses():
    wide, narrow = sample(gpt(), F.pad(PROMPTS, (0, 3), value=-1)), sample(gpt())
    assert torch.equal(wide.tokens, F.pad(narrow.tokens, (0, 3), value=EOS))  # T = P + R, P as given
    assert torch.equal(wide.logprobs, narrow.logprobs)


# -----------------------------------------------------------------------------
# the record

@pytest.mark.parametrize("eos", range(V))
def test_record(eos):
    out, (B, P) = sample(gpt(), eos=eos), PROMPTS.shape
    R, lens = int(out.response_lens.max()), out.response_lens
    assert out.tokens.shape == (B, P + R) and torch.equal(out.prompt_lens, LENS)
    assert all(x.shape == (B, R) and not x.requires_grad for x in (out.logprobs, out.values))
    assert torch.equal(out.mask, torch.arange(R) < lens[:, None])
    for b, (p, n) in enumerate(zip(LENS.tolist(), lens.tolist())):
        prompt, response, rest = out.tokens[b].split([p, n, P + R - p - n])
        assert torch.equal(prompt, PROMPTS[b, :p]) and (rest == eos).all()
        assert eos not in response[:-1] and (response[-1] == eos or n == NEW)  # a cut row is given no EOS
    assert not out.logprobs[~out.mask].any() and not out.values[~out.mask].any()
    assert (out.logprobs[out.mask] < 0).all() and (out.values[out.mask] != 0).all()


def test_each_of_several_eos_ends_a_response():
    B, endless = len(PROMPTS), [response for _, response in sample(gpt(), eos=-1).ids()]
    several = next([a, b] for a in range(V) for b in range(V) if any({a, b}.isdisjoint(row) for row in endless)
                   and any(a in row and b not in row for row in endless)
                   and any(b in row and a not in row for row in endless))
    out = sample(gpt(), eos=several)
    ended = out.has_eos(several)
    for b, ((_, response), n) in enumerate(zip(out.ids(), out.response_lens.tolist())):
        assert not set(response[:-1]) & set(several) and ended[b] == (response[-1] in several) == (n < NEW or ended[b])
        assert (out.tokens[b, LENS[b] + n:] == several[0]).all()  # the first of them is the padding
    assert len({int(out.tokens[b, out.lens[b] - 1]) for b in range(B) if ended[b]}) > 1 and not ended.all()
    tokens, lens = out.as_ended(several)
    assert all(tokens[b, lens[b] - 1] in several for b in range(B)) and (lens - out.lens == ~ended).all()


def test_a_response_has_eos_if_its_own_last_token_is_eos():
    """Not if padding after it is, or an EOS in its prompt, and not only if it is shorter than the others."""
    prompts = torch.tensor([[5, 0, 0], [4, 0, 0], [1, 0, 0], [EOS, 1, 0]])
    out = sample(counting(), prompts, torch.tensor([1, 1, 1, 3]), 3)
    assert out.response_lens.tolist() == [2, 3, 3, 3]
    assert out.has_eos(EOS).tolist() == [True, True, False, False]


@pytest.mark.parametrize("starts, lens", [([6, 6], [1, 1]), ([6, 4], [1, 3]),
                                          ([2, 6], [5, 1]), ([8, 6], [5, 1])])
def test_sampling_stops_when_the_longest_row_is_done(starts, lens):
    """EOS as everybody's first token, EOS later, EOS as the last token allowed, never EOS."""
    model = counting()
    out = sample(model, torch.tensor(starts)[:, None], torch.tensor([1, 1]))
    assert out.response_lens.tolist() == lens and out.mask.sum() == sum(lens)
    assert model.calls == out.mask.size(1) == max(lens)


# -----------------------------------------------------------------------------
# sampling

def chain(p, B, dtype=torch.float32):
    """Every token is drawn from p; B prompts of one token."""
    model = Markov(torch.tensor(p, dtype=dtype).log().expand(len(p), -1))
    return model, torch.zeros(B, 1, dtype=torch.long), torch.ones(B, dtype=torch.long)


@pytest.mark.parametrize("T", [0.5, 1.0])
def test_tokens_come_as_often_as_the_softmax_says(T):
    """Chi-square with 10 degrees of freedom over 200,000 draws; 35.6 is exceeded once in 10,000 seeds."""
    p = torch.softmax(torch.randn(V, generator=rng(3), dtype=torch.float64), 0)
    out = sample(*chain(p.tolist(), 50_000), new=4, eos=-1, temperature=T)
    expected = 200_000 * p ** (1 / T) / (p ** (1 / T)).sum()
    for part in (out.tokens[:, 1:], out.tokens[:25_000, 1:], out.tokens[25_000:, 1:], out.tokens[:, 1]):
        observed, share = torch.bincount(part.flatten(), minlength=V), part.numel() / 200_000
        assert ((observed - expected * share) ** 2 / (expected * share)).sum() < 35.6
    # The second token owes nothing to the first: 120 degrees of freedom, 182 once in 10,000
    pairs = torch.bincount(out.tokens[:, 1] * V + out.tokens[:, 2], minlength=V * V).view(V, V)
    independent = expected[:, None] * expected / 200_000 / 4
    assert ((pairs - independent) ** 2 / independent).sum() < 182


@pytest.mark.parametrize("p, never", [((.33, .34, 0, .33), 2), ((0, .5, .5), 0), ((.5, .5, 0), 2)])
def test_token_of_probability_0_is_never_sampled(p, never):
    out = sample(*chain(p, 250_000), new=4, eos=-1)
    counts = torch.bincount(out.tokens[:, 1:].flatten(), minlength=len(p))
    assert counts[never] == 0 and counts.sum() == 1_000_000 and (counts > 0).sum() == len(p) - 1


def test_no_uniform_number_meets_a_token_of_probability_0(monkeypatch):
    """The ends of [0, 1) come up once in 16 million draws, too rarely to wait for. The cumulative sum ends
    above or below 1 by a rounding or two, and both the first and the last token have probability 0."""
    for seed in range(20):
        logits = torch.randn(50, generator=rng(seed))
        logits[[0, -1]] = -INF
        for u, expected in ((0.0, 1), (1 - 2 ** -24, 48)):  # the smallest and the largest float32 below 1
            monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, u, dtype=dtype))
            out = sample(Markov(logits.expand(50, -1)), torch.zeros(1, 1).long(), torch.tensor([1]), 1)
            assert out.tokens[0, 1] == expected


def test_the_generator_decides_and_the_global_one_is_left_alone():
    model = gpt()
    state = torch.get_rng_state()
    assert same_rollout(sample(model, seed=5), sample(model, seed=5))
    assert not same_rollout(sample(model, seed=5), sample(model, seed=6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)  # without one, the global generator is used
    assert same_rollout(generate(model, PROMPTS, LENS, NEW, eos=EOS), sample(model, seed=5))


def test_sample_tokens_streams_what_generate_records():
    out = sample(gpt(), eos=-1)
    steps = list(sample_tokens(gpt(), PROMPTS, LENS, NEW, generator=rng()))
    tokens, logprobs, values = (torch.stack(x, 1) for x in zip(*steps))
    assert torch.equal(tokens, out.tokens.gather(1, LENS[:, None] + torch.arange(NEW)))
    assert torch.equal(logprobs, out.logprobs) and torch.equal(values, out.values)
    assert not logprobs.requires_grad


# -----------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_not_finite_are_refused(bad):
    model = gpt()
    with torch.no_grad():
        model.trunk.ln_f.weight[0] = bad
    with pytest.raises(FloatingPointError, match="not finite at step 0 "):
        sample(model)


def test_nan_names_its_step_and_counts_only_in_unfinished_rows():
    model, lens = counting(), torch.tensor([1, 1])
    model.table.data[5] = NAN
    with pytest.raises(FloatingPointError, match="not finite at step 2 "):
        sample(model, torch.tensor([[0], [3]]), lens)
    out = sample(model, torch.tensor([[4], [6]]), lens, eos=5)  # row 0 is done at 5, before NaN
    assert out.response_lens.tolist() == [1, 5] and out.logprobs.isfinite().all()


class Untouched(Markov):
    def forward(self, *_, **__):
        raise AssertionError("the model was called")


@pytest.mark.parametrize("words, changes", [
    ("temperature=0 ", dict(temperature=0)), ("temperature=-1 ", dict(temperature=-1)),
    ("temperature=nan ", dict(temperature=NAN)),
    ("max_new_tokens=0 ", dict(new=0)), ("max_new_tokens=-1 ", dict(new=-1)),
    ("prompt_lens from 0 to 6", dict(lens=LENS - (LENS == 1).long())),
    ("prompt_lens from 1 to 7", dict(lens=LENS + (LENS == 6).long())),
    ("prompt of 6 tokens + max_new_tokens=6 exceeds block_size=11", dict(new=6)),
], ids=str)
def test_bad_arguments_are_refused_before_any_compute(words, changes):
    with pytest.raises(ValueError, match=re.escape(words)):
        sample(Untouched(torch.zeros(V, V)), **changes)


# -----------------------------------------------------------------------------
# score_response and score_values

def test_response_wider_than_the_tokens_is_clamped():
    model, tokens = gpt(), ids(8, 9)
    narrow, wide = (score_response(model, tokens, LENS, R) for R in (3, 40))
    for a, b in zip(narrow, wide):
        assert b.shape == (8, 40) and b.isfinite().all() and gap(a, b[:, :3]) <= 1e-12


def test_only_response_positions_reach_the_policy_head():
    model, shapes = gpt(), []
    head = model.policy_head
    model.policy_head = lambda hidden: shapes.append(tuple(hidden.shape)) or head(hidden)
    score_response(model, ids(8, 9), LENS, 3)
    assert shapes == [(8, 3, 16)]


def test_gradient_reaches_the_eos_action():
    """d log p(token) / d logit = [this token] - p, here 1 - 1/V on a sampled token, EOS like any other."""
    model = Markov(torch.zeros(V, V, dtype=torch.float64))
    tokens = torch.tensor([[3, 5, EOS, EOS, EOS]])  # prompt [3], response [5, EOS], padding is EOS as well
    logprobs, _, _ = score_response(model, tokens, torch.tensor([1]), 3)
    logprobs[torch.tensor([[True, True, False]])].sum().backward()
    expected = torch.zeros(V, V, dtype=torch.float64)
    expected[[3, 5]] = -1 / V
    expected[3, 5] += 1
    expected[5, EOS] += 1
    assert gap(model.table.grad, expected) <= 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_softmax_of_half_types_is_taken_in_float32(dtype):
    # at a temperature that divides without rounding
    table = (3 * torch.randn(V, V, generator=rng())).to(dtype)
    out = sample(Markov(table), temperature=0.5)
    R = out.mask.size(1)
    logprobs, values, entropy = score_response(Markov(table), out.tokens, LENS, R, 0.5)
    assert logprobs.dtype == values.dtype == entropy.dtype == out.logprobs.dtype == torch.float32
    exact = score_response(Markov(table.double()), out.tokens, LENS, R, 0.5)
    assert gap(logprobs, exact[0]) <= 2e-6 and gap(entropy, exact[2]) <= 2e-6
    assert gap(out.logprobs, exact[0] * out.mask) <= 2e-6
    assert score_values(Markov(table), out.tokens, LENS, R).dtype == torch.float32


def test_under_autocast_only_the_logits_round():
    """Under autocast the log-softmax is computed in float32. bfloat16 rounds a number by up to 2^-8 of itself, so a
    logit of at most L by 2^-8 L, and a log-prob, which is one logit less the log-sum of all, by twice that. What was
    rounded before, in the hidden states, is allowed as much."""
    model, seen = gpt(torch.float32), []
    head = model.policy_head
    model.policy_head = lambda hidden: seen.append(head(hidden)) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        out = sample(model)
        logprobs = score_response(model, out.tokens, LENS, out.mask.size(1))[0]
    *sampled, scored = seen
    places = LENS[:, None] + torch.arange(out.mask.size(1))
    targets = out.tokens.gather(1, places.clamp(max=out.tokens.size(1) - 1))
    for logits, found in ((torch.stack(sampled, 1), out.logprobs), (scored, logprobs)):
        exact = torch.log_softmax(logits.double(), -1).gather(2, targets[:, :, None])[:, :, 0]
        assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
        assert gap(found[out.mask], exact[out.mask]) <= 2e-6
    bound = 4 * 2 ** -8 * scored.abs().max()
    exact = score_response(model, out.tokens, LENS, out.mask.size(1))[0] * out.mask
    assert 1e-4 < gap(out.logprobs, exact) < bound and gap(out.logprobs, logprobs * out.mask) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row, entropy", [([0, 0, 0, 0], math.log(4)), ([0, 0, -INF, -INF], math.log(2)),
                                          ([0, -INF, -INF, -INF], 0)])
def test_entropy_of_known_distributions_is_finite_with_finite_gradients(row, entropy, dtype):
    model = Markov(torch.tensor([row] * 4, dtype=dtype))
    out = score_response(model, torch.zeros(1, 3, dtype=torch.long), torch.tensor([1]), 2)[2]
    assert gap(out, torch.full((1, 2), entropy)) <= 1e-7
    (1000 * out).sum().backward()  # a large weight, because a finite stand-in for -inf must survive being scaled
    assert gap(model.table.grad, torch.zeros(4, 4)) <= 1e-3  # each is the most even spread it can be


@torch.no_grad()
def test_tokens_beyond_a_response_change_nothing_inside_the_mask():
    model = gpt(torch.float32)
    out = sample(model)
    R = out.mask.size(1)
    clean = score_response(model, out.tokens, LENS, R)
    beyond = torch.arange(out.tokens.size(1)) >= (LENS + out.response_lens)[:, None]
    for seed in range(3):
        poisoned = torch.where(beyond, ids(*out.tokens.shape, seed), out.tokens)
        for a, b in zip(clean, score_response(model, poisoned, LENS, R)):
            assert torch.equal(a[out.mask], b[out.mask])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_first_ratio_is_exactly_1_in_float32(dropout):
    model, tokens = gpt(torch.float32, dropout=dropout), ids(8, 9)
    with torch.no_grad():
        old = score_response(model, tokens, LENS, 3, 0.7)
    new = score_response(model, tokens, LENS, 3, 0.7)
    again = score_response(model, tokens, LENS, 3, 0.7)
    for a, b, c in zip(old, new, again):
        assert torch.equal(a, b) and torch.equal(b, c) and b.requires_grad and not a.requires_grad
    assert ((new[0] - old[0]).exp() == 1).all()


def test_temperature_divides_what_the_policy_head_reads():
    """C numbers a token instead of V. The value head reads the states as they are."""
    model, states, heads = gpt(), [], []
    forward, head = model.forward, model.policy_head
    model.forward = lambda *args, **kwargs: states.append(forward(*args, **kwargs)) or states[-1]
    model.policy_head = lambda hidden: heads.append(hidden) or head(hidden)
    sample(model, new=1), sample(model, new=1, temperature=2)
    assert torch.equal(heads[0], 2 * heads[1])
    for T in (1, 2):
        _, values, _ = score_response(model, PROMPTS, LENS, 3, T)
        places = (LENS[:, None] - 1 + torch.arange(3)).clamp(max=5)
        seen = states[-1].gather(1, places[:, :, None].expand(-1, -1, 16))
        assert torch.equal(heads[-1], seen / T) and torch.equal(values, model.value_head(seen))


def test_score_values_are_those_of_score_response():
    model, tokens = gpt(torch.float32), ids(8, 9)
    values = score_values(model, tokens, LENS, 3)
    assert torch.equal(values, score_response(model, tokens, LENS, 3)[1]) and values.requires_grad
    states = tokens.gather(1, LENS[:, None] + torch.arange(-1, 2))
    assert torch.equal(score_values(counting(), tokens, LENS, 3), states.double())


# -----------------------------------------------------------------------------
# the policy head in chunks of positions

def scored_and_gradients(model, chunk, *, T=0.7, entropy=True, dtype=None):
    """logprobs, (entropy,) and the gradient of each parameter, of a sum that weighs every number differently."""
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logprobs, values, H = score_response(model, ids(8, 9), LENS, 3, T, entropy, chunk)
    scored = [logprobs, H] if entropy else [logprobs]
    assert (H is None) == (not entropy)
    total = sum((x * torch.randn(8, 3, generator=rng(seed))).sum() for seed, x in enumerate([values, *scored]))
    total.backward()
    return [x.detach() for x in scored] + [p.grad for p in model.parameters()]


@pytest.mark.parametrize("chunk", [1, 7, 24, 999])
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "no entropy"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_in_chunks_has_the_numbers_and_gradients_of_the_whole(chunk, entropy, tied):
    """To some roundings of float64, relative to the largest number of each tensor."""
    model = gpt(tied=tied)
    whole = scored_and_gradients(model, None, entropy=entropy)
    for a, b in zip(whole, scored_and_gradients(model, chunk, entropy=entropy), strict=True):
        assert gap(a, b) <= 4e-15 * a.abs().max()


def test_the_gradients_of_a_head_in_chunks_are_those_of_its_outputs():
    hidden, weight = (torch.randn(n, 4, generator=rng(n), dtype=torch.float64, requires_grad=True) for n in (5, 6))
    assert torch.autograd.gradcheck(
        lambda *inputs: rollout.ChunkedHead.apply(*inputs, torch.tensor([0, 5, 2, 2, 1]), 2, True), (hidden, weight))


def test_a_head_in_chunks_is_not_differentiated_twice():
    """Silently, the second derivative would lack what goes through the probabilities."""
    hidden = torch.randn(8, 3, 16, dtype=torch.float64, requires_grad=True)
    logprobs, _ = rollout.chunked_head(gpt(), hidden, ids(8, 3), 5, False)
    with pytest.raises(RuntimeError, match="in chunks has no second derivative"):
        torch.autograd.grad(logprobs.sum(), [hidden], create_graph=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_head_in_chunks_rounds_as_the_whole_does(dtype):
    """Against float64, it is no farther off than twice the whole head in the same precision; the logits are equal."""
    model, exact = gpt(torch.float32), scored_and_gradients(gpt(torch.float32).double(), None)
    whole, parts = (scored_and_gradients(model, chunk, dtype=dtype) for chunk in (None, 5))
    for a, b, c in zip(exact, whole, parts, strict=True):
        assert b.dtype == c.dtype == torch.float32
        assert (c - a).norm() <= 2 * (b - a).norm() + 1e-6 * a.norm()
    assert gap(whole[0], parts[0]) <= 2e-6 and gap(whole[1], parts[1]) <= 2e-6


def test_with_a_head_in_chunks_the_first_ratio_is_exactly_1():
    model, tokens = gpt(torch.float32), ids(8, 9)
    with torch.no_grad():
        old = score_response(model, tokens, LENS, 3, 0.7, chunk=5)
    new = score_response(model, tokens, LENS, 3, 0.7, entropy=False, chunk=5)
    assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1]) and new[0].requires_grad


def test_a_head_in_chunks_never_holds_the_logits_of_all_positions(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.append(tuple(x.shape)) or linear(x, w, b))
    model = gpt()
    logprobs = rollout.chunked_head(model, torch.randn(8, 3, 16, dtype=torch.float64, requires_grad=True),
                                    ids(8, 3), 10, False)[0]
    logprobs.sum().backward()
    assert shapes == 2 * [(10, 16), (10, 16), (4, 16)]


@pytest.mark.parametrize("kind", [{}, LLAMA.kind | dict(n_kv_head=1, mlp_dim=24)], ids=["gpt2", "llama"])
def test_a_prompt_that_stands_there_twice_is_read_once(kind, monkeypatch):
    model, read = gpt(**kind), []
    rows = PROMPTS[:4].repeat_interleave(2, 0), LENS[:4].repeat_interleave(2)
    monkeypatch.setattr(model, "forward", lambda idx, **more: read.append(len(idx)) or GPT.forward(model, idx, **more))
    once, apart = (generate(model, *rows, NEW, eos=EOS, generator=rng(), copies=copies) for copies in (2, 1))
    assert torch.equal(once.tokens, apart.tokens) and gap(once.logprobs, apart.logprobs) < 1e-12
    assert read[0] == 4 and {*read[1:]} == {8}
