"""
The derivation of PPO, step by step, on a problem that can be listed: 4 tokens, at most 3 of them, 40 responses. Every
expectation is a sum over all responses, every exact gradient is autograd through that sum, all in float64. Nothing is
sampled (but for T7) and nothing is approximate: a statement holds to rounding, or a test shows by how much it fails.

Tests are numbered as the statements are, T1 to T39 along the derivation, T40 and up for what it left out.

From a mean over tokens to an expectation. The losses of ppo.py are means over the tokens they are given. Given one
response alone and multiplied by its number of tokens n, a loss is a sum over that response's tokens, so

    expected gradient = sum over responses of P_old(response) * n * gradient of the loss on this response alone

(T46 shows that a whole batch is the same sum over its number of tokens). Every test of a loss is written that way,
with `per_response`, `gradients` and `step` below. What stands beyond a response's end is NaN in every input.
"""

import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

from enumerable import EOS, enumerate_batches, enumerate_responses
from experiments.overoptimization import best_of_n_kl
from experiments.rungs import OBJECTIVES, PenaltyController, surrogate_loss, token_advantages
from model import GPTConfig
from paths import ROOT
from ppo import (KLController, cpi_loss, explained_variance, gae, group_advantages, kl_estimate, kl_penalty_loss,
                 log_ratio, masked_mean, policy_loss, ratio_stats, reinforce_loss, reward_to_go, shape_rewards,
                 value_loss, whiten)
from reward_model import RewardModel, bradley_terry_loss
from rollout import generate, score_response
from tensors import randn
from train_ppo import loop


# ---------------------------------------------------------------------------------------------------------------------
# the problem

V, R = 4, 3
NAN = math.nan
BETA = 1.0  # the price of a nat of KL
TOKENS, MASK = enumerate_responses(V, R)  # (40, R) each
N, LENS = len(TOKENS), MASK.sum(1)
CUT = TOKENS[torch.arange(N), LENS - 1] != EOS  # ended by the length limit, not by EOS
STEPS = torch.arange(R, dtype=torch.float64)
FIRST, LAST = MASK & (STEPS == 0), STEPS == LENS.unsqueeze(1) - 1
PROMPT_LENS = torch.ones(N, dtype=torch.long)
PROMPT_AND_TOKENS = torch.cat([torch.full((N, 1), EOS), TOKENS], dim=1)  # the only prompt is one token, an EOS


# A number for each prefix, its last token included (a node: state and action), or without it (the state).
NODE = ((TOKENS + 1) * (V + 1) ** torch.arange(R)).cumsum(1)  # (40, R)
STATE = F.pad(NODE[:, :-1], (1, 0))
VISITS = ((STATE.unsqueeze(2) == STATE[MASK].unique()) & MASK.unsqueeze(2)).double()  # (40, R, 13): one-hot state


def padded(x):
    return torch.where(MASK, x, NAN)


def total(x):
    """Sum over each response's tokens (40,)."""
    return torch.where(MASK, x, 0.0).sum(1)


def table(ids, seed):
    """A random number for each id, (40, R): a function of the state, or of state and action."""
    return padded(randn(125, seed=seed)[ids])


class Policy:
    """Two layers over the one-hot prefix, with model.GPT's interface, so that `generate` and `score_response` take it.
    All weights are slices of one vector theta (128,) and shared by all states: a step for one moves the others."""

    config = GPTConfig(block_size=1 + R, vocab_size=V, n_layer=1, n_head=1, n_embd=V)

    def __init__(self, theta):
        self.theta = theta

    def parameters(self):
        yield self.theta

    def __call__(self, idx, cache=None, positions=None):
        x = F.one_hot(idx, V).to(self.theta)  # (B, T, V)
        if cache is not None:  # it holds the one-hot tokens seen so far
            x = cache.update(0, x.unsqueeze(1), x.unsqueeze(1), positions)[0][:, 0]
        where = torch.arange(idx.size(1)).unsqueeze(0) if positions is None else positions.unsqueeze(1)
        seen = torch.arange(x.size(1)) <= where.unsqueeze(2)  # (B or 1, queries, T)
        # R tokens are all that a state can hold: the prompt and all of a response but its last token
        x = F.pad(x.unsqueeze(1) * seen.unsqueeze(3), (0, 0, 0, R - x.size(1)))  # (B, queries, R, V)
        return torch.tanh(x.flatten(2) @ self.theta[:96].view(R * V, 8))

    def policy_head(self, hidden):
        return hidden @ self.theta[96:].view(8, V)

    def value_head(self, hidden):  # a function of the state and nothing else: a critic that knows nothing
        return hidden.sum(-1)


def all_logprobs(theta):
    """log pi(. | s) of every state on the way (40, R, V), without rollout.py."""
    policy = Policy(theta)
    return policy.policy_head(policy(PROMPT_AND_TOKENS)[:, :R]).log_softmax(-1)


def exact_logprobs(theta):
    return padded(all_logprobs(theta).gather(2, TOKENS.unsqueeze(2)).squeeze(2))


def P(theta):
    """The probability of each response (40,)."""
    return total(exact_logprobs(theta)).exp()


OLD = 0.5 * randn(128, seed=1)        # sampled the responses, and is where most gradients are taken
NEW = OLD + 0.3 * randn(128, seed=2)  # some updates later
REF = OLD + 0.6 * randn(128, seed=3)  # the reference policy of the KL
P_OLD, OLD_LOGPROBS, NEW_LOGPROBS, REF_LOGPROBS = P(OLD), *map(exact_logprobs, (OLD, NEW, REF))
REWARDS = table(NODE, seed=4)         # any reward r(s, a)
SCORES = 2 * randn(N, seed=5)         # and the kind that RLHF has: one number, at the end


def mean(x):
    """Expectation over responses of the old policy, along the first dimension."""
    return torch.tensordot(P_OLD, x, 1)


def given(ids, x, probs=P_OLD):
    """E[x | id] of a quantity (40, R) of tokens: conditional expectation by summation over the responses."""
    weights = probs.unsqueeze(1).expand(N, R)[MASK]
    sums = [torch.zeros(125, dtype=x.dtype).index_add(0, ids[MASK], w) for w in (weights * x[MASK], weights)]
    return padded((sums[0] / sums[1])[ids])


def to_go(rewards, gamma=1.0):
    """G_t = sum over u >= t of gamma^(u-t) r_u, as written, without the recursion."""
    rewards = torch.where(MASK, rewards, 0.0)
    return padded(torch.stack([sum(gamma ** (u - t) * rewards[:, u] for u in range(t, R)) for t in range(R)], dim=1))


G = to_go(REWARDS)
V_OLD, Q_OLD = given(STATE, G), given(NODE, G)
A_OLD = Q_OLD - V_OLD


def J(theta, rewards=REWARDS, gamma=1.0):
    """Expected discounted return, differentiable in theta through the probabilities."""
    return P(theta) @ total(rewards * gamma ** STEPS)


def kl_of_responses(theta):
    """KL(pi || ref) of whole responses, differentiable in theta."""
    p, ref = P(theta), P(REF)
    return p @ (p / ref).log()


def kl_of_states(theta, to=REF, forward=False):
    """KL(pi || to) in each state (40, R), summed over the vocabulary; forward: KL(to || pi)."""
    p, q = all_logprobs(theta), all_logprobs(to)
    p, q = (q, p) if forward else (p, q)
    return padded((p.exp() * (p - q)).sum(2))


def gradient(f, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0]


