"""
The mathematics of PPO for language models: tensors in, tensors out. No model, no file, no random number.

Shapes: B responses, each padded on the right to R tokens. `mask` (B, R) is True on the tokens that the policy
sampled, EOS included; where it is False, inputs may hold anything (NaN too) and nothing depends on them, and
outputs are 0. `scores` is one number per response (B,), `rewards` one per token (B, R). Every loss is a mean over
the True tokens of the tensors it is given, is to be minimised, and comes as (scalar, stats of detached scalars).

Sources: [PG] Sutton et al. 2000; [GAE] Schulman et al. 2016, 1506.02438; [TRPO] Schulman et al. 2015, 1502.05477;
[PPO] Schulman et al. 2017, 1707.06347; [Z19] Ziegler et al. 2019, 1909.08593; [K3] Schulman 2020,
joschu.net/blog/kl-approx.
"""

import torch

# exp() of a larger log-ratio overflows float32, and inf * 0 is NaN. No healthy run comes near e^80: the cap only keeps
# a broken one finite and visible.
MAX_LOG_RATIO = 80.0


# ---------------------------------------------------------------------------------------------------------------------
# masked statistics

def zero_outside(x, mask):
    """x where mask is True, 0 elsewhere. Not x * mask, because NaN * 0 is NaN. Apply it to the inputs of a formula:
    masking the output leaves NaN in the gradient of a NaN input."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x, mask):
    """Sum of x over True / count of True; 0 if nothing is True."""
    return zero_outside(x, mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(biased variance + 1e-8) over True; shift_mean=False adds the mean back. The biased variance
    makes one token come out as 0 (or as its mean) instead of NaN."""
    x = zero_outside(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return zero_outside(whitened if shift_mean else whitened + mean, mask)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns). 1: right up to a constant. 0: no better than a constant. Below 0: worse
    than a constant."""
    values, returns = zero_outside(values, mask), zero_outside(returns, mask)

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# KL to the reference policy, and the reward it shapes

def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Per-token estimates of KL(policy || reference) on tokens that the policy sampled [K3]. Same shape as given.

    With k = log pi - log pi_ref: k1 = k (unbiased), k2 = k^2 / 2 (biased, smooth), k3 = exp(-k) - 1 + k (unbiased,
    never negative). All three estimate the value of the KL. As losses they differ. Their expected gradient in a visited
    state is, for k1: zero; k2: that of KL(policy || ref); k3: that of KL(ref || policy)."""
    k = logprobs - ref_logprobs
    if kind == "k1":
        return k
    if kind == "k2":
        return 0.5 * k ** 2
    if kind == "k3":
        # expm1, because exp(-k) - 1 loses every digit where it matters most, at k near 0
        k = k.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-k) + k
    raise ValueError(f"kind={kind!r} is no KL estimator: choose k1, k2 or k3")


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """rewards (B, R): -kl_coef * (log pi - log pi_ref) on every response token, plus the score on the last [Z19].

    The KL is always k1, as a constant: no gradient flows through it. Only then is the policy gradient that of
    E[score] - kl_coef * KL(policy || reference). This gradient is exact for the policy that sampled, at gamma = 1, with
    lambda = 1 or an exact critic."""
    rewards = -kl_coef * kl_estimate(zero_outside(logprobs, mask), zero_outside(ref_logprobs, mask), "k1")
    last = torch.arange(mask.size(1), device=mask.device) == mask.sum(1, keepdim=True) - 1  # (B, R)
    return (rewards + zero_outside(scores.unsqueeze(1).expand_as(rewards), last)).detach()


class KLController:
    """The KL coefficient: fixed if target is None, else steered towards `target` nats per response [Z19, sec. 2.2].

    The rule is proportional control in log space: the relative error, clipped to +-0.2, moves the coefficient by
    that fraction once per `horizon` episodes."""

    def __init__(self, kl_coef, target=None, horizon=10_000):
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef={kl_coef} must be 0 or more: a negative one rewards leaving the reference")
        if target is not None and not (target > 0 and kl_coef > 0):
            raise ValueError(f"the KL target {target} and kl_coef={kl_coef} must be above 0, because the rule "
                             "multiplies the coefficient; leave the target out for a fixed one")
        if not horizon > 0:
            raise ValueError(f"the KL horizon {horizon} must be above 0 episodes")
        self.value, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, n_episodes):
        """kl: the measured KL in nats per response, a mean over n_episodes responses."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * min(n_episodes / self.horizon, 1)  # one huge batch must not flip its sign


# ---------------------------------------------------------------------------------------------------------------------
# returns and advantages: how much better than expected was each token

def reward_to_go(rewards, mask, gamma):
    """G_t = r_t + gamma * G_{t+1}, (B, R): what follows a token, because it cannot change what came before it."""
    rewards = zero_outside(rewards, mask)
    to_go, future = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        future = rewards[:, t] + gamma * future
        to_go[:, t] = future
    return zero_outside(to_go, mask)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation [GAE, eq. 16]: advantages and returns (= advantages + values), each (B, R).

        delta_t = r_t + gamma * V_{t+1} - V_t          A_t = delta_t + gamma * lam * A_{t+1}

    V is 0 after the last token. A response cut at max_new_tokens counts as a finished episode, without bootstrapping,
    because it is scored as if it had ended."""
    rewards, values = zero_outside(rewards, mask).detach(), zero_outside(values, mask).detach()
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    advantages = zero_outside(advantages, mask)
    return advantages, advantages + values


