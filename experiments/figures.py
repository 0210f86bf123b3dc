"""
Draws the figures of docs/derivation.md, at least one per section, into docs/figures/.

    python -m experiments.figures

Each curve is an output of ppo.py's own functions. Expectations are sums over the 40 responses of a toy language: tokens
a, b, c and EOS, at most 3 in a response, with a logit for each state and token. float64, fixed seeds. Needs matplotlib.
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch.autograd.functional import jacobian

from ppo import (cpi_loss, gae, kl_estimate, kl_penalty_loss, policy_loss, reinforce_loss, reward_to_go, shape_rewards,
                 whiten, zero_outside)
from reward_model import bradley_terry_loss
from support.flags import run_script
from tools.plot import COLOURS, import_pyplot

BLUE, ORANGE, GREEN, *_, BLACK = COLOURS


def linspace(low, high, steps):
    return torch.linspace(low, high, steps, dtype=torch.float64)


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# the toy language

V, R, EOS = 4, 3, 0
ROWS = sorted([(*words, EOS) for n in range(R) for words in product(range(1, V), repeat=n)]
              + list(product(range(1, V), repeat=R)))                  # 40 responses, in the order of the tree
PREFIXES = sorted({row[:t] for row in ROWS for t in range(len(row))})  # 13 states
LENS = torch.tensor([len(row) for row in ROWS])
MASK = torch.arange(R) < LENS.unsqueeze(1)  # (40, R)
TOKENS = torch.tensor([row + (EOS,) * (R - len(row)) for row in ROWS])
STATES = torch.tensor([[PREFIXES.index(row[:min(t, len(row) - 1)]) for t in range(R)] for row in ROWS])


def logprobs(theta):
    """(40, R) under the policy with logits theta (13, V)."""
    return theta.log_softmax(-1)[STATES, TOKENS]


def probs(theta):
    """Probability of each response (40,)."""
    return zero_outside(logprobs(theta), MASK).sum(1).exp()


def exact_values(theta, rewards):
    """V of each token's state (40, R): the mean return of the responses that pass through it."""
    p, returns = probs(theta).unsqueeze(1).expand(-1, R)[MASK], reward_to_go(rewards, MASK, 1.0)[MASK]
    sums = torch.zeros(2, len(PREFIXES), dtype=p.dtype).index_add(1, STATES[MASK], torch.stack([p * returns, p]))
    return (sums[0] / sums[1])[STATES]


def per_response(loss, *inputs):
    """(40,): the sum over each response's tokens of what a loss of ppo.py averages. The inputs are (40, R)."""
    return torch.stack([n * loss(*rows)[0] for n, *rows in zip(LENS, *(x.split(1) for x in inputs))])


OLD = 1.5 * randn(len(PREFIXES), V, seed=1)  # the policy that samples
P_OLD, SCORES = probs(OLD), 1 + randn(len(ROWS), seed=5)
REWARDS = shape_rewards(SCORES, logprobs(OLD), logprobs(OLD), MASK, kl_coef=0)
RETURNS, VALUES = reward_to_go(REWARDS, MASK, 1.0), exact_values(OLD, REWARDS)
ADVANTAGES, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.0)  # exact, because the values are
PSI = torch.stack([jacobian(lambda theta: -per_response(reinforce_loss, logprobs(theta), at.expand(40, R), MASK), OLD)
                   for at in torch.eye(R, dtype=torch.float64)], 1).flatten(2)  # (40, R, 13 * V): grad of a log-prob


def gradient(weights):
    """The policy gradient for token weights (40, R): its mean, and the variance of one response's estimate of it."""
    parts = (weights.unsqueeze(2) * PSI).sum(1)
    mean = P_OLD @ parts
    return mean, float(P_OLD @ (parts - mean).square().sum(1))


def best_baseline():
    """b(s) of each token's state (40, R), by the weighted least squares that minimise the variance."""
    by_state = torch.stack([((STATES == s).unsqueeze(2) * PSI).sum(1) for s in range(len(PREFIXES))], -1)
    root, target = P_OLD.sqrt().view(-1, 1, 1), (RETURNS.unsqueeze(2) * PSI).sum(1, keepdim=True).mT
    return torch.linalg.lstsq((root * by_state).flatten(0, 1), (root * target).flatten(0, 1)).solution[:, 0][STATES]