def rel(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def gap(actual, expected):
    """Largest absolute difference over response tokens, or over all entries of anything that is not (40, R)."""
    difference = torch.as_tensor(actual - expected)
    return (difference[MASK] if difference.shape == MASK.shape else difference).abs().max().item()


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


# ---------------------------------------------------------------------------------------------------------------------
# a loss, response by response

def token_scores():
    """grad log pi(token) at the old policy (40, R, 128), 0 past a response's end."""
    return jacobian(lambda theta: torch.where(MASK, exact_logprobs(theta), 0.0), OLD)


def logprobs(theta):
    return padded(score_response(Policy(theta), PROMPT_AND_TOKENS, PROMPT_LENS, R)[0])


def per_response(loss, x, *data, **options):
    """(40,): the loss on each response alone times its tokens. x is what is learnt, data is (40, R) each."""
    def alone(mask, *row):
        return loss(*(y.unsqueeze(0) for y in row), mask.unsqueeze(0), **options)[0]

    return LENS * torch.vmap(alone)(MASK, x, *data)


def gradients(loss, theta, *data, **options):
    """(40, 128): where gradient descent on each response's loss moves theta, that is minus the gradient."""
    theta = theta.clone().requires_grad_()
    losses = per_response(loss, logprobs(theta), *data, **options)
    return -torch.autograd.grad(losses, theta, torch.eye(N, dtype=theta.dtype), is_grads_batched=True)[0]


def step(loss, theta, *data, **options):
    """(128,): minus the gradient of the expectation over responses of the old policy."""
    return -gradient(lambda x: mean(per_response(loss, logprobs(x), *data, **options)), theta)


def variance(samples):
    """Of an estimate from one response (40, 128): summed over the coordinates."""
    return mean((samples - mean(samples)).square().sum(1)).item()


def kl_loss(logprobs, ref_logprobs, mask, kind):
    """The KL as a term of the loss, as train_ppo.py has it."""
    return masked_mean(kl_estimate(logprobs, ref_logprobs, kind), mask), {}


# ---------------------------------------------------------------------------------------------------------------------
# T1, T2: comparisons -> a reward model

ANSWERS = randn(5, seed=6)  # what the answers to one prompt are worth
PAIRS = [(w, l) for w in range(5) for l in range(5) if w != l]


def expected_bradley_terry_loss(r):
    """Over pairs shown equally often and a labeller who prefers w to l with probability sigmoid(difference)."""
    chance = torch.stack([torch.sigmoid(ANSWERS[w] - ANSWERS[l]) for w, l in PAIRS])
    return chance @ torch.stack([bradley_terry_loss(r[w:w + 1], r[l:l + 1])[0] for w, l in PAIRS]) / len(PAIRS)


def test_t01_comparisons_do_not_fix_the_zero_of_a_prompts_scores():
    """L(r) = L(r + c(prompt)), whatever c."""
    chosen, rejected, c = randn(20, seed=7), randn(20, seed=8), 1e3 * randn(20, seed=9)
    assert gap(bradley_terry_loss(chosen, rejected)[0], bradley_terry_loss(chosen + c, rejected + c)[0]) <= 1e-10


def test_t02a_bradley_terry_pushes_apart_by_the_doubt_that_is_left():
    """dL/dr_w = -sigmoid(-(r_w - r_l)) / B = -dL/dr_l, and L(0) = ln 2."""
    chosen, rejected = (randn(20, seed=seed).requires_grad_() for seed in (7, 8))
    up, down = torch.autograd.grad(bradley_terry_loss(chosen, rejected)[0], (chosen, rejected))
    assert gap(up, -torch.sigmoid(rejected - chosen) / 20) <= 1e-14 and torch.equal(up, -down)
    assert gap(bradley_terry_loss(chosen * 0, rejected * 0)[0], math.log(2)) <= 1e-14


def test_t02b_comparisons_recover_the_scores_up_to_a_constant():
    """The scale of the scores is recovered, too. argmin of the expected loss = r* - mean(r*): Bradley-Terry fixes more
    than the ranking."""
    r = torch.zeros_like(ANSWERS)
    for _ in range(20):  # Newton's method; the Hessian knows no constant shift
        curvature = hessian(expected_bradley_terry_loss, r)
        r = r - torch.linalg.pinv(curvature, hermitian=True) @ gradient(expected_bradley_terry_loss, r)
    assert gap(r - r.mean(), ANSWERS - ANSWERS.mean()) <= 1e-6
    assert gradient(expected_bradley_terry_loss, 2 * ANSWERS).norm() > 0.01  # same ranking, other scale: not a minimum


def test_t03_when_a_constant_added_to_all_scores_is_harmless():
    """score + 5 leaves grad J alone iff gamma = 1 and every response is scored, also one that the limit cut; and GAE's
    gradient iff lambda = 1 or the critic moves by 5 too."""
    def step_for(scores, gamma):
        rewards = shape_rewards(scores, OLD_LOGPROBS, REF_LOGPROBS, MASK, BETA)
        weights, _ = token_advantages("reinforce", rewards, rewards, MASK, gamma, lam=1)
        assert rel(step(reinforce_loss, OLD, weights), gradient(lambda x: J(x, rewards, gamma), OLD)) <= 1e-10
        return step(reinforce_loss, OLD, weights)

    assert rel(step_for(SCORES + 5, gamma=1), step_for(SCORES, gamma=1)) <= 1e-12
    assert rel(step_for(SCORES + 5, gamma=0.9), step_for(SCORES, gamma=0.9)) > 0.1  # long answers now cost
    assert rel(step_for(SCORES + 5 * ~CUT, gamma=1), step_for(SCORES, gamma=1)) > 1  # a bonus for ending in time

    def gae_step(shift, critic, lam):
        rewards = shape_rewards(SCORES + shift, OLD_LOGPROBS, REF_LOGPROBS, MASK, BETA)
        return step(reinforce_loss, OLD, gae(rewards, V_OLD + critic, MASK, gamma=1, lam=lam)[0])

    # Under GAE with lambda < 1, the critic has to move with the scores.
    assert rel(gae_step(5, 0, lam=1), gae_step(0, 0, lam=1)) <= 1e-12
    assert rel(gae_step(5, 0, lam=0.95), gae_step(0, 0, lam=0.95)) > 0.1
    assert rel(gae_step(5, 5, lam=0.95), gae_step(0, 0, lam=0.95)) <= 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# T4 to T9: the policy gradient

def test_t04_probabilities_sum_to_1_and_score_functions_to_0():
    """sum P = 1; log P = sum of log pi; E[grad log P] = 0."""
    assert gap(P(OLD).sum(), 1.0) <= 1e-12
    assert gap(logprobs(OLD), OLD_LOGPROBS) <= 1e-12
    assert step(reinforce_loss, OLD, torch.ones(N, R)).norm() <= 1e-12


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_t05_the_recursion_of_returns_is_the_discounted_sum(gamma):
    """G_0 = sum of gamma^t r_t. To the last bit: the rewards are eighths, so nothing is rounded."""
    rewards = (8 * REWARDS).round() / 8
    assert torch.equal(reward_to_go(rewards, MASK, gamma)[:, 0], total(rewards * gamma ** STEPS))
    assert gap(reward_to_go(REWARDS, MASK, gamma), to_go(REWARDS, gamma)) <= 1e-14


def test_t06_reinforce_is_the_gradient_of_the_expected_return():
    """grad J = E[R sum_t grad log pi_t]: differentiating the probabilities needs nothing but log-probs of samples."""
    weights, _ = token_advantages("reinforce", REWARDS, V_OLD, MASK, gamma=1, lam=1)
    assert rel(step(reinforce_loss, OLD, weights), gradient(J, OLD)) <= 1e-10


def test_t07_200000_samples_agree_within_5_standard_errors():
    """Every coordinate of the gradient is compared. The only sampled test: generate -> score_response -> reinforce_loss
    as one batch. Fixed seed."""
    n = 200_000
    prompts, prompt_lens = torch.full((n, 1), EOS), torch.ones(n, dtype=torch.long)
    rollout = generate(Policy(OLD), prompts, prompt_lens, R, eos=EOS, generator=torch.Generator().manual_seed(0))
    key = torch.tensor([V ** 2, V, 1])
    number = torch.zeros(V ** R, dtype=torch.long).scatter(0, TOKENS @ key, torch.arange(N))
    row = number[rollout.tokens[:, 1:] @ key]  # which of the 40 each one is
    assert torch.equal(rollout.mask, MASK[row])
    assert torch.where(rollout.mask, rollout.logprobs - OLD_LOGPROBS[row], 0.0).abs().max() <= 1e-12
    z = (torch.bincount(row, minlength=N) - n * P_OLD) / (n * P_OLD * (1 - P_OLD)).sqrt()
    assert z.abs().max() < 5

    weights, _ = token_advantages("reinforce", REWARDS[row], V_OLD[row], rollout.mask, gamma=1, lam=1)

    def sampled(theta):
        new_logprobs, _, _ = score_response(Policy(theta), rollout.tokens, prompt_lens, R)
        return -reinforce_loss(new_logprobs, weights, rollout.mask)[0] * rollout.mask.sum() / n

    one = gradients(reinforce_loss, OLD, token_advantages("reinforce", REWARDS, V_OLD, MASK, gamma=1, lam=1)[0])
    error, std = gradient(sampled, OLD) - gradient(J, OLD), mean((one - mean(one)).square()).sqrt()
    used = std > 0  # some weights belong to tokens that no state has seen
    assert (error[used] / std[used] * n ** 0.5).abs().max() < 5 and (error[~used] == 0).all()


def test_t08_a_reward_needs_no_gradient():
    """A reward model, and the bare numbers that it gave, make the same step; so does Python's len()."""
    reward_model = RewardModel(GPTConfig(block_size=1 + R, vocab_size=V, n_layer=1, n_head=1, n_embd=4)).double()
    with torch.no_grad():
        for seed, p in enumerate(reward_model.parameters()):
            p.copy_(randn(*p.shape, seed=10 + seed))
    differentiable = reward_model(PROMPT_AND_TOKENS, 1 + LENS)
    numbers = torch.tensor(differentiable.tolist(), dtype=torch.float64)
    lengths = torch.tensor([len(row[:n]) for row, n in zip(TOKENS.tolist(), LENS)], dtype=torch.float64)

    assert differentiable.requires_grad
    steps = []
    for scores in differentiable, numbers, lengths:
        rewards = shape_rewards(scores, OLD_LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0)
        assert not rewards.requires_grad
        steps.append(step(reinforce_loss, OLD, reward_to_go(rewards, MASK, gamma=1)))
        assert rel(steps[-1], gradient(lambda theta: P(theta) @ scores.detach(), OLD)) <= 1e-10
    assert rel(steps[0], steps[1]) <= 1e-12


def test_t09_reward_to_go_keeps_the_expectation():
    """E[sum_t G_t grad log pi_t] = grad J: a token cannot change the rewards before it."""
    assert rel(step(reinforce_loss, OLD, reward_to_go(REWARDS, MASK, gamma=1)), gradient(J, OLD)) <= 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# T10 to T19: variance, baselines, advantages

def variance_with(objective, rewards, values=V_OLD, lam=1.0):
    weights, _ = token_advantages(objective, rewards, values, MASK, gamma=1, lam=lam)
    return variance(gradients(reinforce_loss, OLD, weights))


def test_t10_reward_to_go_has_the_lower_variance_often_but_not_always():
    """Less noise from the past, unless the past cancels the future: r_0 = f(a_0) and r_last = -f(a_0) return 0."""
    assert variance_with("reward_to_go", REWARDS) < 0.95 * variance_with("reinforce", REWARDS)
    f = randn(V, seed=20)[TOKENS[:, :1]]
    cancelling = padded(f * FIRST - f * LAST)
    assert variance_with("reinforce", cancelling) == 0 and variance_with("reward_to_go", cancelling) > 0.1
    # RLHF without a KL: one reward at the end and gamma = 1. There the two are the same estimator.
    at_the_end = shape_rewards(SCORES, OLD_LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0)
    same = [token_advantages(name, at_the_end, V_OLD, MASK, 1, 1)[0] for name in ("reinforce", "reward_to_go")]
    assert torch.equal(*same)


def test_t11_a_baseline_may_depend_on_the_state_but_not_on_the_token():
    """E[b(s) grad log pi] = 0 for any b, so also for b = 100; b(s, a) is none."""
    def step_with(values):
        return step(reinforce_loss, OLD, token_advantages("baseline", REWARDS, values, MASK, gamma=1, lam=0)[0])

    exact = gradient(J, OLD)
    for b in table(STATE, seed=21), padded(torch.full((N, R), 100.0, dtype=torch.float64)):
        assert rel(step_with(b), exact) <= 1e-10
    assert rel(step_with(table(NODE, seed=21)), exact) > 0.1


def test_t12_a_baseline_may_hurt_and_the_value_is_not_the_best_one():
    """Variance: best baseline < V < none < 100. The best b(s) is the solution of a least-squares problem."""
    score, root = token_scores(), P_OLD.sqrt()
    lhs = torch.einsum("n,ntk,nts->nks", root, score, VISITS).flatten(0, 1)
    rhs = torch.einsum("n,ntk,nt->nk", root, score, torch.where(MASK, G, 0.0)).flatten()
    best = padded(VISITS @ torch.linalg.lstsq(lhs, rhs, driver="gelsd").solution)

    of_best, of_value, of_none, of_100 = (variance_with("baseline", REWARDS, values) for values in
                                          (best, V_OLD, 0 * V_OLD, 0 * V_OLD + 100))
    assert of_best < 0.99 * of_value < of_value < 0.9 * of_none < of_none < 0.01 * of_100
    for seed in range(3):
        assert of_best < variance_with("baseline", REWARDS, best + 0.1 * table(STATE, seed))


def induction(rewards, theta, backup):
    """Q and V (40, R) backwards from the last token; backup(pi(. | s) (V,), Q(s, .) (V,)) is the value of a state."""
    pi, Q, values = all_logprobs(theta).exp(), padded(torch.zeros(N, R)).double(), padded(torch.zeros(N, R)).double()
    for t in reversed(range(R)):
        Q[:, t] = rewards[:, t] + (torch.where(LENS > t + 1, values[:, t + 1], 0.0) if t + 1 < R else 0.0)
        for state in STATE[:, t][MASK[:, t]].unique():
            rows = (STATE[:, t] == state) & MASK[:, t]
            q = torch.zeros(V, dtype=Q.dtype).scatter(0, TOKENS[rows, t], Q[rows, t])
            values[rows, t] = backup(pi[rows, t][0], q)
    return Q, values


def test_t13_the_advantage_has_mean_0_and_is_the_exact_td_error():
    """E_a[A(s, a)] = 0; V(s_0) = J; Q by backward induction; A = r + V(s') - V(s), which is GAE with lambda 0."""
    Q, values = induction(REWARDS, OLD, lambda pi, q: pi @ q)
    assert gap(Q, Q_OLD) <= 1e-14 and gap(values, V_OLD) <= 1e-14 and gap(values[0, 0], J(OLD)) <= 1e-14
    advantages, _ = gae(REWARDS, V_OLD, MASK, gamma=1, lam=0)
    assert gap(given(STATE, advantages), 0 * V_OLD) <= 1e-14
    assert gap(advantages, A_OLD) <= 1e-14


def test_t14_the_exact_advantage_has_less_variance_than_the_baseline():
    """E[sum_t A(s_t, a_t) grad log pi_t] = grad J, and the noise of what follows the token is gone."""
    weights, _ = token_advantages("gae", REWARDS, V_OLD, MASK, gamma=1, lam=0)
    assert rel(step(reinforce_loss, OLD, weights), gradient(J, OLD)) <= 1e-10
    assert variance_with("gae", REWARDS, lam=0) < 0.9 * variance_with("baseline", REWARDS)


def test_t15_performance_difference_lemma():
    """J(new) - J(old) = E_new[sum_t A_old(s_t, a_t)]."""
    advantages, _ = gae(REWARDS, V_OLD, MASK, gamma=1, lam=0)
    for theta in NEW, REF, randn(128, seed=22):
        assert gap(P(theta) @ total(advantages), J(theta) - J(OLD)) <= 1e-12


def test_t16_the_usual_discounted_estimator_has_another_gradient():
    """It is not the gradient of the discounted return. That needs gamma^t in front of grad log pi_t, which everybody
    drops. The whole return of the response on each of its tokens (the reinforce rung) needs no such factor: the rungs
    agree only if gamma = 1."""
    exact = gradient(lambda theta: J(theta, gamma=0.9), OLD)
    whole, _ = token_advantages("reinforce", REWARDS, V_OLD, MASK, gamma=0.9, lam=1)
    assert rel(step(reinforce_loss, OLD, whole), exact) <= 1e-10
    for name in "reward_to_go", "baseline":
        weights, _ = token_advantages(name, REWARDS, V_OLD, MASK, gamma=0.9, lam=1)
        assert rel(step(reinforce_loss, OLD, weights * 0.9 ** STEPS), exact) <= 1e-10
        assert rel(step(reinforce_loss, OLD, weights), exact) > 0.01


@pytest.mark.parametrize("gamma", [1, 0.9])
def test_t17_gae_is_between_the_td_error_and_the_whole_return(gamma):
    """lambda = 1: G - V for any V; lambda = 0: r + gamma V(s') - V(s), with no V after the last token."""
    values = table(STATE, seed=23)
    assert gap(gae(REWARDS, values, MASK, gamma, lam=1)[0], to_go(REWARDS, gamma) - values) <= 1e-14
    after = torch.cat([torch.where(MASK, values, 0.0)[:, 1:], torch.zeros(N, 1)], dim=1)
    assert gap(gae(REWARDS, values, MASK, gamma, lam=0)[0], REWARDS + gamma * after - values) <= 1e-14


@pytest.mark.parametrize("lam", [0, 0.5, 0.95, 1])
def test_t18_with_the_exact_value_gae_has_the_advantage_as_its_mean(lam):
    """E[GAE | s, a] = A(s, a), and the critic's target has E[A + V | s] = V(s)."""
    advantages, returns = gae(REWARDS, V_OLD, MASK, gamma=1, lam=lam)
    assert gap(given(NODE, advantages), A_OLD) <= 1e-12
    assert gap(given(STATE, returns), V_OLD) <= 1e-12


def test_t19_with_a_wrong_value_gae_is_biased_unless_lambda_is_1():
    """The bias falls with lambda, to 0 at 1. The critic here is an untrained value head."""
    _, values, _ = score_response(Policy(OLD), PROMPT_AND_TOKENS, PROMPT_LENS, R)
    bias = {}
    for lam in 0, 0.5, 0.95, 1:
        advantages, _ = gae(REWARDS, padded(values), MASK, gamma=1, lam=lam)
        bias[lam] = rel(step(reinforce_loss, OLD, advantages), gradient(J, OLD))
    assert bias[0] > bias[0.5] > bias[0.95] > 0.01 and bias[1] <= 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# T20 to T25: importance sampling and trust regions

def test_t20_importance_sampling_is_exact():
    """E_p[f] = E_q[(p/q) f], exact for one token and for whole responses: E_old[product of ratios * R] = J(new)."""
    f = randn(V, seed=24)[TOKENS]
    losses = [cpi_loss(NEW_LOGPROBS[i], OLD_LOGPROBS[i], f[i], FIRST[i])[0] for i in torch.arange(N).split(1)]
    assert gap(-mean(torch.stack(losses)), all_logprobs(NEW)[0, 0].exp() @ randn(V, seed=24)) <= 1e-12
    ratio = log_ratio(NEW_LOGPROBS, OLD_LOGPROBS, MASK).sum(1).exp()
    assert gap(mean(ratio * total(REWARDS)), J(NEW)) <= 1e-12


RATIO_LOSSES = {"cpi": cpi_loss, "kl_penalty": partial(kl_penalty_loss, coef=0.7),
                "clip": partial(policy_loss, clip=0.2)}
EVERY_RATIO_LOSS = pytest.mark.parametrize("name", RATIO_LOSSES)


@EVERY_RATIO_LOSS
def test_t21a_at_the_old_policy_the_surrogate_has_the_gradient_of_j(name):
    """All ratios are 1 there, and the surrogate is 0."""
    loss = RATIO_LOSSES[name]
    assert rel(step(loss, OLD, OLD_LOGPROBS, A_OLD), gradient(J, OLD)) <= 1e-10
    assert gap(mean(per_response(loss, OLD_LOGPROBS, OLD_LOGPROBS, A_OLD)), 0.0) <= 1e-12
    stats = loss(OLD_LOGPROBS, OLD_LOGPROBS, A_OLD, MASK)[1]
    assert stats["ratio_mean"] == 1 and stats["ratio_max"] == 1
    assert stats["approx_kl"] == 0 and stats.get("clip_frac", 0) == 0


@EVERY_RATIO_LOSS
def test_t21b_the_ratio_is_to_the_policy_that_sampled(name):
    """With the reference in its place the very first step is not along grad J."""
    wrong = step(RATIO_LOSSES[name], OLD, REF_LOGPROBS, A_OLD)
    assert rel(wrong, gradient(J, OLD)) > 0.1


def surrogate(theta, loss=cpi_loss):
    return -mean(per_response(loss, exact_logprobs(theta), OLD_LOGPROBS, A_OLD))


def test_t22_elsewhere_the_surrogate_agrees_with_j_to_first_order_only():
    """grad L(new) is not grad J(new): states and advantages are the old ones. |J - J_old - L| = O(h^2)."""
    assert rel(step(cpi_loss, NEW, OLD_LOGPROBS, A_OLD), gradient(J, NEW)) > 0.1
    thetas = [OLD + h * (NEW - OLD) for h in (0.01, 0.001, 0.0001)]
    error = [abs(J(theta) - J(OLD) - surrogate(theta)).item() for theta in thetas]
    for larger, smaller in zip(error, error[1:]):
        assert 1.9 <= math.log10(larger / smaller) <= 2.1


def test_t23_how_far_the_surrogate_can_be_wrong():
    """|J(new) - J(old) - L| <= 2 a^2 T (T-1) max|A| <= T (T-1) max|A| max_s KL, with a = the largest total variation of
    a state. TRPO's constant 4 gamma / (1 - gamma)^2 is infinite at gamma = 1; a response has at most T tokens."""
    largest, old = A_OLD[MASK].abs().max(), all_logprobs(OLD)
    for seed in range(300):
        theta = OLD + (0.05, 0.5, 2)[seed % 3] * randn(128, seed=1000 + seed)
        variation = 0.5 * (all_logprobs(theta).exp() - old.exp()).abs().sum(2)[MASK].max()
        bound = 2 * variation ** 2 * R * (R - 1) * largest
        assert abs(J(theta) - J(OLD) - surrogate(theta)) <= bound
        assert bound <= R * (R - 1) * largest * kl_of_states(theta, OLD, forward=True)[MASK].max()


def kl_to_old(theta):
    """KL(old || pi) of whole responses: kl_penalty_loss with nothing but its penalty."""
    nothing = torch.zeros(N, R, dtype=torch.float64)
    return mean(per_response(kl_penalty_loss, exact_logprobs(theta), OLD_LOGPROBS, nothing, coef=1))


def fisher(score):
    """E[sum_t score_t score_t^T] (128, 128)."""
    return torch.einsum("n,ntk,ntl->kl", P_OLD, score, score)


def natural_gradient():
    """F^+ g. A pseudo-inverse, because F has rank 39 = 13 states x 3: a softmax does not notice a shift."""
    F_old = fisher(token_scores())
    return torch.linalg.pinv(F_old, hermitian=True, rtol=1e-12) @ step(reinforce_loss, OLD, A_OLD)


def test_t24_the_kl_to_the_old_policy_curves_like_the_fisher_matrix():
    """Hessian of KL(old || pi) at pi = old = Fisher matrix, of tokens summed or of whole responses: the same."""
    of_tokens = fisher(token_scores())
    assert rel(of_tokens, fisher(token_scores().sum(1, keepdim=True))) <= 1e-10
    assert rel(hessian(kl_to_old, OLD), of_tokens) <= 1e-10
    assert gap(kl_to_old(NEW), P_OLD @ (P_OLD / P(NEW)).log()) <= 1e-12


def test_t25a_the_natural_gradient_fits_the_advantages_with_scores():
    """F^+ g = least squares of A on grad log pi; a softmax of its own for one state: F^+ g = A - mean(A)."""
    root = P_OLD.sqrt().unsqueeze(1).expand(N, R)[MASK]
    lhs, rhs = root.unsqueeze(1) * token_scores()[MASK], root * A_OLD[MASK]
    assert rel(natural_gradient(), torch.linalg.lstsq(lhs, rhs, rcond=1e-12, driver="gelsd").solution) <= 1e-8

    pi, A, one = torch.softmax(randn(V, seed=25), 0), randn(V, seed=26), torch.ones(1, 1, dtype=torch.bool)
    A = A - pi @ A

    def expected_surrogate(theta):
        tokens = zip(theta.log_softmax(0).view(V, 1, 1), pi.log().view(V, 1, 1), A.view(V, 1, 1))
        return -pi @ torch.stack([cpi_loss(*token, one)[0] for token in tokens])

    F_single = torch.diag(pi) - torch.outer(pi, pi)
    natural = torch.linalg.pinv(F_single, hermitian=True) @ gradient(expected_surrogate, pi.log())
    assert gap(natural, A - A.mean()) <= 1e-12


def test_t25b_a_natural_step_spends_the_kl_it_was_given_if_that_is_small():
    """sqrt(2 delta / g^T F^+ g) F^+ g moves KL(old || pi) by delta, to second order only."""
    g, natural = gradient(J, OLD), natural_gradient()
    spent = {delta: (kl_to_old(OLD + (2 * delta / (g @ natural)).sqrt() * natural) / delta).item()
             for delta in (1e-6, 1e-4, 1e-2)}
    assert 0.95 <= spent[1e-6] <= 1.05 and 0.95 <= spent[1e-4] <= 1.05 and spent[1e-2] > 2


# ---------------------------------------------------------------------------------------------------------------------
# T26 to T28: clipping, the critic, the entropy

@pytest.mark.parametrize("advantage, flat", [(1.7, {1.21, 3}), (-1.7, {0.5, 0.79})])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1, 1.19, 1.21, 3])  # at 1 +- clip there is no derivative
def test_t26a_clip_is_a_lower_bound_and_flat_only_past_the_clip(ratio, advantage, flat):
    """The bound is of ratio times advantage. dL/dratio = 0 iff A > 0 and ratio > 1 + clip, or A < 0 and ratio < 1 -
    clip; else it is A."""
    r = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    one, A = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), advantage, dtype=torch.float64)
    loss, stats = policy_loss(r.log(), torch.zeros(1, 1), A, one, clip=0.2)
    slope = -torch.autograd.grad(loss, r)[0].item()
    assert slope == 0 if ratio in flat else slope == pytest.approx(advantage, abs=1e-14)
    assert stats["clip_frac"] == (ratio in flat)
    assert -loss <= -cpi_loss(r.log(), torch.zeros(1, 1), A, one)[0]


