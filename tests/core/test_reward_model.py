"""Tests of reward_model.py: where a score is read, Bradley-Terry by hand, planted preference, calibration."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from data import Comparison, collate_comparisons, pad
from model import GPT, GPTConfig
from pretrained import LLAMA
from reward_model import RewardModel, bradley_terry_loss, calibration_table
from tensors import gap, random_ids, rng


V, BLOCK, EOS = 11, 16, 7
ids = partial(random_ids, V)
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
LENS = torch.tensor([9, 1, 4, 9, 6, 2])


TOKENS = ids(6, 9)
TOKENS[:, 0] = EOS  # an EOS in a prompt is not the end


def t(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def randomize(module):
    """Weights far from init, heads' biases included: at init attention is flat and hides bugs."""
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=rng(seed)))
    return module


def reward_model():
    return randomize(RewardModel(CONFIG)).double()


# -----------------------------------------------------------------------------
# the score

def test_score_is_read_at_the_last_real_token_whatever_the_padding():
    model = reward_model()
    alone = torch.cat([model(TOKENS[i:i + 1, :n], LENS[i:i + 1]) for i, n in enumerate(LENS)])
    assert gap(alone, torch.stack([model.head(model.trunk(TOKENS[i:i + 1, :n])[0, -1])
                                   for i, n in enumerate(LENS)])) <= 1e-12 and len(alone.unique()) == 6
    beyond = torch.arange(9) >= LENS[:, None]
    for pads in (0, 1, 7):
        for fill in (0, EOS, ids(6, 9, seed=2), ids(6, 9, seed=3)):
            padded = F.pad(torch.where(beyond, fill, TOKENS), (0, pads), value=EOS)
            assert gap(model(padded, LENS), alone) <= 1e-12


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [{}, LLAMA.kind], ids=["gpt2", "llama"])
def test_responses_in_one_row_score_as_in_rows_of_their_own(family, recompute):
    """Scores and gradients. The rows are longer than block_size, which no text is."""
    model = randomize(RewardModel(replace(CONFIG, **family))).double()
    model.trunk.recompute = recompute
    batch = [Comparison([1, 2, 3], [[4, EOS], [5, 6, 4, EOS], [4, EOS, EOS], [9] * 9 + [EOS]], [(0, 1)]),
             Comparison([8], [[EOS], [1, 2, EOS]], [(1, 0)])]
    *packed, chosen, rejected = collate_comparisons(batch, 0)
    assert packed[0].size(1) > BLOCK
    alone = pad([row.prompt + response for row in batch for response in row.responses], 0)
    weights, gradients = torch.arange(1.0, 7.0, dtype=torch.float64), []
    for texts in (packed, alone):
        scores = model(*texts)
        model.zero_grad()
        (scores * weights).sum().backward()
        gradients.append([scores.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert (chosen.tolist(), rejected.tolist()) == ([0, 5], [1, 4])


def test_gradient_enters_at_the_last_real_token_only():
    model, kept = reward_model(), []
    model.trunk.register_forward_hook(lambda *args: args[-1].retain_grad() or kept.append(args[-1]))
    model(TOKENS, LENS).sum().backward()
    assert torch.equal(kept[0].grad.abs().sum(-1) > 0, torch.arange(9) == LENS[:, None] - 1)


def test_from_policy_copies_the_trunk_and_no_other_head():
    policy = randomize(GPT(CONFIG))
    model = RewardModel.from_policy(policy)
    before = {f"trunk.{name}": w.clone() for name, w in policy.trunk.state_dict().items()}
    weights = model.state_dict()
    assert weights.keys() - before.keys() == {"head.linear.weight", "head.linear.bias", "gain", "bias"}
    assert all(torch.equal(weights[name], w) for name, w in before.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(TOKENS, LENS).sum().backward()
    optimizer.step()
    assert all(torch.equal(w, before[f"trunk.{name}"]) for name, w in policy.trunk.state_dict().items())
    assert not any(torch.equal(weights[name], w) for name, w in before.items())  # all of the copy is trained


@pytest.mark.parametrize("width", [16, 256])
def test_scores_start_with_a_spread_of_1_at_any_width(width):
    """A zero head would teach the trunk nothing. The final LayerNorm gives hidden states norm sqrt(width)."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=V, n_layer=1, n_head=1, n_embd=width)
    weights = torch.cat([RewardModel(config).head.linear.weight for _ in range(4096 // width)])
    assert abs(weights.std() * (width + 1) ** 0.5 - 1) < 0.05  # 4,096 draws: 4.5 standard errors of 0.011


# -----------------------------------------------------------------------------
# Bradley-Terry

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("delta, loss, gradient", [(0, math.log(2), -0.5), (-1000, 1000, -1), (1000, 0, 0),
                                                   (math.log(3), math.log(4 / 3), -0.25)])
def test_loss_and_gradient_of_one_pair(delta, loss, gradient, dtype):
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (delta + 2.0, 2.0))
    value, _ = bradley_terry_loss(chosen, rejected)
    value.backward()
    tol = 1e-15 if dtype == torch.float64 else 2e-7
    assert abs(value.item() - loss) <= tol and abs(chosen.grad.item() - gradient) <= tol
    assert rejected.grad == -chosen.grad


def test_loss_is_a_mean_that_only_sees_differences():
    chosen, rejected, shift = t([1., -2., .5, 4.]), t([0., 1., .5, 1.]), t([100., -7., 0., 3.])
    loss, stats = bradley_terry_loss(chosen, rejected)
    grad, = torch.autograd.grad(loss, chosen)
    assert gap(grad, -torch.sigmoid(rejected - chosen) / 4) <= 1e-15
    assert gap(loss, bradley_terry_loss(chosen + shift, rejected + shift)[0]) <= 1e-12  # one per prompt
    assert stats["accuracy"] == 0.5 and stats["margin"] == 0.25  # two right, one wrong; the tie is not right
    assert not stats["margin"].requires_grad


def test_all_pairs_from_one_pass_per_response_equal_each_pair_by_itself():
    """And the head's bias gets no gradient: the loss knows no zero, which is why scores are calibrated."""
    model = reward_model()
    params = dict(model.named_parameters())

    def gradients(loss):
        return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))

    def score(i):
        return model(TOKENS[i:i + 1], LENS[i:i + 1])

    scores, pairs = model(TOKENS[:4], LENS[:4]), torch.combinations(torch.arange(4))
    together, _ = bradley_terry_loss(scores[pairs[:, 0]], scores[pairs[:, 1]])
    one_by_one = sum(bradley_terry_loss(score(i), score(j))[0] for i, j in pairs) / 6
    assert gap(together, one_by_one) <= 1e-12
    a, b = gradients(together), gradients(one_by_one)
    assert all(gap(a[name], b[name]) <= 1e-12 for name in params) and a["trunk.wte.weight"].abs().max() > 1e-3
    assert a["head.linear.bias"].abs() <= 1e-15
    # Equal answers: a loss of ln 2 that teaches nothing, which is why they are dropped from the data
    tie, _ = bradley_terry_loss(score(0), score(0))
    assert abs(tie.item() - math.log(2)) <= 1e-15
    assert all(g.abs().max() <= 1e-15 for g in gradients(tie).values())


def test_planted_preference_is_learned():
    """The answer with more 3s is preferred, and what stands beyond an answer's end does not count."""
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)

    def margins(seed):
        tokens, lens = ids(512, 8, seed), torch.randint(4, 9, (512,), generator=rng(seed))
        count = ((tokens == 3) & (torch.arange(8) < lens[:, None])).sum(1)
        better = (count[:256] - count[256:]).sign()
        scores = model(tokens, lens)
        return ((scores[:256] - scores[256:]) * better)[better != 0]

    for step in range(100):
        optimizer.zero_grad()
        bradley_terry_loss(margins(1000 + step), torch.zeros(()))[0].backward()
        optimizer.step()
    with torch.no_grad():
        heldout = torch.cat([margins(seed) for seed in range(4)])
    assert (heldout > 0).double().mean() > 0.95