def along_a_line(steps):
    """J - J_old, the surrogate L, the KL(old || new) of a response and its maximum over states, along a line."""
    def expected(loss, theta):
        return -float(P_OLD @ per_response(loss, logprobs(theta), logprobs(OLD), ADVANTAGES, MASK))

    thetas = [OLD + h * randn(len(PREFIXES), V, seed=72) for h in steps]
    J = torch.tensor([float((probs(theta) - P_OLD) @ SCORES) for theta in thetas])
    L = torch.tensor([expected(cpi_loss, theta) for theta in thetas])
    KL = L - torch.tensor([expected(lambda *x: kl_penalty_loss(*x, coef=1.0), theta) for theta in thetas])
    p, q = OLD.log_softmax(-1), torch.stack(thetas).log_softmax(-1)
    return J, L, KL, (p.exp() * (p - q)).sum(-1).max(1).values


def optimum(reference, beta):
    """(KL to the reference, expected score) of the policy with the highest score minus beta times the KL."""
    log_ref = zero_outside(logprobs(reference), MASK).sum(1)
    log_best = (log_ref + SCORES / beta).log_softmax(0)
    return float(log_best.exp() @ (log_best - log_ref)), float(log_best.exp() @ SCORES)


def ppo_path(reference, beta, rollouts=120):
    """(KL, expected score) at each rollout of PPO from the reference: 1,024 responses, four steps of Adam."""
    theta, rng, path = reference.clone().requires_grad_(), torch.Generator().manual_seed(0), []
    adam, ref = torch.optim.Adam([theta], lr=0.02), logprobs(reference)
    for _ in range(rollouts):
        p, old = probs(theta).detach(), logprobs(theta).detach()
        path.append((float(p @ zero_outside(kl_estimate(old, ref), MASK).sum(1)), float(p @ SCORES)))
        rewards = shape_rewards(SCORES, old, ref, MASK, beta)
        rows = torch.multinomial(p, 1024, replacement=True, generator=rng)
        advantages, _ = gae(rewards[rows], exact_values(theta.detach(), rewards)[rows], MASK[rows], 1.0, 0.95)
        for _ in range(4):
            loss, _ = policy_loss(logprobs(theta)[rows], old[rows], whiten(advantages, MASK[rows]), MASK[rows], 0.2)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return path


# ---------------------------------------------------------------------------------------------------------------------
# the pictures

def draw_tree(axis):
    leaves = {row: i for i, row in enumerate(ROWS)}
    places = leaves | {prefix: sum(under) / len(under) for prefix in PREFIXES
                       if (under := [i for row, i in leaves.items() if row[:len(prefix)] == prefix])}
    colours = {row: ORANGE if row[-1] == EOS else BLUE for row in ROWS}
    for node, x in places.items():
        axis.plot([places[node[:-1]], x], [-len(node[:-1]), -len(node)], color="0.7", linewidth=1, zorder=0)
        axis.scatter(x, -len(node), s=26, color=colours.get(node, BLACK))
    axis.bar(range(40), (1.8 * P_OLD / P_OLD.max()).tolist(), bottom=-5.3, color=list(colours.values()))
    axis.set_xticks(range(40), ["".join(".abc"[a] for a in row) for row in ROWS], rotation=90, fontsize=9)
    axis.set_yticks([0, -1, -2, -3, -4.6], ["no token", "1 token", "2 tokens", "3 tokens", "probability"])
    axis.set_title(f"orange: ends with EOS (.)     blue: cut at 3 tokens     the bars add up to {P_OLD.sum():.3f}")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.margins(x=0.01)