def test_t26b_clip_bounds_the_cpi_surrogate_and_not_the_return():
    """L_CLIP <= L_CPI for each response and any policy, yet L_CLIP(new) > J(new) - J(old) for some: it does not bound
    how much worse the policy may have become."""
    promised_too_much = 0
    for seed in range(50):
        theta = OLD + randn(128, seed=2000 + seed)
        clipped, cpi = (per_response(loss, exact_logprobs(theta), OLD_LOGPROBS, A_OLD)
                        for loss in (partial(policy_loss, clip=0.2), cpi_loss))
        assert (-clipped <= -cpi + 1e-14).all() and (-clipped < -cpi).any()
        promised_too_much += -mean(clipped) > J(theta) - J(OLD) + 1e-3
    assert promised_too_much > 0


@pytest.mark.parametrize("lr, end", [(0.1, 1.254), (1, 1.901), (5, 3.921)])
def test_t27a_clip_does_not_bound_the_ratio_of_one_token(lr, end):
    """Softmax over four tokens, A = 1, clip 0.2: the step that crosses 1.2 overshoots and nothing ever pulls back."""
    theta, old = torch.zeros(V, dtype=torch.float64), torch.full((1, 1), math.log(0.25), dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    for _ in range(50):
        slope = gradient(lambda x: policy_loss(x.log_softmax(0)[:1, None], old, one.double(), one, clip=0.2)[0], theta)
        theta = theta - lr * slope
    ratio = theta.softmax(0)[0].item() / 0.25
    assert ratio > 1.2 and (slope == 0).all() and abs(ratio - end) <= 5e-4  # as many digits as the numbers have


def test_t27b_shared_weights_carry_a_clipped_token_further():
    """No overshoot here: no ratio moves by more than 0.03 in a step. Yet one whose own gradient ends at 1.2 goes on to
    1.35 with the gradients of other states."""
    theta, ratio = OLD, torch.ones(N, R)
    for _ in range(60):
        theta = theta + 0.02 * step(partial(policy_loss, clip=0.2), theta, OLD_LOGPROBS, A_OLD)
        before, ratio = ratio, log_ratio(exact_logprobs(theta), OLD_LOGPROBS, MASK).exp()
        assert gap(ratio, before) <= 0.03
    assert ratio[MASK & (A_OLD > 0)].max() > 1.35


def test_t28a_the_squared_error_is_least_at_the_value_function():
    """argmin over functions of the state of E[(V - G)^2] = E[G | s]; one Newton step is exact on a quadratic."""
    def loss(v):
        return mean(per_response(value_loss, padded(VISITS @ v), table(STATE, seed=27), G, clip=None))

    start = torch.zeros(VISITS.size(2), dtype=torch.float64)
    best = start - torch.linalg.solve(hessian(loss, start), gradient(loss, start))
    assert gap(padded(VISITS @ best), V_OLD) <= 1e-12


def test_t28b_the_entropy_needs_the_whole_vocabulary_for_a_gradient():
    """H(s) = E[-log pi | s], but differentiating -log pi of samples gives 0 where grad H = E[-log pi grad log pi]."""
    def entropy(theta):
        return padded(score_response(Policy(theta), PROMPT_AND_TOKENS, PROMPT_LENS, R)[2])

    assert gap(entropy(OLD), given(STATE, -OLD_LOGPROBS)) <= 1e-12
    exact = gradient(lambda theta: mean(total(entropy(theta))), OLD)
    assert exact.norm() > 0.1
    assert rel(step(reinforce_loss, OLD, -OLD_LOGPROBS), exact) <= 1e-10
    assert step(lambda x, mask: (-masked_mean(x, mask), {}), OLD).norm() <= 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# T29 to T36: the KL to the reference, in the reward or in the loss

SHAPED = partial(shape_rewards, logprobs=OLD_LOGPROBS, ref_logprobs=REF_LOGPROBS, mask=MASK)  # (scores, kl_coef=)


def J_beta(theta, scores=SCORES, beta=BETA):
    """What RLHF maximises: E[score] - beta * KL(pi || ref)."""
    return P(theta) @ scores - beta * kl_of_responses(theta)


def frozen_kl(theta, **options):
    """Sum of the states' KL over the states of the old policy: the KL that a loss on a rollout can see."""
    return mean(total(kl_of_states(theta, **options)))


def test_t29_as_a_number_the_kl_in_the_reward_is_the_kl_in_the_objective():
    """E[sum of shaped rewards] = E[score] - beta * KL of responses, and that KL is the sum of the states' KLs."""
    shaped = SHAPED(SCORES, kl_coef=BETA)
    assert gap(mean(total(shaped)), J_beta(OLD)) <= 1e-12
    assert gap(frozen_kl(OLD), kl_of_responses(OLD)) <= 1e-12
    assert gap(given(STATE, kl_estimate(OLD_LOGPROBS, REF_LOGPROBS, "k1")), kl_of_states(OLD)) <= 1e-12


@pytest.mark.parametrize("objective", ["reinforce", "reward_to_go", "baseline", "gae"])
def test_t30_k1_in_the_reward_as_a_number_is_the_gradient_of_the_objective(objective):
    """E[sum_t grad log pi_t * (shaped reward-to-go - b(s_t))] = grad(E[score] - beta * KL of responses)."""
    weights, _ = token_advantages(objective, SHAPED(SCORES, kl_coef=BETA), table(STATE, seed=30), MASK, gamma=1, lam=1)
    assert rel(step(reinforce_loss, OLD, weights), gradient(J_beta, OLD)) <= 1e-10


def test_t31_k1_in_the_loss_does_nothing():
    """E[grad(log pi - log ref)] = E[grad log pi] = 0, while the true gradient is not small."""
    assert step(kl_loss, OLD, REF_LOGPROBS, kind="k1").norm() <= 1e-12
    assert gradient(kl_of_responses, OLD).norm() > 0.1
    # From the second step on it pushes away from the policy that sampled, wherever the reference is.
    assert rel(step(kl_loss, NEW, REF_LOGPROBS, kind="k1"), gradient(kl_to_old, NEW)) <= 1e-10


def test_t32_the_exact_kl_in_the_loss_ignores_the_states_to_come():
    """grad KL of responses = sum_s d(s) grad KL(s) + E[sum_t grad log pi_t * sum_{u > t} KL(s_u)]; the second part is
    missing. It is 0 for responses of one token."""
    exact, in_loss, kl = gradient(kl_of_responses, OLD), gradient(frozen_kl, OLD), kl_of_states(OLD)
    assert rel(in_loss, exact) > 0.1
    missing = step(reinforce_loss, OLD, reward_to_go(kl, MASK, gamma=1) - kl)
    assert rel(in_loss + missing, exact) <= 1e-10

    def of_one_token(theta):
        return kl_of_states(theta)[0, 0]

    k1 = torch.where(FIRST, kl_estimate(OLD_LOGPROBS, REF_LOGPROBS, "k1"), 0.0)
    assert rel(step(reinforce_loss, OLD, k1), gradient(of_one_token, OLD)) <= 1e-10


def test_t33_what_each_estimator_in_the_loss_pulls_on():
    """Per token k2 gives sum_s d(s) grad KL(pi || ref), k3 the same of KL(ref || pi), and the ratio times k1 or k3, the
    ratio differentiated too, that of k2. k2 of whole responses gives all of grad KL(pi || ref)."""
    exact = gradient(frozen_kl, OLD)
    assert rel(-step(kl_loss, OLD, REF_LOGPROBS, kind="k2"), exact) <= 1e-10
    assert rel(-step(kl_loss, OLD, REF_LOGPROBS, kind="k3"), gradient(partial(frozen_kl, forward=True), OLD)) <= 1e-10

    def weighted(x, ref, old, mask, kind):
        return masked_mean(log_ratio(x, old, mask).exp() * kl_estimate(x, ref, kind), mask), {}

    for kind in "k1", "k3":
        assert rel(-step(weighted, OLD, REF_LOGPROBS, OLD_LOGPROBS, kind=kind), exact) <= 1e-10

    # Away from the policy that sampled, the ratio keeps that gradient exact and its absence does not.
    exact_new = gradient(frozen_kl, NEW)
    for kind in "k1", "k3":
        assert rel(-step(weighted, NEW, REF_LOGPROBS, OLD_LOGPROBS, kind=kind), exact_new) <= 1e-10
    assert rel(-step(kl_loss, NEW, REF_LOGPROBS, kind="k2"), exact_new) > 0.1

    def of_whole_responses(theta):
        return mean(kl_estimate(total(logprobs(theta)), total(REF_LOGPROBS), "k2"))

    assert rel(gradient(of_whole_responses, OLD), gradient(kl_of_responses, OLD)) <= 1e-10


def test_t34_in_the_reward_only_k1_will_do():
    """E[k3 grad log pi] = grad KL(pi || ref) - grad KL(ref || pi), which cancel near the reference: at a distance h the
    true pull is O(h), that of k2 or k3 in the reward O(h^2)."""
    k3 = kl_estimate(OLD_LOGPROBS, REF_LOGPROBS, "k3")
    exact = gradient(frozen_kl, OLD) - gradient(partial(frozen_kl, forward=True), OLD)
    assert rel(step(reinforce_loss, OLD, k3), exact) <= 1e-10

    def in_the_reward(kind):
        return step(reinforce_loss, OLD, reward_to_go(kl_estimate(OLD_LOGPROBS, REF_LOGPROBS, kind), MASK, gamma=1))

    def expected_k2(theta):
        return P(theta) @ total(kl_estimate(exact_logprobs(theta), REF_LOGPROBS, "k2"))

    # The same for whole responses, with the KL to come counted in: none of them is grad KL(pi || ref).
    forward = gradient(partial(frozen_kl, forward=True), OLD)
    assert rel(in_the_reward("k3"), gradient(kl_of_responses, OLD) - forward) <= 1e-10
    assert rel(in_the_reward("k2"), gradient(expected_k2, OLD) - gradient(frozen_kl, OLD)) <= 1e-10

    def pull(kind, h):
        theta = OLD + h * (OLD - REF)  # the old policy is the reference here
        rewards = kl_estimate(exact_logprobs(theta), OLD_LOGPROBS, kind)
        return (P(theta) @ gradients(reinforce_loss, theta, reward_to_go(rewards, MASK, gamma=1))).norm().item()

    for kind, order in ("k1", 1), ("k2", 2), ("k3", 2):
        pulls = [pull(kind, h) for h in (0.01, 0.001, 0.0001)]
        assert all(abs(math.log10(a / b) - order) <= 0.1 for a, b in zip(pulls, pulls[1:]))


def test_t35_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """E[k1] = E[k3] = KL; k2 is biased; Var k3 < Var k1 here; k3 with its ratio turned round is another number."""
    k1, k2, k3 = (kl_estimate(OLD_LOGPROBS, REF_LOGPROBS, kind) for kind in ("k1", "k2", "k3"))
    exact = kl_of_responses(OLD)
    assert gap(mean(total(k1)), exact) <= 1e-12 and gap(mean(total(k3)), exact) <= 1e-12
    assert (k3[MASK] >= 0).all() and (k1[MASK] < 0).any()
    assert variance(total(k3).unsqueeze(1)) < variance(total(k1).unsqueeze(1))
    for wrong in k2, kl_estimate(REF_LOGPROBS, OLD_LOGPROBS, "k3"):
        assert gap(mean(total(wrong)), exact) > 0.01

    def stat(x, old, mask, name):  # what the losses report, from samples of the old policy
        return ratio_stats(log_ratio(x, old, mask), mask)[name], {}

    approx_kl, ratio = (mean(per_response(stat, NEW_LOGPROBS, OLD_LOGPROBS, name=name))
                        for name in ("approx_kl", "ratio_mean"))
    assert gap(approx_kl, P_OLD @ (P_OLD / P(NEW)).log()) <= 1e-12 and gap(ratio, mean(LENS.double())) <= 1e-12
    largest = ratio_stats(log_ratio(NEW_LOGPROBS, OLD_LOGPROBS, MASK), MASK)["ratio_max"]
    assert gap(largest, (NEW_LOGPROBS - OLD_LOGPROBS)[MASK].exp().max()) <= 1e-12


def test_t36a_whitening_rescales_the_kl_in_the_reward_only():
    """A constant shift and scale keep the direction of grad J_beta; the exact grad KL beside whitened advantages of the
    score alone does not, for its beta is in effect beta * std."""
    def whitened_step(kl_coef):
        advantages = whiten(reward_to_go(SHAPED(SCORES, kl_coef=kl_coef), MASK, gamma=1), MASK)
        return step(reinforce_loss, OLD, advantages)

    exact = gradient(J_beta, OLD)
    assert cosine(whitened_step(BETA), exact) >= 1 - 1e-12
    assert cosine(whitened_step(0) - BETA * gradient(kl_of_responses, OLD), exact) < 0.99


def test_t36b_lambda_below_1_discounts_the_kl_to_go():
    """GAE gives -grad KL of responses for every lambda with the exact V of the KL to go, with V = 0 only for 1."""
    rewards, exact, error = SHAPED(torch.zeros(N), kl_coef=1), -gradient(kl_of_responses, OLD), {}
    for lam in 1, 0.95, 0.5:
        for values in given(STATE, to_go(rewards)), 0 * V_OLD:
            error[lam] = rel(step(reinforce_loss, OLD, gae(rewards, values, MASK, gamma=1, lam=lam)[0]), exact)
            assert error[lam] <= 1e-10 or (lam < 1 and (values[MASK] == 0).all())
    assert 0.01 < error[0.95] < error[0.5]


def test_t36c_the_reward_keeps_charging_the_kl_of_the_old_policy():
    """-grad KL at new != old needs the log-probs of new in the reward: importance weights alone do not mend it."""
    ratio = log_ratio(NEW_LOGPROBS, OLD_LOGPROBS, MASK).sum(1, keepdim=True).exp()

    def step_with(charged):
        rewards = shape_rewards(torch.zeros(N), charged, REF_LOGPROBS, MASK, kl_coef=1)
        return step(reinforce_loss, NEW, ratio * reward_to_go(rewards, MASK, gamma=1))

    exact = -gradient(kl_of_responses, NEW)
    assert rel(step_with(NEW_LOGPROBS), exact) <= 1e-10 and rel(step_with(OLD_LOGPROBS), exact) > 0.1


def test_t36e_where_no_score_differs_whitening_forgets_kl_coef():
    """What is left of the advantages is the KL, whose price whitening divides away: 0.001 moves it as far as 1 does."""
    def advantages(kl_coef):
        return reward_to_go(SHAPED(torch.full((N,), 2.0), kl_coef=kl_coef), MASK, gamma=1)

    for kl_coef in 1e-3, 1.0:
        exact = -kl_coef * gradient(kl_of_responses, OLD)
        assert rel(step(reinforce_loss, OLD, advantages(kl_coef)), exact) <= 1e-10
    whitened = [step(reinforce_loss, OLD, whiten(advantages(kl_coef), MASK)) for kl_coef in (1e-3, 1.0)]
    assert rel(whitened[0], whitened[1]) < 0.05 and rel(whitened[0], -1e-3 * gradient(kl_of_responses, OLD)) > 100


def test_t36d_only_the_kl_in_the_reward_passes_through_the_clip():
    """A token past the clip whose score asks for more: in the reward its KL has no gradient, in the loss it pulls."""
    one, old = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), math.log(0.2), dtype=torch.float64)
    advantage = shape_rewards(torch.tensor([3.0], dtype=torch.float64), old, old - 1, one, kl_coef=1)
    new = (old + 0.5).requires_grad_()
    assert torch.autograd.grad(policy_loss(new, old, advantage, one, clip=0.2)[0], new)[0] == 0
    assert gap(torch.autograd.grad(kl_loss(new, old - 1, one, "k2")[0], new)[0], 1.5) <= 1e-14  # which is k


