"""
All of PPO against an answer that is known. On a language small enough to list, the policy that maximises

    J = E[score] - kl_coef * KL(pi || pi_ref)        is        pi*(y) = pi_ref(y) exp(score(y) / kl_coef) / Z,

so a trained policy has an exact distance to perfect, KL(pi || pi*). The score alone tells nothing: with the KL left out
it ends higher than with the KL right.

The loop is that of train_ppo.py less files, flags and metrics. The sampling, the alignment, the rewards, the advantages
and the losses are the project's own; the judge shares none of them and sums over all responses in float64.

What this distance cannot see, and unit tests must: what changes how PPO gets there and not where, such as the clip,
lambda or whitening. Nor can it see who samples: at pi* all responses to a prompt have the same shaped return, so pi*
stays where it is on samples of any policy. That is why the loop also compares the log-probs as sampled and as scored.
"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from enumerable import EOS, enumerate_responses
from model import GPT, GPTConfig
from ppo import gae, zero_outside, kl_estimate, log_ratio, policy_loss, shape_rewards, value_loss, whiten
from rollout import generate, score_response


V, R = 4, 3
KL_COEF = 0.5
TOKENS, MASK = enumerate_responses(V, R)                            # (N, R) each, N = 40
PROMPTS, PROMPT_LENS = torch.tensor([[1, EOS], [2, 3]]), [1, 2]     # ragged, so that an alignment has to be right
BLOCK_SIZE = PROMPTS.size(1) + R
SCORES = 3.5 * torch.rand(len(PROMPTS), len(TOKENS), generator=torch.Generator().manual_seed(3)) - 1.75


# ---------------------------------------------------------------------------------------------------------------------
# two policies: the real one, and one whose states share nothing, so that only the algorithm can be at fault

def gpt(seed):
    """The real model, its weights larger than at init: a reference that is not uniform, and not the same everywhere."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(BLOCK_SIZE, V, n_layer=2, n_head=2, n_embd=32))
    for p in model.trunk.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.1)
    return model.eval()


class Tabular(nn.Module):
    """GPT's interface over a table: a hidden state is the row of its prefix, V logits and a value."""

    def __init__(self, seed):
        super().__init__()
        self.config = GPTConfig(BLOCK_SIZE, V, n_layer=1, n_head=1, n_embd=1)
        self.table = nn.Parameter(torch.zeros(2 * V ** BLOCK_SIZE, V + 1))
        nn.init.normal_(self.table[:, :V].data, std=0.5, generator=torch.Generator().manual_seed(seed))

    def forward(self, idx, cache=None, positions=None):
        if cache is not None:  # what it keeps of a token is the token
            x = idx[:, None, :, None].to(cache.k[0].dtype)
            idx = cache.update(0, x, x, positions)[0][:, 0, :, 0].long()
        prefixes = [torch.ones_like(idx[:, 0])]
        for token in idx.unbind(1):
            prefixes.append(prefixes[-1] * V + token)  # a number in base V that starts with 1: no two are the same
        prefixes = torch.stack(prefixes[1:], dim=1)
        return self.table[prefixes if positions is None else prefixes.gather(1, positions.unsqueeze(1))]

    def policy_head(self, hidden):
        return hidden[..., :V]

    def value_head(self, hidden):
        return hidden[..., V]


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def score(rollout, which):
    """The score (B,) of each response to prompt number `which` (B,): looked up in the list of all responses."""
    columns = rollout.prompt_lens.unsqueeze(1) + torch.arange(R)
    responses = F.pad(rollout.tokens, (0, R), value=EOS).gather(1, columns)  # (B, R)
    return SCORES[which, (responses.unsqueeze(1) == TOKENS).all(2).long().argmax(1)]


@torch.no_grad()
def recompute(model, rollout, minibatch_size):
    """logprobs, values (B, R), in passes of the update's own shape, for the first ratio to be exactly 1."""
    rows = zip(rollout.tokens.split(minibatch_size), rollout.prompt_lens.split(minibatch_size))
    parts = [score_response(model, *row, rollout.mask.size(1))[:2] for row in rows]
    return [torch.cat(part) for part in zip(*parts)]


def train(policy, seed, lr, iters, shape=shape_rewards, B=512, epochs=2, minibatch_size=256):
    """Trains `policy` in place, lr falling to 0; `shape` has the arguments of shape_rewards. Returns the reference that
    it started as, and over all rollouts max|ratio - 1| in the first minibatch and the largest gap between a log-prob
    as sampled and as scored."""
    reference, rng = copy.deepcopy(policy).requires_grad_(False), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 - iteration / iters)
    which = torch.arange(B) % len(PROMPTS)
    prompts, prompt_lens = PROMPTS[which], torch.tensor(PROMPT_LENS)[which]
    ratio_error = gap = 0.0
    for _ in range(iters):
        rollout = generate(policy, prompts, prompt_lens, R, eos=EOS, generator=rng)
        tokens, mask = rollout.tokens, rollout.mask
        old_logprobs, old_values = recompute(policy, rollout, minibatch_size)
        ref_logprobs, _ = recompute(reference, rollout, minibatch_size)
        gap = max(gap, (rollout.logprobs - old_logprobs)[mask].abs().max().item())
        rewards = shape(score(rollout, which), old_logprobs, ref_logprobs, mask, KL_COEF)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)

        order = [torch.arange(B)] + [torch.randperm(B, generator=rng) for _ in range(epochs - 1)]
        for n, i in enumerate(torch.cat(order).split(minibatch_size)):
            logprobs, values, _ = score_response(policy, tokens[i], prompt_lens[i], mask.size(1))
            if n == 0:
                log_r = log_ratio(logprobs.detach(), old_logprobs[i], mask[i])
                ratio_error = max(ratio_error, (log_r.exp() - 1).abs().max().item())
            loss = (policy_loss(logprobs, old_logprobs[i], advantages[i], mask[i], clip=0.2)[0]
                    + 0.5 * value_loss(values, old_values[i], returns[i], mask[i], clip=None)[0])
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return reference, ratio_error, gap


