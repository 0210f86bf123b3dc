"""
The optimizer step: AdamW behind gradient clipping and a guard against gradients that are not finite, the learning
rate, and an average of the weights over the last steps.
"""

import math

import torch

from support import distributed


class Optimizer:
    """AdamW behind gradient clipping and a guard: a step whose loss or gradient is not finite is not taken.

    One NaN gradient makes clip_grad_norm_ spread NaN to all of them, and step() would then destroy every weight and
    moment, so the norm is checked first. critic_params are clipped separately: the value loss has the scale of the
    score, which must not shorten the policy's steps. No weight decay: it would pull the policy away from its reference.
    """

    def __init__(self, params, config, critic_params=()):
        self.config = config
        self.groups = [group for group in ([p for p in part if p.requires_grad] for part in (params, critic_params))
                       if group]
        self.params, self.calls = sum(self.groups, []), 0
        self.adamw = torch.optim.AdamW(self.params, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                                       fused=self.params[0].device.type in ("cuda", "cpu"))
        self.skipped, self.skipped_in_a_row = 0, 0

    def step(self, iteration, loss):
        """Sums gradients over processes, clips, steps and clears them. Returns (lr, gradient norm of params before
        clipping). iteration counts from 1. loss is the total whose gradients these are. Raises FloatingPointError after
        max_bad_steps steps in a row whose loss or gradient was not finite."""
        self.calls += 1
        lr = learning_rate(self.config, iteration)
        distributed.sum_gradients(self.params)
        loss, *norms = distributed.numbers([loss] + [
            distributed.full_tensors(torch.nn.utils.clip_grad_norm_(group, self.config.grad_clip))
            for group in self.groups])
        if all(map(math.isfinite, [loss, *norms])):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            print(f"iteration {iteration}: loss {loss}, gradient norm {', '.join(map(str, norms))}, so this optimizer "
                  "step is skipped")
        self.zero_grad()
        if self.skipped_in_a_row >= self.config.max_bad_steps:
            raise FloatingPointError(f"{self.skipped_in_a_row} optimizer steps in a row had a loss or a gradient that "
                                     "is not finite: lower --lr or --grad_clip in a new run, or use --dtype=float32; "
                                     "the last checkpoint is untouched")
        return lr, norms[0]

    def zero_grad(self):
        self.adamw.zero_grad(set_to_none=True)

    def state(self):
        return {"adamw": self.adamw.state_dict(), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, state):
        moments = {i: {name: distributed.shard_like(value, self.params[i]) for name, value in moments.items()}
                   for i, moments in state["adamw"]["state"].items()}
        self.adamw.load_state_dict(state["adamw"] | {"state": moments})
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def learning_rate(config, iteration):
    """Constant, or falling linearly from lr to 0 over lr_decay_iters. max_iters does not change the horizon of the
    decay, so a run that is stopped and then resumed for longer equals a run that was never stopped."""
    if config.lr_decay_iters is None:
        return config.lr
    return config.lr * max(0.0, 1 - (iteration - 1) / config.lr_decay_iters)


@torch.no_grad()
def update_average(average, model, iteration):
    """Moves the average's weights towards the model's: polynomial-decay averaging [Shamir & Zhang 2013, 1212.1824],
    whose memory is about the last tenth of the iterations, however many there are. The first call copies.

    With it, half the steps give a better language model. In a reward model the noise of the last steps hardly shows in
    the loss, but it makes the model overrate exactly the answers that a policy then finds."""
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 9 / (iteration + 8))