# ---------------------------------------------------------------------------------------------------------------------
# T37 to T39: the optimum, which is known

def optimum(scores, beta):
    """log-probs (40, R) of the best policy for J_beta, and its soft values V = beta log E_ref[e^(Q / beta)]."""
    Q, values = induction(scores.unsqueeze(1) * LAST, REF, lambda pi, q: beta * (pi @ (q / beta).exp()).log())
    return REF_LOGPROBS + (Q - values) / beta, values


BEST_LOGPROBS = optimum(SCORES, BETA)[0]
LOG_Z = (P(REF) @ (SCORES / BETA).exp()).log()  # of the closed form P_ref e^(score / beta) / Z


def test_t37_at_the_optimum_every_response_has_the_same_shaped_return():
    """The best policy is P_ref e^(score/beta) / Z with J = beta log Z; token by token it is soft backward induction.
    The shaped return is beta log Z whatever was sampled: nothing is left to prefer, and all advantages are 0."""
    assert gap(total(BEST_LOGPROBS), total(REF_LOGPROBS) + SCORES / BETA - LOG_Z) <= 1e-12
    assert gap(optimum(SCORES, BETA)[1][:, 0], BETA * LOG_Z) <= 1e-12
    rewards = shape_rewards(SCORES, BEST_LOGPROBS, REF_LOGPROBS, MASK, BETA)
    returns, _ = token_advantages("reinforce", rewards, V_OLD, MASK, gamma=1, lam=1)
    assert gap(returns, BETA * LOG_Z) <= 1e-12
    assert group_advantages(total(rewards), N, MASK).abs().max() <= 1e-12
    advantages, _ = gae(rewards, optimum(SCORES, BETA)[1], MASK, gamma=1, lam=0.95)
    assert advantages.abs().max() <= 1e-12  # the soft value is the critic that knows it