# -----------------------------------------------------------------------------
# calibration

def calibrated(seed=5, N=64):
    """A model calibrated on N random answers, with their scores before and after."""
    model, tokens, lens = reward_model(), ids(N, 9, seed), torch.randint(1, 10, (N,), generator=rng(seed))
    with torch.no_grad():
        raw = model(tokens, lens)
        model.calibrate(raw)
        return model, tokens, lens, raw, model(tokens, lens)


@torch.no_grad()
def test_calibration_gives_mean_0_and_std_1():
    """It keeps the ranking and survives a checkpoint."""
    model, tokens, lens, raw, scores = calibrated()
    assert torch.equal(raw.argsort(), scores.argsort()) and abs(raw.mean()) > 0.1
    copy = RewardModel(CONFIG).double()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(tokens, lens), scores)
    assert {"gain", "bias"}.isdisjoint(name for name, _ in model.named_parameters())  # never trained
    model.calibrate(model(TOKENS, LENS))  # a second time, on other answers: composes with the first
    for x in (scores, model(TOKENS, LENS)):
        assert abs(x.mean()) <= 1e-12 and abs(x.std(unbiased=False) - 1) <= 1e-12
    model.reset_calibration()
    assert torch.equal(model(tokens, lens), raw)


@pytest.mark.parametrize("scores", [[0.5] * 8, [0.1] * 512, [3.], [1., math.nan]])
def test_scores_without_a_spread_cannot_be_calibrated(scores):
    """The model stays as it was."""
    model, tokens, lens, _, before = calibrated()
    with pytest.raises(FloatingPointError, match="no spread"):
        model.calibrate(torch.tensor(scores))
    assert torch.equal(model(tokens, lens), before)


def test_a_critic_has_no_policy_head_of_its_own():
    model = RewardModel(GPTConfig(BLOCK, V, 1, 2, 16, tied=False, position="rope"))
    critic = model.as_critic()
    assert not any("lm_head" in name for name in critic.state_dict())
    tokens, lens = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    assert critic.value_head(critic(tokens))[0, 2] == model(tokens, lens)[0]


def test_critic_values_every_prefix_at_its_calibrated_score():
    model, tokens, _, _, _ = calibrated()
    model = model.float()
    critic = model.as_critic()
    assert isinstance(critic, GPT) and not critic.training
    values = critic.value_head(critic(tokens))
    for n in range(1, 10):
        assert gap(values[:, n - 1], model(tokens, torch.full((64,), n))) <= 1e-5
    owned = {p.data_ptr() for p in model.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in critic.parameters())


def test_calibration_table_by_hand():
    """Confidences .75 .6 .6 .9 .9 and a rounded 1; where the margin is negative the labeller disagreed."""
    odds = torch.tensor([3., -1.5, 1.5, 9., -9.], dtype=torch.float64)
    margins = torch.cat([odds.abs().log() * odds.sign(), torch.tensor([40.])])
    assert calibration_table(margins, n_bins=2) == [(0.5, 0.75, 2, pytest.approx(0.6), 0.5),
                                                    (0.75, 1.0, 4, pytest.approx(3.55 / 4), 0.75)]
    assert [row[2] for row in calibration_table(margins)] == [2, 1, 3]  # empty bins are left out