def draw_bradley_terry(axis):
    margin, zero = linspace(-3, 6, 181), torch.zeros(1, dtype=torch.float64)
    wins, losses = (torch.stack([bradley_terry_loss(m * sign, zero)[0] for m in margin.split(1)]) for sign in (1, -1))
    for p in (0.5, 0.8, 0.95, 1):
        line, = axis.plot(margin, p * wins + (1 - p) * losses, label=f"p = {p}" + ": no minimum" * (p == 1))
        if p < 1:
            axis.plot(math.log(p / (1 - p)), min(p * wins + (1 - p) * losses), "o", color=line.get_color())
    axis.set(xlabel="score of the first answer - score of the second", ylabel="expected loss, nats", ylim=(0, 2))


def draw_returns(axis):
    rewards = torch.tensor([[-0.1, -0.2, 0.0, -0.3, -0.1, -0.2, 0.0, 1.0]], dtype=torch.float64)
    axis.bar(range(8), rewards[0].tolist(), color="0.75", label="reward")
    for gamma in (1.0, 0.9, 0.7):
        axis.plot(reward_to_go(rewards, rewards == rewards, gamma)[0], "o-", label=rf"return, $\gamma$ = {gamma}")
    axis.set(xlabel="token", ylabel="units of score")


def draw_reinforce(axis):
    sizes, rng = 2 ** torch.arange(13), torch.Generator().manual_seed(0)
    for shift, colour in ((0, BLUE), (5, ORANGE)):
        parts, (mean, variance) = ((RETURNS + shift).unsqueeze(2) * PSI).sum(1), gradient(RETURNS + shift)
        drawn = [parts[torch.multinomial(P_OLD, int(n), replacement=True, generator=rng)].mean(0) for n in sizes]
        axis.loglog(sizes, [(x - mean).norm() / mean.norm() for x in drawn], "o", color=colour,
                    label=f"scores + {shift}" if shift else "scores")
        axis.loglog(sizes, (variance / sizes).sqrt() / mean.norm(), color=colour)
    axis.axhline(1, color="0.5", linestyle=":")
    axis.set(xlabel="responses in the estimate", ylabel="error / length of the gradient")


def draw_baseline(axis):
    b = linspace(-0.2, 2.6, 57)
    axis.plot(b, [gradient(RETURNS - x)[1] for x in b], label="the same b in every state")
    axis.plot(0, gradient(RETURNS)[1], "o", color=BLUE, label="no baseline")
    axis.axhline(gradient(RETURNS - VALUES)[1], color=GREEN, label="b(s) = V(s)")
    axis.axhline(gradient(RETURNS - best_baseline())[1], color=ORANGE, linestyle="--", label="the best b(s)")
    axis.set(xlabel="b", ylabel="variance of the gradient")


def draw_gae(left, right):
    deltas, zeros = torch.eye(16), torch.zeros(16, 16)  # row l has a reward of 1, and so a delta, at token l alone
    for lam in (1, 0.95, 0.8, 0.5, 0):
        left.plot(gae(deltas, zeros, zeros == 0, 1.0, lam)[0][:, 0], ".-", label=rf"$\lambda$ = {lam}")
    left.set(xlabel="tokens ahead, $l$", ylabel=r"weight of $\delta_{t+l}$", ylim=(-0.05, 1.45))
    left.legend(ncols=3, loc="upper center")
    lams, exact = linspace(0, 1, 21), gradient(ADVANTAGES)[0]
    for name, style, error in (("exact", "--", 0), ("wrong", "-", 0.7 * randn(len(PREFIXES), seed=3)[STATES])):
        moments = [gradient(gae(REWARDS, VALUES + error, MASK, 1.0, lam)[0]) for lam in lams]
        right.plot(lams, [variance ** 0.5 for _, variance in moments], style, color=BLUE, label=f"noise, {name} critic")
        right.plot(lams, [(mean - exact).norm() for mean, _ in moments], style, color=ORANGE,
                   label=f"bias, {name} critic")
    right.set(xlabel=r"$\lambda$", ylabel="error of the gradient", ylim=(-0.05, 1.9))
    right.legend(ncols=2, loc="upper center")


def draw_surrogate(axis):
    steps = linspace(-1.5, 1.5, 61)
    J, L, *_ = along_a_line(steps)
    axis.plot(steps, J, label=r"$J - J_{\mathrm{old}}$")
    axis.plot(steps, L, "--", label="surrogate $L$")
    axis.plot(0, 0, "o", color=BLACK, label="the policy that sampled")
    axis.set(xlabel="step $h$ along a direction", ylabel="units of score")