def test_t38_the_distance_to_the_optimum_is_a_kl():
    """J* - J_beta(pi) = beta * KL(pi || best)."""
    shaped = total(SHAPED(SCORES, kl_coef=BETA))
    distance = total(kl_estimate(OLD_LOGPROBS, BEST_LOGPROBS))
    assert gap(BETA * LOG_Z - shaped, BETA * distance) <= 1e-12  # so also response by response
    assert gap(BETA * LOG_Z - J_beta(OLD), BETA * mean(distance)) <= 1e-12


def test_t39_the_scale_of_the_scores_trades_off_with_beta():
    """score -> c * score is beta -> beta / c. Scores of the same ranking (their cubes) have another optimum."""
    assert gap(optimum(3 * SCORES, BETA)[0], optimum(SCORES, BETA / 3)[0]) <= 1e-12
    assert gap(SHAPED(3 * SCORES, kl_coef=BETA), 3 * SHAPED(SCORES, kl_coef=BETA / 3)) <= 1e-12
    for same_ranking in 3 * SCORES, SCORES ** 3:
        assert torch.equal(same_ranking.argsort(), SCORES.argsort())
        assert gap(optimum(same_ranking, BETA)[0], BEST_LOGPROBS) > 0.1
        g = [step(reinforce_loss, OLD, reward_to_go(SHAPED(s, kl_coef=BETA), MASK, 1)) for s in (SCORES, same_ranking)]
        assert cosine(*g) < 0.99


# ---------------------------------------------------------------------------------------------------------------------
# T40 and up: what stands in ppo.py beside the main line

def test_t40_the_penalty_is_the_exact_kl_from_the_old_policy_to_the_new():
    """Expected gradient of kl_penalty_loss = that of CPI - coef * grad KL(old || pi), also away from the old policy."""
    penalised, cpi = (step(loss, NEW, OLD_LOGPROBS, A_OLD) for loss in (RATIO_LOSSES["kl_penalty"], cpi_loss))

    def forward(theta):
        return P_OLD @ (P_OLD / P(theta)).log()

    def backward(theta):
        return P(theta) @ (P(theta) / P_OLD).log()

    assert rel(penalised, cpi - 0.7 * gradient(forward, NEW)) <= 1e-10
    assert rel(penalised, cpi - 0.7 * gradient(backward, NEW)) > 0.01
    lost = mean(per_response(RATIO_LOSSES["kl_penalty"], NEW_LOGPROBS, OLD_LOGPROBS, A_OLD))
    assert gap(lost, -surrogate(NEW) + 0.7 * forward(NEW)) <= 1e-12


