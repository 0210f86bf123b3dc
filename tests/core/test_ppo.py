"""
Tests of ppo.py: numbers worked out by hand, expectations summed over a whole vocabulary, and one table that
runs every function over padding filled with rubbish. float64 throughout, except where float32 is the point.
"""

import math
from functools import partial

import pytest
import torch

from ppo import (KLController, cpi_loss, explained_variance, gae, group_advantages, kl_estimate, kl_penalty_loss,
                 masked_mean, policy_loss, reinforce_loss, reward_to_go, shape_rewards, value_loss, whiten,
                 zero_outside)
from tensors import randn

NAN, INF = math.nan, math.inf


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def bits(values):
    return torch.tensor(values, dtype=torch.bool)


def lengths_to_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def same(actual, expected, tol=1e-13):
    """Absolute; 1e-13, for numbers of order 1 go through some dozens of float64 roundings of 1e-16 each."""
    expected = expected if isinstance(expected, torch.Tensor) else t(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


# ----------------------------------------------------------------------------------------------------------
# masked statistics

def test_keep_drops_what_multiplication_by_zero_cannot():
    assert zero_outside(t([1.0, NAN, INF, -INF]), bits([1, 0, 0, 0])).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("x, mask, mean", [
    ([1, NAN], [1, 0], 1.0), ([[1, 2, 3], [5, 6, 99]], [[1, 1, 1], [1, 1, 0]], 3.4)])
def test_masked_mean_counts_tokens_not_rows_nor_slots(x, mask, mean):
    same(masked_mean(t(x), bits(mask)), mean)


def test_whiten_has_mean_0_and_biased_variance_1():
    x, mask = t([[1, 2, 3], [5, 6, 99]]), bits([[1, 1, 1], [1, 1, 0]])
    white = whiten(x, mask)
    same(white, zero_outside((x - 3.4) / math.sqrt(3.44 + 1e-8), mask))  # 3.44 = 17.2 / 5; the unbiased one is 4.3
    same(white[0, 0], -1.2940, tol=5e-5)  # as many digits as the number has
    same(masked_mean(white, mask), 0.0)
    same(whiten(x, mask, shift_mean=False), zero_outside(white + 3.4, mask))
    same(whiten(t([-1e-4, 1e-4]), bits([1, 1])), [-(0.5 ** 0.5), 0.5 ** 0.5])  # 1e-8 goes under the root


@pytest.mark.parametrize("x, mask", [([[7, NAN]], [[1, 0]]), ([[7, 7], [7, 0]], [[1, 1], [1, 0]])])
def test_whiten_of_one_token_or_of_equal_tokens_is_0_and_not_nan(x, mask):
    mask = bits(mask)
    same(whiten(t(x), mask), torch.zeros_like(t(x)))
    same(whiten(t(x), mask, shift_mean=False), zero_outside(torch.full_like(t(x), 7), mask))


@pytest.mark.parametrize("values, expected", [
    ([0, 2, 4], 1.0), ([10, 12, 14], 1.0), ([5, 5, 5], 0.0), ([0, -2, -4], -3.0), ([0, 2, 2], 2 / 3)],
    ids=["perfect", "a constant error does not count", "constant", "opposite", "by hand"])
def test_explained_variance(values, expected):
    same(explained_variance(t([[*values, 50]]), t([[0, 2, 4, -50]]), bits([[1, 1, 1, 0]])), expected)


# ----------------------------------------------------------------------------------------------------------
# KL estimates, exactly: an expectation is a sum over the vocabulary, here of four tokens

THETA, OLD, REF = (t(p).log() for p in ([0.6, 0.2, 0.15, 0.05], [0.4, 0.1, 0.1, 0.4], [0.1, 0.15, 0.25, 0.5]))
Q = t([1, -2, 0.5, 3])  # what each token is worth
ONE = bits([[1]])


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def expectation(log_p, f):
    """E[f(token)] for token ~ p. No gradient flows through p, as none flows through a sample."""
    return sum(p * f(token) for token, p in enumerate(log_p.exp().detach()))


def batch(x, token):
    return x[token].view(1, 1)


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x.log_softmax(-1)), x)[0]


