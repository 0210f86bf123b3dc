"""
The rungs of the ladder: objectives that the derivation meets on its way to PPO, in train_ppo.py's own loop. A rung
differs from the one before by what the derivation changed. From baseline on, advantages are also whitened.

    python -m experiments.ladder --objective=reinforce      one rung, with the flags of train_ppo.py
    python -m experiments.ladder                            all of them, and TRPO: see experiments/ladder.py

reinforce, reward_to_go, baseline and gae take one optimizer step per rollout: they are on-policy, so their gradient is
right only for the policy that sampled. cpi, kl_penalty and clip take several, and the ratio corrects for it.
"""

from dataclasses import dataclass
from typing import Optional

import train_ppo
from ppo import (cpi_loss, gae, group_advantages, kl_penalty_loss, log_ratio, policy_loss, ratio_stats, reinforce_loss,
                 reward_to_go, whiten, zero_outside)
from support.flags import refuse_given, require

OBJECTIVES = ("reinforce", "reward_to_go", "baseline", "gae", "cpi", "kl_penalty", "clip")
ONE_STEP, REUSE = OBJECTIVES[:4], OBJECTIVES[4:]
NO_CRITIC = OBJECTIVES[:2]
# The flags that would do nothing on a rung.
UNUSED = {name: ("clip", "target_kl", "penalty_target") for name in ONE_STEP} | {
    "cpi": ("clip", "penalty_target"), "kl_penalty": ("clip",), "clip": ("penalty_target",)}
UNUSED |= {name: ("critic", "vf_coef", "value_clip", "lam", *UNUSED[name]) for name in NO_CRITIC}
UNUSED["baseline"] += ("lam",)


@dataclass
class Config(train_ppo.Config):
    # the rung
    objective: str = "clip"            # reinforce|reward_to_go|baseline|gae|cpi|kl_penalty|clip: docs/derivation.md
    penalty_target: float = 0.01       # (0, inf) kl_penalty: nats per token from the sampling policy
    minibatches: Optional[int] = None  # [1, inf) optimizer steps per epoch; default 4, or 1 up to --objective=gae

    def resolved(self):
        """The config with the defaults of its rung filled in."""
        config = super().resolved()
        return config.replace(minibatches=self.minibatches or (1 if self.objective in ONE_STEP else 4),
                              critic=None if self.objective in NO_CRITIC else config.critic)

    def check(self):
        require(self.objective in OBJECTIVES, f"--objective={self.objective} must be one of {', '.join(OBJECTIVES)}")
        rung = f"--objective={self.objective} with --advantage={self.advantage}"
        for name in ("epochs", "minibatches") if self.objective in ONE_STEP else ():
            require(getattr(self, name) in (None, 1), f"--{name}={getattr(self, name)}, but {rung} takes one step per "
                    "rollout: its formula holds for the policy that sampled; use cpi, kl_penalty or clip")
        require(self.advantage == "gae" or self.objective in ("baseline", *REUSE), "--advantage=group is a baseline, "
                f"which has no place in --objective={self.objective}: use baseline, cpi, kl_penalty or clip")
        refuse_given(self, UNUSED[self.objective], f"in {rung}")
        train_ppo.Config.check(self.resolved())


class PenaltyController:
    """The coefficient of kl_penalty_loss: doubled when KL(pi_old || pi) ends above 1.5 * target nats per token, halved
    when it ends below target / 1.5 [PPO, sec. 4].

    It may oscillate: a factor of 2 in the coefficient is about a factor of 4 in the KL. Adam's step length hardly
    depends on the loss's scale, so if one step overshoots the target, the coefficient grows without end."""

    LOWEST = 1e-6  # without a bound it would reach exactly 0, and doubling could not raise it again

    def __init__(self, target, coef=1.0):
        if not (target > 0 and coef > 0):
            raise ValueError(f"the penalty's target {target} and coefficient {coef} must be above 0, because the rule "
                             "multiplies the coefficient")
        self.value, self.target = coef, target

    def update(self, kl):
        """kl: KL(pi_old || pi) in nats per token, as the update's last minibatch measured it."""
        if kl > 1.5 * self.target:
            self.value *= 2
        elif kl < self.target / 1.5:
            self.value = max(self.value / 2, self.LOWEST)