def group_advantages(scores, group_size, mask):
    """Leave-one-out advantages (B, R) without a critic [RLOO: Kool et al. 2019]: the response's score minus the mean
    score of the prompt's other responses, on all its tokens. Row i belongs to group i // group_size."""
    if group_size < 2 or scores.numel() % group_size:
        raise ValueError(f"group_size={group_size} must be 2 or more and divide the {scores.numel()} responses")
    groups = scores.view(-1, group_size)
    # With its own score in its baseline, a response would push only (group_size - 1) / group_size as hard.
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return zero_outside((groups - others).view(-1, 1).expand(mask.shape), mask)


# ---------------------------------------------------------------------------------------------------------------------
# the losses, in the order of the derivation

def log_ratio(logprobs, old_logprobs, mask):
    """log pi(token) - log pi_old(token), 0 where masked; pi_old is the policy that sampled, not the reference."""
    difference = zero_outside(logprobs, mask) - zero_outside(old_logprobs, mask).detach()
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio_error(logprobs, old_logprobs, mask):
    """The largest |pi / pi_old - 1| over True: 0 before the first optimizer step of a rollout."""
    return (log_ratio(logprobs, old_logprobs, mask).detach().exp() - 1).abs().max()


def ratio_stats(log_r, mask):
    """approx_kl: KL(pi_old || pi) by k3, which is ratio - 1 - log ratio here; ratio_max and ratio_mean over True."""
    log_r = log_r.detach()
    ratio = log_r.exp()
    return {"approx_kl": masked_mean(torch.expm1(log_r) - log_r, mask),
            "ratio_max": torch.where(mask, ratio, torch.zeros_like(ratio)).max(),
            "ratio_mean": masked_mean(ratio, mask)}


def reinforce_loss(logprobs, weights, mask):
    """-mean(log pi * weight): its gradient is the policy gradient [PG] for weights = return, reward-to-go or
    advantage. Weights are data: no gradient flows into them."""
    return -masked_mean(zero_outside(logprobs, mask) * zero_outside(weights, mask).detach(), mask), {}


def cpi_loss(logprobs, old_logprobs, advantages, mask):
    """-mean(ratio * A): the importance-weighted surrogate L^CPI [PPO, eq. 6], with nothing to limit the ratio."""
    log_r = log_ratio(logprobs, old_logprobs, mask)
    surrogate = log_r.exp() * zero_outside(advantages, mask).detach()
    return -masked_mean(surrogate, mask), ratio_stats(log_r, mask)


def kl_penalty_loss(logprobs, old_logprobs, advantages, mask, coef):
    """-(mean(ratio * A) - coef * KL(pi_old || pi)): TRPO's constraint as a penalty [PPO, eq. 8].

    The KL estimate is k3 = ratio - 1 - log ratio, on samples of pi_old. Its value and gradient are unbiased, and unlike
    -log ratio it is never negative."""
    log_r = log_ratio(logprobs, old_logprobs, mask)
    surrogate = log_r.exp() * zero_outside(advantages, mask).detach() - coef * (torch.expm1(log_r) - log_r)
    return -masked_mean(surrogate, mask), ratio_stats(log_r, mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """-mean(min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)): the clipped surrogate [PPO, eq. 7].

    The minimum is a lower bound of ratio * A. It has no gradient where the ratio is past the clip in A's direction:
    above 1 + clip if A > 0, below 1 - clip if A < 0. clip_frac is the fraction of those tokens. The ratio itself has no
    bound: one step may overshoot the clip, and nothing pulls the ratio back."""
    log_r = log_ratio(logprobs, old_logprobs, mask)
    ratio, advantages = log_r.exp(), zero_outside(advantages, mask).detach()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    stats = ratio_stats(log_r, mask)
    stats["clip_frac"] = masked_mean((clipped < unclipped).to(ratio.dtype), mask).detach()
    return -masked_mean(torch.min(unclipped, clipped), mask), stats


def value_loss(values, old_values, returns, mask, clip):
    """0.5 * mean(max((V - G)^2, (clamp(V, V_old - clip, V_old + clip) - G)^2)); clip=None: 0.5 * mean((V - G)^2).

    G is the return. `clip` is in units of G, so it depends on the scale of the score. A value that moved more than clip
    from V_old towards G gets no gradient, even if it is still far from G. So the optimum is not the mean return."""
    values = zero_outside(values, mask)
    old_values, returns = (zero_outside(x, mask).detach() for x in (old_values, returns))
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * masked_mean(error, mask), {}
    clipped_values = torch.max(torch.min(values, old_values + clip), old_values - clip)
    clipped_error = (clipped_values - returns) ** 2
    stats = {"value_clip_frac": masked_mean((clipped_error > error).to(error.dtype), mask).detach()}
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask), stats