def draw_bound(axis):
    steps, C = linspace(-0.4, 0.4, 61), R * (R - 1) * float(ADVANTAGES.abs().max())
    J, L, KL, max_KL = along_a_line(steps)
    for y, style, name in ((J, "-", r"$J - J_{\mathrm{old}}$"), (L, "--", "$L$"), (L - KL, "-.", "$L - c$ KL, $c$ = 1"),
                           (L - C * max_KL, "-", f"$L - C$ max KL, $C$ = {C:.1f}")):
        axis.plot(steps, y, style, label=name)
    axis.set(xlabel="step $h$ along a direction", ylabel="units of score", ylim=(-0.6, 0.3))


def draw_clip(*axes):
    ratios, zero = linspace(0.4, 1.6, 121), torch.zeros(1, 1, dtype=torch.float64)
    for axis, A in zip(axes, (1, -1)):
        inputs = [(ratio.log().view(1, 1), zero, zero + A, zero == 0) for ratio in ratios]
        axis.plot(ratios, [-policy_loss(*x, clip=0.2)[0] for x in inputs], linewidth=3, label="PPO: the smaller")
        axis.plot(ratios, [-cpi_loss(*x)[0] for x in inputs], "--", label=r"$\rho\,A$, not clipped")
        axis.plot(ratios, A * ratios.clamp(0.8, 1.2), ":", color=BLACK, label=r"clip$(\rho)\,A$")
        axis.axvspan(*((1.2, 1.6) if A > 0 else (0.4, 0.8)), color=GREEN, alpha=0.12, linewidth=0)
        axis.set(xlabel=r"ratio $\rho$", ylabel="surrogate of a token", title=f"A = {A}, green: no gradient")


def draw_kl(axis):
    k = linspace(-2, 2, 161)
    for kind in ("k1", "k2", "k3"):
        axis.plot(k, kl_estimate(k, torch.zeros_like(k), kind), label=kind)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set(xlabel="log-ratio $k$ of a sampled token", ylabel="estimate of the KL, nats")


def draw_reward_kl(axis):
    reference = randn(len(PREFIXES), V, seed=2)
    axis.plot(*zip(*[optimum(reference, beta) for beta in torch.logspace(2, -1.5, 100).tolist()]), color=BLACK,
              label=r"the optimum for each $\beta$")
    for beta, colour in ((1, GREEN), (0.3, BLUE), (0, ORANGE)):
        axis.plot(*zip(*ppo_path(reference, beta)), ".-", color=colour, linewidth=1, label=rf"PPO, $\beta$ = {beta}")
        if beta:
            axis.plot(*optimum(reference, beta), "*", color=colour, markersize=14, markeredgecolor="white")
    axis.set(xlabel="KL to the reference, nats per response", ylabel="expected score")


FIGURES = {"tree": draw_tree, "bradley_terry": draw_bradley_terry, "returns": draw_returns,
           "reinforce": draw_reinforce, "baseline": draw_baseline, "gae": draw_gae, "surrogate": draw_surrogate,
           "bound": draw_bound, "clip": draw_clip, "kl": draw_kl, "reward_kl": draw_reward_kl}


@dataclass
class Config:
    folder: str = "docs/figures"  # where the figures go


def main(config, names=FIGURES):
    """Draws each figure into folder/name.png, as wide as a page, with one panel or two."""
    plt, folder = import_pyplot(), Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=COLOURS), "axes.grid": True, "grid.alpha": 0.3,
                         "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False}):
        for name in names:
            figure, axes = plt.subplots(1, 2 if name in ("gae", "clip") else 1, figsize=(9, 3.4), squeeze=False,
                                        constrained_layout=True)
            FIGURES[name](*axes[0])
            for axis in axes[0]:
                if axis.get_legend_handles_labels()[1] and not axis.get_legend():
                    axis.legend()
            figure.savefig(folder / f"{name}.png", dpi=80, metadata={"Software": None})
            plt.close(figure)
            print(f"wrote {folder / name}.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