def token_advantages(objective, rewards, values, mask, gamma, lam, group_size=None):
    """Advantages (each token's weight in the policy gradient) and returns (the critic's target), each (B, R).

    reinforce: the return of the whole response. reward_to_go: the return from the token on. baseline: that minus the
    critic's value V. gae, cpi, kl_penalty, clip: GAE with lam. With a group_size, the mean return of the prompt's other
    responses replaces V.

    All have the same expected gradient if gamma = 1 (gae, cpi, kl_penalty and clip also need lam = 1 or an exact
    critic). With gamma below 1, only reinforce keeps the exact factor gamma^t in front of the later tokens. The others
    drop it, as is usual."""
    returns = reward_to_go(rewards, mask, gamma).detach()
    if objective == "reinforce":
        return zero_outside(returns[:, :1].expand_as(returns), mask), returns
    if objective == "reward_to_go":
        return returns, returns
    if group_size is not None:
        return group_advantages(returns[:, 0], group_size, mask), returns
    return gae(rewards, values, mask, gamma, lam=1.0 if objective == "baseline" else lam)


def surrogate_loss(objective, logprobs, old_logprobs, advantages, mask, clip=None, penalty=None):
    """The policy's loss on a rung: (scalar, stats). `clip` is for clip, `penalty` for kl_penalty."""
    if objective == "cpi":
        return cpi_loss(logprobs, old_logprobs, advantages, mask)
    if objective == "kl_penalty":
        return kl_penalty_loss(logprobs, old_logprobs, advantages, mask, penalty)
    if objective == "clip":
        return policy_loss(logprobs, old_logprobs, advantages, mask, clip)
    # The first four take one step per rollout, at pi = pi_old: no formula has the ratio, but it is still measured.
    loss, _ = reinforce_loss(logprobs, advantages, mask)
    return loss, ratio_stats(log_ratio(logprobs, old_logprobs, mask), mask)


class Rung:
    """A rung in train_ppo.loop: its advantages and loss, and the state of the penalty that kl_penalty steers."""

    def __init__(self, config):
        self.config, self.penalty = config, None
        if config.objective == "kl_penalty":
            self.penalty = PenaltyController(config.penalty_target)

    def load(self, saved):
        """Continues from the fields of a checkpoint."""
        if self.penalty:
            self.penalty.value = saved.get("penalty", self.penalty.value)

    def advantages(self, rewards, values, mask):
        """token_advantages of the rung; whitened unless the rung has no baseline, as whitening would give it one."""
        config, objective = self.config, self.config.objective
        group_size = config.samples_per_prompt if config.advantage == "group" else None
        advantages, returns = token_advantages(objective, rewards, values, mask, config.gamma, config.lam, group_size)
        return advantages if objective in NO_CRITIC else whiten(advantages, mask), returns

    def loss(self, logprobs, old_logprobs, advantages, mask):
        return surrogate_loss(self.config.objective, logprobs, old_logprobs, advantages, mask, self.config.clip,
                              self.penalty and self.penalty.value)

    def end(self, approx_kl):
        """Ends an iteration whose last minibatch measured approx_kl. Returns the metrics that only this rung has."""
        if not self.penalty:
            return {}
        used = self.penalty.value
        self.penalty.update(float(approx_kl))
        return {"penalty": used}

    def state(self):
        """Fields for the checkpoint."""
        return {"penalty": self.penalty.value} if self.penalty else {}


def train(config):
    """train_ppo.train on one rung: writes out_dir/ppo.pt and returns the final metrics."""
    config.check()
    return train_ppo.train(config, Rung(config.resolved()))