@pytest.mark.parametrize("kind, k_ln2, k_minus_ln2", [
    ("k1", math.log(2), -math.log(2)), ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
    ("k3", 0.5 - 1 + math.log(2), 2 - 1 - math.log(2))])
def test_kl_estimate_by_hand_where_one_policy_gives_twice_the_probability(kind, k_ln2, k_minus_ln2):
    same(kl_estimate(t([0.5, 0.25]).log(), t([0.25, 0.5]).log(), kind), [k_ln2, k_minus_ln2])


def test_k1_and_k3_are_unbiased_estimates_of_the_kl():
    """k2 and an estimate with its ratio turned round are not."""
    def mean(*args):
        return expectation(THETA, lambda token: kl_estimate(*args)[token])

    exact = kl(THETA, REF)
    for kind in ("k1", "k3"):
        same(mean(THETA, REF, kind), exact)
    for args in [(THETA, REF, "k2"), (REF, THETA, "k1"), (REF, THETA, "k3")]:
        assert abs(mean(*args) - exact) > 0.1
    assert (kl_estimate(THETA, REF, "k3") > 0).all()
    assert torch.equal(kl_estimate(THETA, REF), kl_estimate(THETA, REF, "k1"))  # the default


@pytest.mark.parametrize("kind, exact", [
    ("k1", lambda log_p: 0 * log_p.sum()), ("k2", lambda log_p: kl(log_p, REF)),
    ("k3", lambda log_p: kl(REF, log_p))])
def test_expected_gradient_of_each_estimate_as_a_loss(kind, exact):
    """Zero for k1, that of KL(policy || reference) for k2, that of the reverse KL for k3."""
    actual = gradient(lambda log_p: expectation(log_p, lambda a: kl_estimate(log_p, REF, kind)[a]), THETA)
    same(actual, gradient(exact, THETA))


def test_k3_keeps_its_digits_near_zero_in_float32():
    """It is k^2 / 2 there. Written as exp(-k) - 1 + k it would be 1.66e-8 instead of 5.0e-9 at 1e-4."""
    k3 = kl_estimate(torch.tensor([1e-4, -1e-4, 1e-6, -1e-6]), torch.zeros(4), "k3")
    same(k3[:2], torch.full((2,), 5.0e-9), tol=1e-11)  # float32 numbers near 1e-4 are 7e-12 apart
    assert (k3[2:] >= 0).all() and (k3[2:] < 1e-12).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("k", [-200.0, -60.0, 60.0, 200.0])
def test_kl_estimate_and_its_gradient_stay_finite_in_float32(kind, k):
    logprobs = torch.tensor([k], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.zeros(1), kind)
    estimate.sum().backward()
    assert estimate.isfinite().all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["k4", "K1", "", None])
def test_kl_estimate_refuses_an_unknown_kind_and_names_the_known_ones(kind):
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(t([0.0]), t([0.0]), kind)


# ----------------------------------------------------------------------------------------------------------
# reward shaping

@pytest.mark.parametrize("width", [3, 5, 50])
def test_reward_charges_the_kl_and_the_score_lands_on_eos(width):
    """The padding's width makes no difference."""
    def pad(row):
        return t([row + [99.0] * (width - len(row))])

    mask = lengths_to_mask([3], width)
    rewards = shape_rewards(t([3]), pad([-1, 0, -2]), pad([-1.5, 0, -1]), mask, kl_coef=0.1)
    same(rewards, [[-0.05, 0, 3.1] + [0.0] * (width - 3)])  # 3.1, not 2.9: the reference likes EOS better


def test_without_kl_the_reward_is_the_score_on_the_last_token():
    mask = lengths_to_mask([1, 3, 2, 0], 3)  # a response of no tokens has no place for a score
    scores = t([2, -3, 5, NAN]).requires_grad_()
    rewards = shape_rewards(scores, randn(4, 3, seed=0), randn(4, 3, seed=1), mask, kl_coef=0)
    assert rewards.tolist() == [[2, 0, 0], [0, 0, -3], [0, 5, 0], [0, 0, 0]]
    assert not rewards.requires_grad  # the reward model is not trained through the policy's reward


def test_kl_in_the_reward_is_k1_unclipped():
    k = t([[-30, 200, -200, 0]])
    same(shape_rewards(t([0]), k, torch.zeros_like(k), bits([[1, 1, 1, 1]]), kl_coef=0.5), -0.5 * k, tol=0)


