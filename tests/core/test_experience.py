"""Tests of experience.py's Experience: sampling, the passes of an update, and what is recomputed in them."""

from types import SimpleNamespace

import pytest
import torch

from data import Prompt
from experience import Experience
from rollout import Rollout, score_response
from support import distributed
from support.device import setup
from tensors import make_gpt, random_ids
from tiny import Config
from tokenizer import get_tokenizer

ENCODING = get_tokenizer("bytes")
PROMPTS = [Prompt([65 + i] * (1 + i % 3), {"n": i}) for i in range(12)]


@pytest.fixture
def experience():
    config = SimpleNamespace(seed=0, temperature=0.7, compile=False, max_new_tokens=5, batch_size=12, minibatches=3)
    return Experience(config, ENCODING, *setup(Config(device="cpu")), micro_batch_size=2)


@pytest.fixture
def policy():
    return make_gpt(torch.float32, vocab_size=ENCODING.n_vocab).eval()


def test_the_same_purpose_samples_the_same_and_another_samples_anew(experience, policy):
    first, texts = experience.collect(policy, PROMPTS, experience.rng("rollout", 1))
    again, _ = experience.collect(policy, PROMPTS, experience.rng("rollout", 1))
    other, _ = experience.collect(policy, PROMPTS, experience.rng("rollout", 2))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert [prompt for prompt, *_ in texts] == [bytes(ids).decode() for ids in PROMPTS]
    assert [row for *_, row in texts] == [{"n": i} for i in range(12)]


def test_texts_are_decoded_once_and_only_if_somebody_reads_them(experience, policy, monkeypatch):
    decoded = []
    monkeypatch.setattr("experience.decode", lambda encoding, ids: decoded.append(ids) or f"text {len(decoded)}")
    rollout, texts = experience.collect(policy, PROMPTS, experience.rng("rollout", 1))
    assert decoded == []
    assert texts[1] == ("text 3", "text 4", {"n": 1}) and len(texts) == len(list(texts)) == 12 and len(texts[:5]) == 5
    assert decoded == [ids for row in rollout.ids() for ids in row]


def ragged():
    """A rollout of twelve rows with one to five response tokens."""
    prompt_lens = torch.tensor([len(ids) for ids in PROMPTS])
    response_lens = torch.tensor([1 + i % 5 for i in range(12)])
    mask = torch.arange(5) < response_lens[:, None]
    return Rollout(random_ids(256, 12, 8), prompt_lens, response_lens, mask, mask * 1.0, mask * 1.0)


@pytest.mark.parametrize("order", [None, torch.arange(12).flip(0)], ids=["as they come", "reversed"])
def test_passes_hold_each_row_once_and_their_fractions_add_up_to_1(order, experience):
    rollout = ragged()
    minibatches = experience.minibatch_passes(rollout, order)
    rows = [torch.cat([rows for rows, _, _ in minibatch]) for minibatch in minibatches]
    expected = (torch.arange(12) if order is None else order).split(4)
    assert [sorted(part.tolist()) for part in rows] == [sorted(part.tolist()) for part in expected]
    for minibatch in minibatches:
        tokens = sum(rollout.response_lens[rows].sum() for rows, _, _ in minibatch)
        for rows, T, token_fraction in minibatch:
            assert len(rows) == 2 and T == rollout.lens[rows].max()
            assert token_fraction == pytest.approx(float(rollout.response_lens[rows].sum() / tokens), rel=1e-6)


def test_recomputed_numbers_come_back_in_the_order_of_the_rollout(experience, policy):
    """At the temperature of the run; the entropy only where it is asked for."""
    rollout = ragged()
    passes = experience.minibatch_passes(rollout, torch.arange(12).flip(0))
    found = experience.recompute(policy, rollout, passes, entropy=True)
    expected = score_response(policy, rollout.tokens, rollout.prompt_lens, 5, temperature=0.7)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[rollout.mask], b[rollout.mask], rtol=0, atol=1e-5)
    assert len(experience.recompute(policy, rollout, passes)) == 2
    torch.testing.assert_close(experience.recompute_values(policy, rollout, passes), found[1], rtol=0, atol=1e-5)


def test_a_preview_has_the_score_and_the_kl_of_each_answer(experience, policy):
    reference = make_gpt(torch.float32, seed=1, vocab_size=ENCODING.n_vocab).eval()
    def scored(rollout, texts):
        return rollout.response_lens.float(), {"reward_half": rollout.response_lens / 2}
    rows = experience.preview(policy, reference, scored, PROMPTS[:3], "samples")
    assert [row["prompt"] for row in rows] == ["A", "BB", "CCC"] and len({row["kl"] for row in rows}) == 3
    assert all(row["score"] == row["tokens"] == 2 * row["reward_half"] for row in rows)
    rollout, _ = experience.collect(policy, PROMPTS[:3], experience.rng("samples"))
    assert [row["tokens"] for row in rows] == rollout.response_lens.tolist()
    assert [row["ended"] for row in rows] == rollout.has_eos(ENCODING.eot_token).tolist()
    same = experience.preview(policy, policy, scored, PROMPTS[:3], "samples")
    assert same == [row | {"kl": 0} for row in rows]


def test_a_preview_needs_no_more_memory_than_a_rollout(experience, policy, monkeypatch):
    """Many prompts are answered a batch at a time, each once, also where processes need more rows to get as many."""
    monkeypatch.setattr(distributed, "fill_up", lambda rows: rows + rows[:1])
    asked, collect = [], experience.collect
    monkeypatch.setattr(experience, "collect", lambda policy, prompts, rng: (
        asked.append(len(prompts)), collect(policy, prompts, rng))[1])
    scored = lambda rollout, texts: (rollout.response_lens.float(), {})  # noqa: E731
    rows = experience.preview(policy, policy, scored, PROMPTS * 2 + PROMPTS[:5], "samples")
    assert asked == [13, 13, 6]
    assert [row["prompt"] for row in rows] == [bytes(ids).decode() for ids in PROMPTS * 2 + PROMPTS[:5]]