# ---------------------------------------------------------------------------------------------------------------------
# the judge

@torch.no_grad()
def response_logprobs(model):
    """log pi(response | prompt) of all responses to each prompt, (prompts, N) in float64. The alignment is written out
    here once more: with score_response's own, an error in it would judge itself."""
    rows = []
    for prompt, n in zip(PROMPTS, PROMPT_LENS):
        tokens = torch.cat([prompt[:n].expand(len(TOKENS), n), TOKENS], dim=1)
        logits = model.policy_head(model(tokens))[:, n - 1:-1]
        logprobs = logits.double().log_softmax(-1).gather(2, TOKENS.unsqueeze(2)).squeeze(2)
        rows.append((logprobs * MASK).sum(1))
    log_p = torch.stack(rows)
    assert ((log_p.exp().sum(1) - 1).abs() < 1e-5).all()  # a distribution, which no list with a gap would give
    return log_p


def mean(log_p, x):
    """E[x] under a policy, (prompts, N) each; averaged over the prompts."""
    return (log_p.exp() * x).sum(1).mean().item()


def kl(log_p, log_q):
    return mean(log_p, log_p - log_q)


def evaluate(policy, reference):
    """KL(pi || pi*) before and after training, the share of the possible improvement in J, and the score's lead over
    that of pi*: (before, after, share, lead)."""
    pi, ref = response_logprobs(policy), response_logprobs(reference)
    star = (ref + SCORES / KL_COEF).log_softmax(1)

    def J(log_p):
        return mean(log_p, SCORES) - KL_COEF * kl(log_p, ref)

    return kl(ref, star), kl(pi, star), (J(pi) - J(ref)) / (J(star) - J(ref)), mean(pi, SCORES) - mean(star, SCORES)


# ---------------------------------------------------------------------------------------------------------------------
# the optimum is reached, and with another KL it is not. Measured on a CPU: 8 seeds of gpt end at 0.0015 to 0.011 with a
# share of 0.994 or more, 8 of Tabular at 1.4e-6 to 2.2e-5; each wrong KL, on 3 seeds or more of either, ends at 1.0 or
# more with a share of 0.41 or less.

SETTINGS = {gpt: dict(lr=3e-3, iters=150), Tabular: dict(lr=0.05, iters=200)}


def trained(make, seed, shape=shape_rewards):
    policy = make(seed)
    reference, ratio_error, gap = train(policy, seed, shape=shape, **SETTINGS[make])
    assert ratio_error == 0.0  # not even by a rounding: old_logprobs hold the very numbers that the update starts from
    assert gap < 1e-5      # by roundings only, as the cached pass sums in another order
    return evaluate(policy, reference)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("seed", [slow(0), slow(1), slow(2), slow(3)])
def test_the_real_model_reaches_the_optimum(seed):
    """It ends within 0.03 nats of it and gains 99 percent of all that can be gained."""
    before, after, share, _ = trained(gpt, seed)
    assert before > 1 and after <= 0.03 and share >= 0.99


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
def test_a_table_comes_within_00001_nats_of_the_optimum(seed):
    before, after, share, _ = trained(Tabular, seed)
    assert before > 1 and after <= 1e-4 and share >= 0.9999


def sign_flipped(scores, logprobs, ref_logprobs, mask, kl_coef):
    return shape_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)


def dropped(scores, logprobs, ref_logprobs, mask, kl_coef):
    return shape_rewards(scores, logprobs, ref_logprobs, mask, 0.0)


def k3(scores, logprobs, ref_logprobs, mask, kl_coef):
    return dropped(scores, logprobs, ref_logprobs, mask, kl_coef) - kl_coef * zero_outside(
        kl_estimate(logprobs, ref_logprobs, "k3"), mask)


@pytest.mark.parametrize("shape", [sign_flipped, dropped, k3])
@pytest.mark.parametrize("make", [Tabular, slow(gpt)])
def test_another_kl_in_the_reward_misses_the_optimum(make, shape):
    """Its score may even be higher."""
    before, after, share, lead = trained(make, 0, shape)
    assert before > 1 and after > 0.5 and share < 0.7
    if make is Tabular or shape is dropped:
        assert lead > 0.2