@pytest.mark.parametrize("measured, expected", [
    (60, 0.201024), (7.2, 0.201024), (6.6, 0.200512), (6, 0.2), (5.4, 0.199488), (0, 0.198976)])
def test_kl_controller_moves_by_the_clipped_relative_error(measured, expected):
    """Once per horizon of episodes."""
    for controller in KLController(0.2, target=6), KLController(0.2, target=6, horizon=10_000):
        controller.update(measured, 256)
        assert controller.value == pytest.approx(expected, rel=1e-12)
        controller.update(measured, 256)
        assert controller.value == pytest.approx(expected ** 2 / 0.2, rel=1e-12)  # by the same factor again


def test_kl_controller_without_a_target_never_moves():
    controller = KLController(0.2)
    controller.update(1e6, 10_000)
    assert controller.value == 0.2


@pytest.mark.parametrize("kl_coef, kwargs, word", [
    (-0.1, {}, "kl_coef"), (0.1, {"target": 0}, "target"), (0.1, {"target": -1}, "target"),
    (0.1, {"target": NAN}, "target"), (0.1, {"target": 6, "horizon": 0}, "horizon"),
    (0.1, {"horizon": -1}, "horizon")])
def test_kl_controller_refuses_settings_that_invert_or_break_the_rule(kl_coef, kwargs, word):
    with pytest.raises(ValueError, match=word):
        KLController(kl_coef, **kwargs)


# ----------------------------------------------------------------------------------------------------------
# returns and advantages. The numbers by hand are sums of halves and quarters, hence tol=0

@pytest.mark.parametrize("gamma, expected", [(0.5, [[3, 4, 4], [2, 2, 0]]), (1, [[7, 6, 4], [3, 2, 0]])])
def test_reward_to_go_by_hand(gamma, expected):
    same(reward_to_go(t([[1, 2, 4], [1, 2, 99]]), bits([[1, 1, 1], [1, 1, 0]]), gamma), expected, tol=0)


def test_gae_by_hand():
    advantages, returns = gae(t([[0, 0, 1]]), t([[1, 2, 3]]), bits([[1, 1, 1]]), gamma=1, lam=0.5)
    same(advantages, [[1, 0, -2]], tol=0)
    same(returns, [[2, 2, 1]], tol=0)


@pytest.mark.parametrize("pad", [99, -1e30, NAN, INF])
def test_gae_does_not_bootstrap_from_the_value_after_eos(pad):
    advantages, _ = gae(t([[0, 1, 0]]), t([[1, 2, pad]]), bits([[1, 1, 0]]), gamma=1, lam=0.5)
    same(advantages, [[0.5, -1, 0]], tol=0)


@pytest.mark.parametrize("lam, expected", [(0.95, [0.9025, 0.95, 1, 0, 0]), (0, [0, 0, 1, 0, 0])])
def test_eos_itself_is_credited_with_the_whole_score(lam, expected):
    """A score one slot too late would reach EOS through lambda only: as 0.95, or with lambda 0 not at all."""
    zeros, mask = torch.zeros(1, 5, dtype=torch.float64), lengths_to_mask([3], 5)
    rewards = shape_rewards(t([1]), zeros, zeros, mask, kl_coef=0.1)
    same(gae(rewards, zeros, mask, gamma=1, lam=lam)[0], [expected], tol=1e-15)


def slow_gae(rewards, values, gamma, lam):
    """The definition, one response, no padding: A_t = sum over s >= t of (gamma lam)^(s-t) delta_s."""
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    steps = range(len(deltas))
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in steps[t:]) for t in steps]


@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 0.5), (0.9, 1), (0.5, 0), (0, 0.9)])
def test_gae_equals_its_double_sum_on_ragged_responses(gamma, lam):
    lengths, width = [7, 1, 4, 9, 0, 6], 9
    rewards, values, mask = randn(6, width, seed=0), randn(6, width, seed=1), lengths_to_mask(lengths, width)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        expected = slow_gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        same(advantages[row], expected + [0.0] * (width - n))
    assert torch.equal(returns, advantages + zero_outside(values, mask))  # to the bit
    if lam == 1:
        same(advantages, zero_outside(reward_to_go(rewards, mask, gamma) - values, mask))
    if lam == 0:
        next_values = torch.nn.functional.pad(zero_outside(values, mask)[:, 1:], (0, 1))
        same(advantages, zero_outside(rewards + gamma * next_values - values, mask))