def test_t41_the_penalty_controller_keeps_the_kl_near_its_target():
    """A natural step of 1 / coef has KL ~ 1 / coef^2, so doubling quarters it: from above the KL lands in [3/8, 3/2] of
    the target, from below in [2/3, 8/3]. It rests in [2/3, 3/2], which a factor 4 can jump: from 1/2 it swings on."""
    natural, target = natural_gradient(), 1e-5
    swinging = (gradient(J, OLD) @ natural / target).sqrt().item()  # KL = g^T F^+ g / (2 coef^2) = target / 2
    for start in 1.0, 1e6, swinging:
        controller, kls = PenaltyController(target, start), []
        for _ in range(40):
            kls.append(kl_to_old(OLD + natural / controller.value).item() / target)
            controller.update(kls[-1] * target)
        assert all(0.95 * 3 / 8 <= kl <= 1.05 * 8 / 3 for kl in kls[-10:])
    assert kls[-1] > 1.9 and kls[-2] < 0.6 and kls[0] == kls[-2] and kls[1] == kls[-1]
    for kl, coef in (15.1, 2), (14.9, 1), (6.7, 1), (6.6, 0.5):
        controller = PenaltyController(target=10)
        controller.update(kl)
        assert controller.value == coef


def test_t42_the_kl_controller_finds_the_beta_of_the_target_kl():
    """KL(best policy of beta || ref) falls with beta, so raising beta where the KL is too high is negative feedback."""
    def kl_of_best(beta):
        log_p, _ = optimum(SCORES, beta)
        return (total(log_p).exp() @ total(log_p - REF_LOGPROBS)).item()

    kls = [kl_of_best(beta) for beta in (0.25, 0.5, 1, 2, 4)]
    assert kls == sorted(kls, reverse=True)
    for start in 0.1, 5.0:
        controller = KLController(start, target=kls[2], horizon=100)
        for _ in range(150):
            controller.update(kl_of_best(controller.value), n_episodes=50)
        assert abs(controller.value - 1) <= 1e-6
    # The rule itself: the relative error, clipped to 0.2, once per horizon of episodes; without a target, nothing.
    for kl, target, factor in (30, 10, 1.1), (11, 10, 1.05), (0, 10, 0.9), (30, None, 1):
        controller = KLController(2.0, target, horizon=100)
        controller.update(kl, n_episodes=50)
        assert controller.value == pytest.approx(2 * factor, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_t43_a_group_is_a_baseline_if_each_one_leaves_itself_out(k):
    """Over all groups of k independent responses: E = grad E[score]. Had the mean its own score in it, the gradient
    would be (k - 1) / k of that. Within a group the advantages sum to 0."""
    groups = torch.cartesian_prod(*[torch.arange(N)] * k)  # (40^k, k)
    advantages = group_advantages(SCORES[groups].flatten(), k, MASK[groups].view(-1, R)).view(-1, k, R)
    assert advantages[:, :, 0].sum(1).abs().max() <= 1e-12
    mates = P_OLD[groups[:, 1:]].prod(1).view(N, -1, 1)
    weights = (mates * advantages[:, 0].view(N, -1, R)).sum(1)  # of a response, expected over its mates
    with_itself = SCORES[groups] - SCORES[groups].mean(1, keepdim=True)
    diluted = (mates * with_itself[:, :1].view(N, -1, 1)).sum(1).expand(N, R)
    exact = gradient(lambda theta: P(theta) @ SCORES, OLD)
    assert rel(step(reinforce_loss, OLD, weights), exact) <= 1e-10
    assert rel(step(reinforce_loss, OLD, diluted), (k - 1) / k * exact) <= 1e-10
    rewards, mask = (x[groups].view(-1, R) for x in (padded(SCORES.unsqueeze(1) * LAST), MASK))
    on_the_ladder, _ = token_advantages("clip", rewards, rewards, mask, gamma=1, lam=0.5, group_size=k)
    assert gap(on_the_ladder, advantages.view(-1, R)) <= 1e-12


def test_t44_whitening_is_a_constant_baseline_and_a_step_size():
    """E[sum_t (A - m) / s * grad log pi] = grad J / s, with the mean and the biased variance of the tokens given."""
    x = G[MASK]
    s = (x.var(unbiased=False) + 1e-8).sqrt()
    assert rel(step(reinforce_loss, OLD, whiten(G, MASK)), gradient(J, OLD) / s) <= 1e-10
    assert gap(whiten(G, MASK), (G - x.mean()) / s) <= 1e-12
    assert gap(whiten(G, MASK, shift_mean=False), (G - x.mean()) / s + x.mean()) <= 1e-12
    assert gap(whiten(3 * G + 7, MASK), whiten(G, MASK)) <= 1e-6  # the 1e-8 is all that is left of the scale


def test_t45_explained_variance_of_the_exact_value():
    """Where all 40 responses are equally likely: V = E[G | s] has 1 - EV = E[Var(G | s)] / Var(G) by the law of total
    variance, and no other function of the state has more."""
    fit = given(STATE, G, probs=torch.full((N,), 1 / N, dtype=torch.float64))
    left = (G - fit)[MASK].square().mean() / G[MASK].var(unbiased=False)
    best = explained_variance(fit, G, MASK)
    assert gap(best, 1 - left) <= 1e-12 and 0 < best < 1
    assert gap(explained_variance(fit + 3, G, MASK), best) <= 1e-12  # right up to a constant
    for values in table(STATE, seed=40), 0.9 * fit, 1.1 * fit:
        assert explained_variance(values, G, MASK) < best
    assert explained_variance(0 * G, G, MASK) == 0 and explained_variance(G, G, MASK) == 1
    assert gap(explained_variance(-G, G, MASK), -3.0) <= 1e-12


OPTIONS = {"clip": 0.2, "penalty": 0.7}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_t46_a_loss_is_a_mean_over_tokens_and_not_over_responses(objective):
    """Loss of a batch = sum over responses of n * loss of each / number of tokens, as `per_response` presumes."""
    loss = partial(surrogate_loss, objective, **OPTIONS)
    alone = per_response(loss, NEW_LOGPROBS, OLD_LOGPROBS, A_OLD)
    assert gap(loss(NEW_LOGPROBS, OLD_LOGPROBS, A_OLD, MASK)[0], alone.sum() / MASK.sum()) <= 1e-12
    each = gradients(loss, OLD, OLD_LOGPROBS, A_OLD)
    assert cosine(mean(each / LENS.unsqueeze(1)), gradient(J, OLD)) < 0.999


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_t47_all_rungs_have_the_gradient_of_j_at_the_old_policy(objective):
    """With gamma = 1 and the exact V, for any lambda. What the critic is fitted to has the mean V in each state."""
    weights, returns = token_advantages(objective, REWARDS, V_OLD, MASK, gamma=1, lam=0.7)
    loss = partial(surrogate_loss, objective, **OPTIONS)
    assert rel(step(loss, OLD, OLD_LOGPROBS, weights), gradient(J, OLD)) <= 1e-10
    assert gap(given(STATE, returns), V_OLD) <= 1e-12


def test_t48_elsewhere_four_rungs_ignore_the_ratio_and_three_differ():
    """Hence one step per rollout for the first four: taken again at new, log pi no longer has the gradient of J."""
    steps = {name: step(partial(surrogate_loss, name, **OPTIONS), NEW, OLD_LOGPROBS, A_OLD) for name in OBJECTIVES}
    for name in OBJECTIVES[:4]:
        assert torch.equal(steps[name], step(reinforce_loss, NEW, A_OLD))
    for name, loss in RATIO_LOSSES.items():
        assert torch.equal(steps[name], step(loss, NEW, OLD_LOGPROBS, A_OLD))
    different = ["reinforce", *RATIO_LOSSES]
    assert all(rel(steps[a], steps[b]) > 0.01 for a in different for b in different if a != b)


def test_t49_value_clipping_moves_the_optimum_of_the_critic():
    """The clipped loss is an upper bound of the squared error, with the same gradient at the old values; but where V is
    further than the clip from them, V = E[G | s] no longer has gradient 0."""
    def loss(values, old, clip):
        return mean(per_response(value_loss, values, old, G, clip=clip))

    old = V_OLD + table(STATE, seed=41)
    for values in V_OLD, G, table(STATE, seed=42):
        pair = [per_response(value_loss, values, old, G, clip=clip) for clip in (0.2, None)]
        assert (pair[0] >= pair[1]).all() and (pair[0] > pair[1]).any()
    at_old = [gradient(lambda v: loss(v, old, clip), old) for clip in (0.2, None)]
    assert gap(*at_old) <= 1e-14

    slopes = [torch.einsum("nt,nts->s", gradient(lambda v: loss(v, old, clip), V_OLD), VISITS) for clip in (0.2, None)]
    assert slopes[0].abs().max() > 0.01 and slopes[1].abs().max() <= 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_t50a_no_gradient_flows_through_advantages_and_old_logprobs(objective):
    """-E[loss] still has the gradient of J with log pi itself for log pi_old, and with a V in the advantages that has
    the policy's weights: the ratio keeps its slope, and the baseline stays a baseline."""
    def loss(theta):
        new, values, _ = score_response(Policy(theta), PROMPT_AND_TOKENS, PROMPT_LENS, R)
        return mean(per_response(partial(surrogate_loss, objective, **OPTIONS), padded(new), padded(new), G - values))

    assert rel(-gradient(loss, OLD), gradient(J, OLD)) <= 1e-10


def test_t50b_the_critic_moves_towards_a_target_that_stands_still():
    """Gradient of (V - (A + V))^2 / 2 = -A, although the target is made of V."""
    values = table(STATE, seed=43).requires_grad_()
    advantages, returns = gae(REWARDS, values, MASK, gamma=1, lam=0.5)
    assert not advantages.requires_grad and not returns.requires_grad
    for clip in None, 0.2:
        losses = per_response(value_loss, values, values, advantages + values, clip=clip)
        assert gap(torch.autograd.grad(losses.sum(), values)[0], -advantages) <= 1e-14


def test_t51_a_smaller_beta_raises_what_correlates_with_the_score():
    """Along the optima, eta = 1 / beta: d E[g] / d eta = Cov(g, score), and d KL / d eta = eta * Var(score)."""
    def moments(eta, g):
        best = total(optimum(SCORES, 1 / eta)[0])
        p = best.exp()
        return p @ g, p @ total(kl_estimate(optimum(SCORES, 1 / eta)[0], REF_LOGPROBS)), p

    g, eta, h = randn(N, seed=50), 1.4, 1e-5
    (g_up, kl_up, _), (g_down, kl_down, _), (_, _, p) = (moments(e, g) for e in (eta + h, eta - h, eta))
    assert gap((g_up - g_down) / (2 * h), p @ (g * SCORES) - (p @ g) * (p @ SCORES)) <= 1e-8
    assert gap((kl_up - kl_down) / (2 * h), eta * (p @ SCORES ** 2 - (p @ SCORES) ** 2)) <= 1e-8


def test_t52_the_kl_of_best_of_n_is_below_its_formula():
    """KL(best of n || ref) < log n - (n - 1) / n wherever answers have a probability of their own, and the two agree in
    the limit of answers that have none."""
    reference = P(REF)[SCORES.argsort()].numpy()
    for n in 2, 4, 16, 64:
        formula = math.log(n) - (n - 1) / n
        assert 0 < best_of_n_kl(reference, n) < formula
        assert abs(best_of_n_kl(np.full(100_000, 1e-5), n) - formula) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# T53: which mean over tokens is the gradient of J

CENTRED = padded((SCORES - P_OLD @ SCORES).unsqueeze(1).expand(N, R))  # what each token weighs: score - E[score]
J_SCORES, MEAN_LEN = gradient(lambda theta: P(theta) @ SCORES, OLD), mean(LENS.double())


def minibatch_step(loss, size, weights=CENTRED):
    """(128,): minus the gradient of the loss of a whole minibatch, expected over all minibatches of that size."""
    rows, probs = enumerate_batches(P_OLD, size)

    def expected(theta):
        x = logprobs(theta)
        return probs @ torch.vmap(lambda batch: loss(x[batch], weights[batch], MASK[batch])[0])(rows)

    return -gradient(expected, OLD)


def constant_loss(logprobs, weights, mask):
    """The sum over tokens / R tokens for each response, whatever its length."""
    return reinforce_loss(logprobs, weights, mask)[0] * mask.sum() / mask.numel(), {}


def response_loss(logprobs, weights, mask):
    """The mean over responses of each one's mean over tokens."""
    each = torch.vmap(lambda *row: reinforce_loss(*(x.unsqueeze(0) for x in row))[0])(logprobs, weights, mask)
    return each.mean(), {}


def token_mean_factor(size):
    """B E[1 / (n + lengths of B - 1 others)] of each response (40,), for minibatches of any size B."""
    lengths, others = torch.zeros(R + 1).double().index_add(0, LENS, P_OLD).numpy(), np.ones(1)
    for _ in range(size - 1):
        others = np.convolve(others, lengths)
    return torch.tensor([size * (others / (n + np.arange(len(others)))).sum() for n in LENS.tolist()])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_t53a_a_constant_divisor_is_the_gradient_of_j_and_no_other_is(size):
    """For minibatches of any size: grad J / R. With the other two the cosine is below 1."""
    assert rel(minibatch_step(constant_loss, size), J_SCORES / R) <= 1e-10
    for loss in response_loss, reinforce_loss:
        assert cosine(minibatch_step(loss, size), J_SCORES) < 0.99


def test_t53b_the_mean_per_response_maximises_the_score_per_token():
    """grad E[(score - b) / n], for minibatches of any size, with a cosine of 0.82 to grad E[score]. b matters."""
    def per_token(b):
        return gradient(lambda theta: P(theta) @ ((SCORES - b) / LENS), OLD)

    for size in 1, 2, 3:
        assert rel(minibatch_step(response_loss, size), per_token(P_OLD @ SCORES)) <= 1e-10
    assert rel(minibatch_step(reinforce_loss, 1), per_token(P_OLD @ SCORES)) <= 1e-10  # the token mean of one response
    assert round(cosine(per_token(P_OLD @ SCORES), J_SCORES), 2) == 0.82
    assert rel(minibatch_step(response_loss, 1, CENTRED + 5), per_token(P_OLD @ SCORES - 5)) <= 1e-10
    assert round(cosine(per_token(P_OLD @ SCORES - 5), J_SCORES), 2) == 0.31  # nearly all are good: shorter is better
    assert rel(minibatch_step(constant_loss, 1, CENTRED + 5), J_SCORES / R) <= 1e-10


def test_t53c_the_token_mean_of_a_minibatch_is_off_by_one_over_its_size():
    """grad E[(score - b) v(n)] with the factor v above. The docs' numbers, and B * bias -> (IV.5)."""
    each, cv = gradients(reinforce_loss, OLD, CENTRED), variance(LENS.double().unsqueeze(1)) ** 0.5 / MEAN_LEN
    for size in 1, 2, 3:
        step = mean(token_mean_factor(size).unsqueeze(1) * each)
        assert rel(minibatch_step(reinforce_loss, size), step) <= 1e-10
    rows, probs = enumerate_batches(P_OLD, 3)
    assert gap(probs.sum(), 1.0) <= 1e-12 and gap(probs @ LENS[rows].double().sum(1), 3 * MEAN_LEN) <= 1e-12

    bias = {}
    for size, relative, angle in [(1, 1, 0.18), (2, 0.37, 0.038), (4, 0.15, 0.0076), (16, 0.034, 4e-4),
                                  (64, 0.0082, 2.4e-5), (256, 0.002, 1.5e-6)]:
        step = MEAN_LEN * mean(token_mean_factor(size).unsqueeze(1) * each)
        bias[size] = step - J_SCORES
        assert float(f"{rel(step, J_SCORES):.2g}") == relative and float(f"{1 - cosine(step, J_SCORES):.2g}") == angle
        assert bias[size].norm() <= cv / size ** 0.5 * (variance(each) / size) ** 0.5
    limit = cv ** 2 * J_SCORES - mean((LENS / MEAN_LEN - 1).unsqueeze(1) * each)
    assert rel(256 * bias[256], limit) < 0.01
    assert float(f"{bias[64].norm() / (variance(each) / 64) ** 0.5:.2g}") == 0.012  # of a standard error

    to_come = to_go(SHAPED(SCORES, kl_coef=0))
    each = gradients(reinforce_loss, OLD, given(NODE, to_come) - given(STATE, to_come))
    for size, relative in (1, 0.95), (64, 0.007):
        step = MEAN_LEN * mean(token_mean_factor(size).unsqueeze(1) * each)
        assert float(f"{rel(step, J_SCORES):.2g}") == relative


def test_t53d_whitening_over_the_minibatch_itself_is_off_by_more():
    """Its m and s hold the responses' own advantages. The docs' cosines of three responses, divided both ways."""
    def whitened(loss):
        return lambda logprobs, weights, mask: loss(logprobs, whiten(weights, mask), mask)

    losses = reinforce_loss, whitened(reinforce_loss), whitened(constant_loss)
    two, three = ([cosine(minibatch_step(loss, size), J_SCORES) for loss in losses] for size in (2, 3))
    assert [round(value, 3) for value in three] == [0.985, 0.928, 0.977]
    assert all(1 - b < 0.6 * (1 - a) for a, b in zip(two, three))  # it falls with the size


def test_t53e_the_recipes_make_the_loop_divide_otherwise():
    """The docs' two lines, on one of two minibatches, in micro-batches of 7, and in the loop's own names."""
    page = (ROOT / "docs/derivation.md").read_text()
    by_length, by_responses = re.findall("^(?:advantages|pg_loss) = .*$", page, re.MULTILINE)
    names = {name for line in (by_length, by_responses) for name in compile(line, "", "exec").co_names}
    assert names - {"sum", "minibatches"} <= {*loop.__code__.co_varnames, *loop.__code__.co_cellvars}
    minibatch = torch.arange(N)[::2]

    def divided(lines, theta):
        state = {"config": SimpleNamespace(minibatches=2), "mask": MASK, "B": N, "advantages": CENTRED}
        loss = 0.0
        for line in lines[:-1]:
            exec(line, state)
        for rows in minibatch.split(7):
            x, fraction = logprobs(theta)[rows], MASK[rows].sum() / MASK[minibatch].sum()
            pg_loss, _ = policy_loss(x, OLD_LOGPROBS[rows], state["advantages"][rows], MASK[rows], clip=0.2)
            state |= {"rows": rows, "token_fraction": fraction, "pg_loss": pg_loss}
            exec(lines[-1], state)
            loss = loss + state["pg_loss"] * fraction
        return loss

    for lines, divisor, loss in (([by_responses], R, constant_loss), ([by_length, by_responses], 1, response_loss)):
        expected = gradient(lambda theta: loss(logprobs(theta)[minibatch], CENTRED[minibatch], MASK[minibatch])[0], OLD)
        assert rel(gradient(partial(divided, lines), OLD) / divisor, expected) <= 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# T54 to T57: small errors of the field

def test_t54_the_policy_loss_starts_at_0_whatever_there_is_to_learn():
    """Whitened advantages have mean 0 and every ratio is 1: 0 for any scores, and for their opposite. The gradient is
    not 0, and a step of h along it lowers the loss by h times its squared length."""
    for scores in SCORES, -SCORES, 100 * SCORES:
        advantages = whiten(reward_to_go(SHAPED(scores, kl_coef=BETA), MASK, gamma=1), MASK)

        def loss(theta):
            return policy_loss(logprobs(theta), OLD_LOGPROBS, advantages, MASK, clip=0.2)[0]

        slope = gradient(loss, OLD)
        assert abs(loss(OLD)) <= 1e-12 and slope.norm() > 0.1
        assert rel(slope, gradient(lambda theta: reinforce_loss(logprobs(theta), advantages, MASK)[0], OLD)) <= 1e-10
        assert loss(OLD - 1e-4 * slope) / (1e-4 * slope @ slope) == pytest.approx(-1, abs=1e-2)


def test_t55_k3_upside_down_estimates_chi_squared_minus_the_kl():
    """E[e^k - 1 - k] = chi^2(pi || ref) - KL(pi || ref), state by state; as a loss it pulls by half of grad chi^2."""
    def chi2_of_states(theta):
        return padded((2 * all_logprobs(theta) - all_logprobs(REF)).exp().sum(2) - 1)

    turned = kl_estimate(REF_LOGPROBS, OLD_LOGPROBS, "k3")
    assert gap(given(STATE, turned), chi2_of_states(OLD) - kl_of_states(OLD)) <= 1e-12

    def turned_loss(x, ref, mask):
        return kl_loss(ref, x, mask, "k3")

    half = 0.5 * gradient(lambda theta: mean(total(chi2_of_states(theta))), OLD)
    assert rel(-step(turned_loss, OLD, REF_LOGPROBS), half) <= 1e-10

    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.9, 0.1], [0.01, 0.99]))  # the docs' example
    right, wrong = (p @ kl_estimate(*pair, "k3") for pair in ((p.log(), q.log()), (q.log(), p.log())))
    assert f"{right:.2f} {wrong:.1f}" == "3.82 76.2"


