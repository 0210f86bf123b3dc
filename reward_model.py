"""
The reward model: a language model's trunk with a scalar head instead of the unembedding, trained on comparisons by the
Bradley-Terry loss.

Shapes: N sequences (prompt and response, padded on the right to T), `lens` (N,) their real lengths. A score is read
at the last real token, EOS where there is one: the only position that has seen the whole answer.
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, ScalarHead, Trunk, upcast


class RewardModel(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = ScalarHead(config)
        # Scores start with a spread of about 1 around 0, whatever the width [Ziegler et al. 2019]: a zero head would
        # send no gradient into the trunk at first
        nn.init.normal_(self.head.linear.weight, std=(config.n_embd + 1) ** -0.5)
        # Calibration, kept in the checkpoint with the weights: Bradley-Terry fixes neither the zero nor, in practice,
        # the scale of a score, and PPO's kl_coef weighs the KL against exactly that scale.
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def from_policy(cls, policy):
        """A reward model on a copy of the policy's trunk: it starts from what the SFT model knows."""
        reward_model = cls(policy.config)
        reward_model.trunk.load_state_dict(policy.trunk.state_dict())
        return reward_model

    def forward(self, tokens, lens, rows=None, positions=None, texts=None):
        """scores (N,) of tokens (N, T) with lens (N,), float32 or wider. Ids beyond lens are never read.

        With rows, positions and texts from data.collate_comparisons, a row of tokens (B, T) is a prompt and several
        responses. A response sees only itself and the prompt, so its score is the same as in its own row."""
        mask = None
        if rows is None:
            rows = torch.arange(tokens.size(0), device=tokens.device)
        else:
            mask = (texts[:, None] == texts[..., None]) | (texts[:, None] == 0)  # (B, T, T): queries, then keys
            mask = mask.tril()[:, None]
        hidden = self.trunk(tokens, positions=positions, mask=mask)  # (B, T, C)
        last = hidden[rows, lens - 1]  # (N, C)
        return upcast(self.head(last)) * self.gain + self.bias

    def as_critic(self):
        """A separate critic (a GPT whose policy head is not used) whose value is this model's calibrated score: it
        begins by judging an unfinished answer as if it ended there."""
        critic = GPT(replace(self.config, tied=True))  # an untied policy head would only take memory
        critic.trunk.load_state_dict(self.trunk.state_dict())
        with torch.no_grad():
            critic.value_head.linear.weight.copy_(self.head.linear.weight * self.gain)
            critic.value_head.linear.bias.copy_(self.head.linear.bias * self.gain + self.bias)
        return critic.to(self.gain.device).eval()

    @torch.no_grad()
    def calibrate(self, scores):
        """Sets gain and bias so that `scores` (N,), as forward gave them, would have mean 0 and std 1. The ranking
        of answers does not change; the unit of kl_coef does: standard deviations of SFT answers per nat."""
        std = scores.std(unbiased=False)
        if not std > 1e-6 * scores.abs().max():  # rounding alone gives equal scores a std above 0
            raise FloatingPointError("the calibration samples' scores have no spread or are not finite: the reward "
                                     "model has learned nothing, so it was not saved; lower --lr, or look at the data")
        self.gain /= std
        self.bias.copy_((self.bias - scores.mean()) / std)

    def reset_calibration(self):
        """Back to raw scores, the scale of training, when a finished model is trained further."""
        self.gain.fill_(1)
        self.bias.zero_()


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), mean over pairs: the negative log-likelihood of the labeller's choices under
    P(chosen preferred) = sigmoid(score difference) [Bradley & Terry 1952]. logsigmoid stays finite where
    log(sigmoid(x)) overflows. Returns (scalar, {accuracy, margin}); a tie is not counted as accurate."""
    margin = chosen - rejected
    stats = {"accuracy": (margin > 0).float().mean(), "margin": margin.detach().mean()}
    return -F.logsigmoid(margin).mean(), stats


def calibration_table(margins, n_bins=5):
    """Does 80% mean 80%? Rows (low, high, count, predicted, observed) over bins of the model's confidence.

    margins (M,) are score differences chosen - rejected. A model that gives margin d is confident sigmoid(|d|) in
    the answer it prefers (`predicted`, the bin's mean); `observed` is how often the labeller preferred it too."""
    confidence = torch.sigmoid(margins.abs())  # in [0.5, 1]
    edges = torch.linspace(0.5, 1, n_bins + 1).tolist()
    rows = []
    for low, high in zip(edges, edges[1:]):
        inside = (confidence >= low) & ((confidence < high) | (high == 1))
        if inside.any():
            rows.append((low, high, int(inside.sum()), confidence[inside].mean().item(),
                         (margins[inside] > 0).float().mean().item()))
    return rows