def test_group_advantages_leave_the_own_score_out_of_its_baseline():
    mask = lengths_to_mask([2, 1, 3, 0, 1, 2], 3)
    per_response = t([1 - 4, 2 - 3.5, 6 - 1.5, 0 - 4.5, 4 - 2.5, 5 - 2])
    advantages = group_advantages(t([1, 2, 6, 0, 4, 5]), 3, mask)
    same(advantages, zero_outside(per_response.unsqueeze(1).expand(6, 3), mask), tol=0)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_group_advantages_sum_to_zero_in_each_group(group_size):
    advantages = group_advantages(randn(6, seed=0), group_size, bits([[1]] * 6))
    same(advantages.view(-1, group_size).sum(1), [0.0] * (6 // group_size))


@pytest.mark.parametrize("group_size", [-2, 0, 1, 4, 12])
def test_group_advantages_refuse_groups_of_one_and_broken_groups(group_size):
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(randn(6, seed=0), group_size, bits([[1]] * 6))


# ----------------------------------------------------------------------------------------------------------
# policy losses

CLIP = 0.2
RATIO_LOSSES = {"cpi": cpi_loss, "clip": partial(policy_loss, clip=CLIP),
                "kl_penalty": partial(kl_penalty_loss, coef=0.7)}
EVERY_RATIO_LOSS = pytest.mark.parametrize("name", RATIO_LOSSES)


def test_reinforce_loss_by_hand():
    loss, _ = reinforce_loss(t([[-1, -2], [-3, -4]]), t([[2, 1], [-1, 99]]), bits([[1, 1], [1, 0]]))
    same(loss, (2 + 2 - 3) / 3)


# never at a ratio of exactly 1 +- clip, where no derivative exists
@pytest.mark.parametrize("advantage, clipped_to", [(1.7, {1.21: 1.2, 3: 1.2}), (-1.7, {0.5: 0.8, 0.79: 0.8})])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1, 1.19, 1.21, 3])
def test_clip_removes_the_gradient_only_past_the_clip(ratio, advantage, clipped_to):
    """And only on the side to which the advantage points."""
    logprobs = t([[ratio]]).log().requires_grad_()
    loss, stats = policy_loss(logprobs, t([[0]]), t([[advantage]]), ONE, CLIP)
    loss.backward()
    removed = ratio in clipped_to
    same(-loss, clipped_to.get(ratio, ratio) * advantage)
    same(logprobs.grad, [[0.0 if removed else -ratio * advantage]], tol=0 if removed else 1e-14)
    assert stats["clip_frac"] == removed
    assert -loss <= -cpi_loss(logprobs, t([[0]]), t([[advantage]]), ONE)[0]  # a lower bound, token by token


def test_clip_frac_is_the_share_of_tokens_whose_gradient_was_removed():
    mask = lengths_to_mask([50, 37, 1, 42], 50)
    logprobs = (0.3 * randn(4, 50, seed=0)).requires_grad_()
    loss, stats = policy_loss(logprobs, 0.3 * randn(4, 50, seed=1), randn(4, 50, seed=2), mask, CLIP)
    loss.backward()
    assert 0.1 < stats["clip_frac"] < 0.9
    same(stats["clip_frac"], ((logprobs.grad == 0) & mask).sum().double() / mask.sum())


@EVERY_RATIO_LOSS
def test_before_the_first_step_the_loss_is_minus_the_mean_advantage(name):
    """Nothing is clipped there."""
    logprobs, mask = randn(2, 3, seed=0), lengths_to_mask([1, 3], 3)
    loss, stats = RATIO_LOSSES[name](logprobs, logprobs, t([[1, 99, 99], [-1, -1, -1]]), mask)
    assert loss == 0.5  # over four tokens; the mean of the two responses' means would be 0
    assert stats["approx_kl"] == 0 and stats["ratio_max"] == 1 and stats["ratio_mean"] == 1
    assert stats.get("clip_frac", 0) == 0