def test_t56_another_sampler_costs_no_more_than_its_gap():
    """Responses of a sampler that is not quite pi_old: |E[gradient] - grad J| <= (e^(n gap) - 1) E|gradient|. Weighing
    each response by its ratio is exact; each token by its own leaves the sampler's states."""
    each, exact, errors = gradients(reinforce_loss, OLD, A_OLD), gradient(J, OLD), []
    for h in 1e-1, 1e-3, 1e-5:
        sampler = OLD + h * (NEW - OLD)
        log_r = OLD_LOGPROBS - exact_logprobs(sampler)
        errors.append((P(sampler) @ each - exact).norm())
        assert errors[-1] <= torch.expm1(R * log_r[MASK].abs().max()) * mean(each.norm(dim=1))
        assert rel(P(sampler) @ (total(log_r).exp().unsqueeze(1) * each), exact) <= 1e-10
        by_token = P(sampler) @ gradients(reinforce_loss, OLD, log_r.exp() * A_OLD)
        assert 0.01 * errors[-1] < (by_token - exact).norm() < 0.9 * errors[-1]
    assert all(90 < larger / smaller < 110 for larger, smaller in zip(errors, errors[1:]))


# Four prompts, one token each, and which answers to them are right: all of them, and with probability 0.95, 0.29, 0.09.
RIGHT = (randn(V, N, seed=60) > torch.tensor([[-9], [-0.5], [0.5], [1.5]])).double()


