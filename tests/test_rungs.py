"""Tests of experiments/rungs.py: the advantages and the loss of each rung, and the penalty that kl_penalty steers."""

import math
from functools import partial

import pytest
import torch

from experiments.rungs import OBJECTIVES, PenaltyController, surrogate_loss, token_advantages
from ppo import cpi_loss, kl_penalty_loss, policy_loss, reinforce_loss, reward_to_go, zero_outside
from tensors import randn


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def same(actual, expected, tol=1e-13):
    expected = expected if isinstance(expected, torch.Tensor) else t(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


REWARDS, VALUES = t([[1, 2, 4], [1, 2, 99]]), t([[1, 1, 1], [2, 4, 99]])
RAGGED = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


@pytest.mark.parametrize("objective, expected", [
    ("reinforce", [[3, 3, 3], [2, 2, 0]]),  # gamma 0.5: 1 + 2 / 2 + 4 / 4, on each token
    ("reward_to_go", [[3, 4, 4], [2, 2, 0]]),
    ("baseline", [[2, 3, 3], [0, -2, 0]]),
    ("gae", [[1.0625, 2.25, 3], [0.5, -2, 0]]), ("cpi", [[1.0625, 2.25, 3], [0.5, -2, 0]]),
    ("kl_penalty", [[1.0625, 2.25, 3], [0.5, -2, 0]]), ("clip", [[1.0625, 2.25, 3], [0.5, -2, 0]])])
def test_each_rung_weighs_tokens_as_the_derivation_says(objective, expected):
    advantages, returns = token_advantages(objective, REWARDS, VALUES, RAGGED, gamma=0.5, lam=0.5)
    same(advantages, expected, tol=0)
    to_go = reward_to_go(REWARDS, RAGGED, 0.5)
    same(returns, to_go if objective in OBJECTIVES[:3] else advantages + zero_outside(VALUES, RAGGED), tol=0)
    assert not advantages.requires_grad and not returns.requires_grad


@pytest.mark.parametrize("objective", ["baseline", "cpi", "kl_penalty", "clip"])
def test_a_group_takes_the_critics_place(objective):
    advantages, returns = token_advantages(objective, REWARDS, VALUES, RAGGED, 0.5, None, group_size=2)
    same(advantages, [[1, 1, 1], [-1, -1, 0]], tol=0)  # returns of 3 and 2, each the other's baseline
    same(returns, reward_to_go(REWARDS, RAGGED, 0.5), tol=0)


@pytest.mark.parametrize("objective, loss", {
    **dict.fromkeys(OBJECTIVES[:4], lambda new, old, adv, mask: reinforce_loss(new, adv, mask)),
    "cpi": cpi_loss, "kl_penalty": partial(kl_penalty_loss, coef=0.7), "clip": partial(policy_loss, clip=0.1)}.items())
def test_each_rung_has_its_loss_and_all_measure_the_ratio(objective, loss):
    inputs = [0.5 * randn(4, 5, seed=seed) for seed in range(3)]
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    value, stats = surrogate_loss(objective, *inputs, mask, clip=0.1, penalty=0.7)
    same(value, loss(*inputs, mask)[0], tol=0)
    assert {"approx_kl", "ratio_max", "ratio_mean"} <= stats.keys() and stats["ratio_max"] > 1


@pytest.mark.parametrize("kl, coef", [(0.0301, 2), (0.0299, 1), (0.0134, 1), (0.0133, 0.5), (0.0, 0.5)])
def test_when_the_penalty_doubles_and_halves(kl, coef):
    """It doubles above one and a half times its target and halves below two thirds of it."""
    penalty = PenaltyController(target=0.02)
    penalty.update(kl)
    assert penalty.value == coef


@pytest.mark.parametrize("target, coef", [(0, 1), (-1, 1), (math.nan, 1), (0.1, 0), (0.1, -1), (0.1, math.nan)])
def test_the_penalty_refuses_settings_that_stop_or_invert_it(target, coef):
    with pytest.raises(ValueError, match="must be above 0"):
        PenaltyController(target, coef)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_that_is_not_a_number_reaches_no_rung(objective):
    rewards, values = (torch.where(RAGGED, x, math.nan) for x in (REWARDS, VALUES))
    for dirty, clean in zip(token_advantages(objective, rewards, values, RAGGED, 0.9, 0.8),
                            token_advantages(objective, REWARDS, VALUES, RAGGED, 0.9, 0.8)):
        same(dirty, clean, tol=0)