@pytest.mark.parametrize("name", ["reinforce", *RATIO_LOSSES])
def test_at_the_old_policy_every_loss_has_the_policy_gradient(name):
    advantages = Q - THETA.exp() @ Q  # exact, so that the surrogate itself is 0

    def loss(log_p):
        def one_token(a):
            if name == "reinforce":
                return reinforce_loss(batch(log_p, a), batch(advantages, a), ONE)[0]
            return RATIO_LOSSES[name](batch(log_p, a), batch(THETA, a), batch(advantages, a), ONE)[0]
        return expectation(THETA, one_token)

    same(gradient(loss, THETA), gradient(lambda log_p: -(log_p.exp() @ Q), THETA))
    if name != "reinforce":
        same(loss(THETA), 0.0)


def test_cpi_on_old_samples_is_the_expected_reward_of_the_new_policy():
    loss = expectation(OLD, lambda a: cpi_loss(batch(THETA, a), batch(OLD, a), batch(Q, a), ONE)[0])
    same(-loss, THETA.exp() @ Q)


@EVERY_RATIO_LOSS
def test_on_old_samples_approx_kl_and_ratio_have_exact_means(name):
    """The mean of approx_kl is the exact KL, and the mean ratio is 1."""
    stats = [RATIO_LOSSES[name](batch(THETA, a), batch(OLD, a), t([[1]]), ONE)[1] for a in range(4)]
    same(expectation(OLD, lambda a: stats[a]["approx_kl"]), kl(OLD, THETA))
    same(expectation(OLD, lambda a: stats[a]["ratio_mean"]), 1.0)


@EVERY_RATIO_LOSS
def test_ratio_stats_are_over_response_tokens_only(name):
    """Ratios below 1 in the second case: the ratio of padding, exp(0), must not win the maximum."""
    for ratios in ([2, 3, 0.5], [0.2, 0.3, 0.5]):
        logprobs, mask = t([[*ratios[:2], 99], [ratios[2], 99, 99]]).log(), lengths_to_mask([2, 1], 3)
        _, stats = RATIO_LOSSES[name](logprobs, torch.zeros(2, 3), torch.ones(2, 3), mask)
        same(stats["ratio_max"], max(ratios))
        same(stats["ratio_mean"], sum(ratios) / 3)


def test_kl_penalty_is_the_exact_kl_in_value_and_gradient():
    """The KL is the one from the old policy to the new."""
    def penalty(log_p):
        penalise = partial(kl_penalty_loss, advantages=t([[0]]), mask=ONE, coef=0.7)
        return expectation(OLD, lambda a: penalise(batch(log_p, a), batch(OLD, a))[0])

    same(penalty(THETA), 0.7 * kl(OLD, THETA))
    same(gradient(penalty, THETA), gradient(lambda log_p: 0.7 * kl(OLD, log_p), THETA))


def test_kl_penalty_by_hand_which_k1_with_the_same_mean_would_miss():
    loss, _ = kl_penalty_loss(t([[2, 0.5]]).log(), t([[0, 0]]), t([[3, 0]]), bits([[1, 1]]), coef=0.7)
    same(loss, -(2 * 3 - 0.7 * (2 - 1 - math.log(2)) - 0.7 * (0.5 - 1 + math.log(2))) / 2)


def test_kl_penalty_of_coefficient_zero_is_cpi():
    args = *(randn(3, 4, seed=seed) for seed in range(3)), lengths_to_mask([4, 1, 2], 4)
    assert torch.equal(kl_penalty_loss(*args, coef=0)[0], cpi_loss(*args)[0])


@pytest.mark.parametrize("lr, ratio", [(0.1, 1.254), (1, 1.901), (5, 3.921)])
def test_clip_does_not_bound_the_ratio_nor_pull_it_back(lr, ratio):
    """A softmax over four tokens, advantage 1 on the first: a step overshoots, and then the gradient is 0."""
    theta, old = torch.zeros(4, dtype=torch.float64), t([[0.25]]).log()
    for _ in range(50):
        step = gradient(lambda log_p: policy_loss(batch(log_p, 0), old, t([[1]]), ONE, CLIP)[0], theta)
        theta -= lr * step
    assert (step == 0).all()
    same(theta.softmax(-1)[0] / 0.25, ratio, tol=5e-4)  # as many digits as the numbers have