def answers(prompt, theta):
    """log pi (40, R) of the responses to a prompt."""
    return padded(score_response(Policy(theta), F.pad(TOKENS, (1, 0), value=prompt), PROMPT_LENS, R)[0])


def share_and_step(k, kl_coef=0.0, critic=False, everything=False):
    """Share of the groups of k that have a right answer and a wrong one, and the expected gradient of such a group: the
    mean over its responses of advantage * grad log pi. The KL is in the reward."""
    share, step = 0.0, 0.0
    for prompt, right in enumerate(RIGHT):
        old, ref = total(answers(prompt, OLD)), total(answers(prompt, REF))
        rows, probs = enumerate_batches(old.exp(), k)
        mixed = right[rows].amax(1) > right[rows].amin(1)
        probs = (probs * (mixed | everything) / V).unsqueeze(1)
        returns = (right - kl_coef * (old - ref))[rows]
        others = group_advantages(returns.flatten(), k, torch.ones(rows.numel(), 1, dtype=torch.bool)).view(-1, k)
        advantages = returns - old.exp() @ (right - kl_coef * (old - ref)) if critic else others
        weights = torch.zeros(N).double().index_add(0, rows.flatten(), (probs * advantages / k).flatten())
        share += probs.sum()
        step += gradient(lambda theta: weights @ total(answers(prompt, theta)), OLD)
    return share, step / share


def of_prompts(f):
    """Gradient of the mean over prompts of f(probability of a right answer, KL to the reference)."""
    def objective(theta):
        rows = [(total(answers(prompt, theta)), total(answers(prompt, REF))) for prompt in range(V)]
        return sum(f(p.exp() @ right, p.exp() @ (p - ref)) for (p, ref), right in zip(rows, RIGHT)) / V

    return gradient(objective, OLD)


@pytest.mark.parametrize("k", [2, 3])
def test_t57a_drawing_again_for_equal_scores_is_a_step_size_without_a_kl(k):
    """Leave-one-out advantages are 0 in the groups that are left out: grad J / share of the others, not another J."""
    share, kept = share_and_step(k)
    assert share < 0.3 and rel(share * kept, of_prompts(lambda p, kl: p)) <= 1e-10
    # With a KL in the reward the groups that are left out had a gradient, too.
    exact = of_prompts(lambda p, kl: p - 0.2 * kl)
    assert rel(share_and_step(k, 0.2, everything=True)[1], exact) <= 1e-10
    assert rel(share * share_and_step(k, 0.2)[1], exact) > 0.2


def test_t57b_beside_a_critic_or_a_kl_drawing_again_has_another_objective():
    """With V(x) for a baseline and groups of 2: the mean of p - p^2 + 2 p^3 / 3 over prompts. The docs' numbers."""
    (share, kept), exact = share_and_step(2, critic=True), of_prompts(lambda p, kl: p)
    assert rel(share * kept, of_prompts(lambda p, kl: p - p ** 2 + 2 * p ** 3 / 3)) <= 1e-10
    assert [round(x, 2) for x in (share.item(), cosine(kept, exact), rel(share * kept, exact))] == [0.17, 0.99, 0.37]
    _, kept = share_and_step(2, kl_coef=0.2)
    assert round(cosine(kept, of_prompts(lambda p, kl: p - 0.2 * kl)), 2) == 0.76


# ---------------------------------------------------------------------------------------------------------------------
# Break -> the tests that it turns red, the first four of them. Each break was made alone, in a copy of its module.
#
# zero_outside: x * mask instead of where -> T3 T5 T6 T7 ...
# masked_mean: over slots, not over True -> T3 T4 T6 T7 ...; over rows, not over tokens -> T3 T4 T6 T7 ...; mean of
#     the rows' means -> T7 T44 T45 T46 T53a T53c T53d T53e
# whiten: unbiased variance -> T44; the mean stays -> T44 T53d T54; shift_mean inverted -> T44; variance, not its
#     root -> T44 T53d T54
# explained_variance: squared error instead of variance -> T45; divided by Var(values) -> T45
# kl_estimate: k1 turned round -> T29 T30 T32 T33 ...; k2 without its half -> T33 T36d; k3 inverted -> T33 T34 T35 T55;
#     k3 without + k -> T33 T34 T35 T55
# shape_rewards: sign of the KL -> T29 T30 T36a T36b ...; k2 in the reward -> T29 T30 T36a T36b ...; k3 in the
#     reward -> T30 T36a T36b T36c ...; score one token after the last -> T3 T8 T29 T30 ...; score one token
#     early -> T3 T8 T10 T29 ...; score in the last column -> T3 T8 T29 T30 ...; score on every
#     token -> T3 T8 T10 T29 ...; no detach -> T8
# KLController: sign of the error -> T42; moves without a target -> T42; error not relative -> T42; error not
#     clipped -> T42; number of episodes ignored -> T42
# PenaltyController: halves and doubles swapped -> T41; 1.5 left out above -> T41; 1.5 left out below -> T41
# reward_to_go: gamma on the reward -> T3 T5 T16; gamma left out -> T3 T5 T16; forwards in time -> T3 T5 T6 T7 ...
# gae: gamma left out before V_{t+1} -> T16 T17; V_{t+1} left out -> T11 T13 T14 T15 ...; lambda left
#     out -> T13 T14 T15 T17 ...; gamma left out before A_{t+1} -> T16 T17; lambda on the TD
#     error -> T13 T14 T15 T17 ...; bootstraps from V after the last token -> T11 T12 T13 T15 ...; returns without +
#     values -> T18 T47; values not detached -> T50b
# group_advantages: the own score in the mean -> T43 T57a; divided by k -> T37 T43; groups of the whole batch -> T43
# log_ratio: turned round -> T20 T21a T22 T23 ...; logprobs detached -> T21a T21b T22 T24 ...; clamped at
#     0.2 -> T20 T24 T25b T26a ...; old_logprobs not detached -> T50a
# ratio_stats: approx_kl of the other direction -> T35; approx_kl by k2 -> T35; ratio_max is the minimum -> T21a T35;
#     ratio_mean of the log -> T35
# reinforce_loss: sign -> T3 T6 T7 T8 ...; probability instead of log -> T3 T4 T6 T7 ...; weights not detached -> T50a
# cpi_loss: log-ratio instead of ratio -> T20 T21b T26a T26b ...; sign -> T20 T21a T22 T23 ...; advantages not
#     detached -> T50a
# kl_penalty_loss: penalty added -> T24 T25b T40 T41; KL of the other direction -> T24 T40; k2 -> T24 T40; without
#     coef -> T40; advantages not detached -> T50a
# policy_loss: max instead of min -> T26a T26b T27a T27b ...; clipped only -> T26a T26b; no
#     clip -> T26a T26b T27a T27b ...; clamp around 0 -> T21a T26a T27a T47; one-sided clamp -> T26a; clip_frac counts
#     the other side -> T26a; advantages not detached -> T50a
# value_loss: min instead of max -> T49; without clip fits the old values -> T28a T49; absolute error -> T28a T49;
#     clipped only -> T49; clips around 0 -> T49; returns not detached -> T50b
# token_advantages: reinforce gets reward-to-go -> T3 T10 T16 T37; reward_to_go gets the whole return -> T10 T16;
#     baseline with lam -> T11; gae with lambda 1 -> T14; critic fitted to the advantages -> T14 T47; group
#     ignored -> T43
# surrogate_loss: cpi is clipped -> T48; kl_penalty is cpi -> T48; clip is cpi -> T48; first four by the ratio -> T48
# bradley_terry_loss: sign -> T2a T2b; depends on the zero -> T1 T2a T2b; hinge -> T2a T2b; sum over pairs -> T2a
# generate: greedy -> T7; samples at another temperature than it records -> T7; EOS outside the mask -> T7; one random
#     number for the batch -> T7
# score_response: log-probs of the token before -> T3 T4 T6 T7 ...; states one position late -> T3 T4 T6 T7 ...; no
#     gradient -> T3 T4 T6 T7 ...; entropy of the sampled token -> T28b
#
# And for each test the break that turns the fewest others red with it.
#
# T1 <- bradley_terry_loss: depends on the zero; T2a <- bradley_terry_loss: sum over pairs; T2b <- bradley_terry_loss:
# hinge; T3 T5 <- reward_to_go: gamma left out; T4 <- reinforce_loss: probability instead of log; T6 T9 <-
# reward_to_go: forwards in time; T7 <- generate: EOS outside the mask; T8 <- shape_rewards: no detach; T10 <-
# token_advantages: reward_to_go gets the whole return; T11 <- token_advantages: baseline with lam; T12 <- gae:
# bootstraps from V after the last token; T13 T15 T19 T36b <- gae: lambda left out; T14 <- token_advantages: gae with
# lambda 1; T16 T17 <- gae: gamma left out before A_{t+1}; T18 T47 <- gae: returns without + values; T20 T21b <-
# cpi_loss: log-ratio instead of ratio; T21a <- ratio_stats: ratio_max is the minimum; T22 T23 T25a <- cpi_loss: sign;
# T24 <- kl_penalty_loss: KL of the other direction; T25b <- kl_penalty_loss: penalty added; T26a <- policy_loss:
# clip_frac counts the other side; T26b <- policy_loss: clipped only; T27a <- policy_loss: clamp around 0; T27b <-
# policy_loss: max instead of min; T28a <- value_loss: absolute error; T28b <- score_response: entropy of the sampled
# token; T29 <- shape_rewards: k2 in the reward; T30 T36a T36c T38 <- shape_rewards: k3 in the reward; T31 T32 T51 <-
# kl_estimate: k1 turned round; T33 T36d <- kl_estimate: k2 without its half; T34 <- kl_estimate: k3 inverted; T35 <-
# ratio_stats: approx_kl by k2; T37 <- group_advantages: divided by k; T39 <- shape_rewards: score one token after the
# last; T40 <- kl_penalty_loss: without coef; T41 <- PenaltyController: 1.5 left out above; T42 <- KLController: error
# not clipped; T43 <- group_advantages: groups of the whole batch; T44 <- whiten: shift_mean inverted; T45 <-
# explained_variance: divided by Var(values); T46 <- masked_mean: mean of the rows' means; T48 <- surrogate_loss: clip
# is cpi; T49 <- value_loss: clipped only; T50a <- cpi_loss: advantages not detached; T50b <- gae: values not
# detached; T52 <- best_of_n_kl (experiments/overoptimization.py): n + 1; T53a T53c <- masked_mean: mean of the rows'
# means; T53b T56 <- reinforce_loss: probability instead of log; T53d T54 <- whiten: the mean stays; T53e <- the loop's
# token_fraction renamed; T55 <- kl_estimate: k3 inverted; T57a <- group_advantages: the own score in the mean; T57b <-
# enumerate_batches (tests/enumerable.py): each order once