@EVERY_RATIO_LOSS
@pytest.mark.parametrize("log_r", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_losses_gradients_and_stats_stay_finite_in_float32(name, log_r, advantage):
    logprobs, mask = torch.full((2, 3), log_r, requires_grad=True), lengths_to_mask([3, 1], 3)
    loss, stats = RATIO_LOSSES[name](logprobs, torch.zeros(2, 3), torch.full((2, 3), advantage), mask)
    loss.backward()
    assert logprobs.grad.isfinite().all() and all(x.isfinite() for x in (loss, *stats.values()))


@pytest.mark.parametrize("log_r", [-20, 20])
def test_the_cap_on_the_ratio_changes_no_healthy_number(log_r):
    loss, stats = cpi_loss(t([[log_r]]), t([[0]]), t([[-1]]), ONE)
    assert loss == stats["ratio_max"] == t(log_r).exp()


# ----------------------------------------------------------------------------------------------------------
# value loss

@pytest.mark.parametrize("old, value, target, loss, slope", [
    (0, 0.1, 1, 0.405, -0.9),   # inside the range: half the squared error
    (0, -0.1, 1, 0.605, -1.1),
    (0, 1, 1, 0.32, 0),         # moved past the clip, to the right answer: judged as if at 0.2, no gradient
    (0, -1, -1, 0.32, 0),
    (0, 3, 1, 2.0, 2),          # overshot: the true error is the greater one
    (0, -1, 1, 2.0, -2),        # moved away from the return: the full gradient leads back
    (5, 5.1, 6, 0.405, -0.9)])  # the range is around the old value
def test_clipped_value_loss_is_the_pessimistic_one(old, value, target, loss, slope):
    values = t([[value]]).requires_grad_()
    actual, stats = value_loss(values, t([[old]]), t([[target]]), ONE, CLIP)
    actual.backward()
    same(actual, loss)
    same(values.grad, [[slope]], tol=0 if slope == 0 else 1e-13)
    assert stats["value_clip_frac"] == (slope == 0)


def test_value_loss_without_clip_is_half_the_mean_squared_error():
    """The old values do not enter."""
    values, mask = t([[1, 2], [4, 99]]).requires_grad_(), bits([[1, 1], [1, 0]])
    loss, _ = value_loss(values, torch.full((2, 2), NAN), t([[0, 0], [1, 99]]), mask, clip=None)
    loss.backward()
    same(loss, 0.5 * (1 + 4 + 9) / 3)
    same(values.grad, t([[1, 2], [3, 0]]) / 3)


# ----------------------------------------------------------------------------------------------------------
# every function at once: padding, data that no gradient enters, inputs, precision

SCORES = t([1, 2, 3, 4])
FUNCTIONS = {  # name -> (function of (B, R) tensors and a mask, which of the tensors a gradient flows into)
    "masked_mean": (masked_mean, [True]),
    "whiten": (whiten, [True]),
    "whiten_keeping_mean": (partial(whiten, shift_mean=False), [True]),
    "explained_variance": (explained_variance, [True, True]),
    "shape_rewards": (lambda new, ref, mask: shape_rewards(SCORES.to(new), new, ref, mask, 0.1), [False] * 2),
    "reward_to_go": (partial(reward_to_go, gamma=0.9), [True]),
    "gae": (partial(gae, gamma=0.9, lam=0.8), [False, False]),
    "reinforce_loss": (reinforce_loss, [True, False]),
    "cpi_loss": (cpi_loss, [True, False, False]),
    "kl_penalty_loss": (partial(kl_penalty_loss, coef=0.7), [True, False, False]),
    "policy_loss": (partial(policy_loss, clip=CLIP), [True, False, False]),
    "value_loss": (partial(value_loss, clip=CLIP), [True, False, False]),
    "value_loss_unclipped": (partial(value_loss, clip=None), [True, False, False])}
RATIO_STATS = {"approx_kl", "ratio_max", "ratio_mean"}
LOSS_STATS = {"reinforce_loss": set(), "cpi_loss": RATIO_STATS, "kl_penalty_loss": RATIO_STATS,
              "policy_loss": RATIO_STATS | {"clip_frac"}, "value_loss": {"value_clip_frac"},
              "value_loss_unclipped": set()}
EVERY_FUNCTION, EVERY_LOSS = (pytest.mark.parametrize("name", table) for table in (FUNCTIONS, LOSS_STATS))
MASK = lengths_to_mask([3, 5, 1, 0], 5)
POISONS = {"nan": NAN, "1e30": 1e30, "-inf": -INF, "noise": randn(4, 5, seed=9)}


def inputs_of(name, padding=0.0, dtype=torch.float64, mask=MASK):
    count, padding = len(FUNCTIONS[name][1]), torch.as_tensor(padding, dtype=dtype)
    return [torch.where(mask, 0.5 * randn(4, 5, seed=seed).to(dtype), padding) for seed in range(count)]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in (result.values() if isinstance(result, dict) else result) for x in tensors(part)]


def run(name, inputs, mask=MASK):
    """All outputs, and for each input the gradient of a weighted sum of them or, if none flows, None."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = tensors(FUNCTIONS[name][0](*leaves, mask))
    total = sum((x * randn(*x.shape, seed=7).to(x)).sum() for x in outputs)
    flows = total.requires_grad
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if flows else [None] * len(leaves)
    return [x.detach() for x in outputs], list(grads)


@EVERY_FUNCTION
@pytest.mark.parametrize("poison", POISONS)
def test_padding_changes_no_bit_and_receives_zeros(name, poison):
    """This holds for outputs and for gradients."""
    poisoned, clean = (sum(run(name, inputs_of(name, padding)), []) for padding in (POISONS[poison], 0.0))
    for x, y in zip(poisoned, clean):
        assert (x is None and y is None) or torch.equal(x, y)  # a NaN equals nothing
        assert x is None or x.dim() == 0 or (x[~MASK] == 0).all()


@EVERY_FUNCTION
def test_gradient_flows_into_what_is_learnt_and_never_into_data(name):
    _, grads = run(name, inputs_of(name))
    assert [g is not None and bool(g.any()) for g in grads] == FUNCTIONS[name][1]


@EVERY_FUNCTION
def test_inputs_are_not_modified(name):
    inputs, mask = inputs_of(name, padding=3.0), MASK.clone()
    before = [x.clone() for x in inputs]
    FUNCTIONS[name][0](*inputs, mask)
    assert torch.equal(mask, MASK) and all(map(torch.equal, inputs, before))


@EVERY_FUNCTION
def test_a_batch_without_one_response_token_gives_zeros_and_no_nan(name):
    nothing = torch.zeros_like(MASK)
    outputs, grads = run(name, inputs_of(name, padding=NAN, mask=nothing), nothing)
    for x in outputs:
        assert x.isfinite().all() and (name == "explained_variance" or (x == 0).all())
    assert all(g is None or (g == 0).all() for g in grads)


@EVERY_FUNCTION
def test_float32_in_float32_out(name):
    assert {x.dtype for x in run(name, inputs_of(name, dtype=torch.float32))[0]} == {torch.float32}


@EVERY_LOSS
def test_losses_come_with_named_stats_that_are_detached_scalars(name):
    loss, stats = FUNCTIONS[name][0](*[x.requires_grad_() for x in inputs_of(name)], MASK)
    assert loss.dim() == 0 and loss.requires_grad and set(stats) == LOSS_STATS[name]
    assert all(x.dim() == 0 and not x.requires_grad for x in stats.values())


@EVERY_LOSS
def test_gradient_equals_finite_differences(name):
    """On random inputs, of which none stands within the step of a kink."""
    learnt, *data = inputs_of(name)
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name][0](x, *data, MASK)[0], learnt.requires_grad_())


def test_a_batch_above_the_horizon_cannot_make_the_coefficient_negative():
    controller = KLController(0.2, target=6, horizon=100)
    controller.update(kl=0, n_episodes=600)
    assert controller.value == pytest.approx(0.2 * 0.8)


def test_k3_does_not_pull_a_token_the_wrong_way_beyond_the_cap():
    logprobs = torch.tensor([-200.0], requires_grad=True)
    kl_estimate(logprobs, torch.zeros(1), "k3").sum().backward()
    assert logprobs.grad.item() <= 0
