"""Tests of support/optimizer.py: the guarded optimizer step and the learning rate."""

import math

import pytest
import torch

from support.checkpoint import digest
from support.optimizer import Optimizer, learning_rate
from tiny import Config, make_optimizer, take_step


def state_bytes(optimizer, params):
    return digest({"params": [p.detach() for p in params], "adamw": optimizer.adamw.state_dict()})


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_no_weight_and_no_moment(poison, capsys):
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    before = state_bytes(optimizer, params)
    _, norm = take_step(optimizer, params, 2, poison)
    assert not math.isfinite(norm) and state_bytes(optimizer, params) == before
    assert optimizer.skipped == 1 and "iteration 2" in capsys.readouterr().out
    assert all(p.grad is None or not p.grad.any() for p in params)
    take_step(optimizer, params, 3)
    assert state_bytes(optimizer, params) != before  # a bad step poisons nothing that comes after


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_non_finite_loss_is_no_step_either(loss, capsys):
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    before = state_bytes(optimizer, params)
    _, norm = take_step(optimizer, params, 2, loss=loss)
    assert math.isfinite(norm) and state_bytes(optimizer, params) == before and optimizer.skipped == 1
    assert f"iteration 2: loss {float(loss)}, gradient norm 0.67" in capsys.readouterr().out


def test_the_run_stops_after_max_bad_steps_in_a_row():
    """A good step resets the count."""
    optimizer, params = make_optimizer(max_bad_steps=3)
    for i, poison in enumerate([math.nan, math.nan, None, math.nan, math.nan]):
        take_step(optimizer, params, i, poison)
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        take_step(optimizer, params, 5, math.nan)
    assert optimizer.skipped == 5


def test_gradients_are_clipped_to_their_joint_norm():
    """The reported norm is the one before clipping. AdamW's first step does not depend on the gradient's size, but its
    first moment does."""
    optimizer, params = make_optimizer(grad_clip=0.1)
    lr, norm = take_step(optimizer, params)
    assert lr == 0.1 and norm == pytest.approx(0.3 * math.sqrt(5), rel=1e-6)
    moments = torch.cat([state["exp_avg"] for state in optimizer.adamw.state.values()]) / (1 - 0.9)
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm


def test_steps_are_those_of_adam_with_the_usual_constants():
    """beta 0.9 and 0.999, eps 1e-8, both moments with their bias corrected, by hand. The first gradient is so small
    that eps counts. float64: a few dozen roundings."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer, m, v, expected = Optimizer([weight], Config(lr=0.1)), 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
    for t, gradient in enumerate(([1e-7, 0.3], [2e-7, -0.1], [0.0, 0.2]), 1):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * weight.grad, 0.999 * v + 0.001 * weight.grad ** 2
        expected -= 0.1 * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
        optimizer.step(t, 0.5)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)


def test_weights_without_a_gradient_do_not_decay():
    optimizer, params = make_optimizer()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(1, 0.5)
    assert params[0].tolist() == [0, 1, 2]


def test_frozen_parameters_are_not_the_optimizers():
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    assert len(Optimizer([torch.nn.Parameter(torch.ones(1)), frozen], Config(lr=0.1)).params) == 1


def test_optimizer_state_survives_a_checkpoint_bit_for_bit():
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    take_step(optimizer, params, 2, math.nan)
    other, twins = make_optimizer()
    other.load(optimizer.state())
    for p, twin in zip(params, twins):
        twin.data.copy_(p)
    take_step(optimizer, params, 3), take_step(other, twins, 3)
    assert state_bytes(optimizer, params) == state_bytes(other, twins)
    assert (other.skipped, other.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize("decay, iteration, lr", [
    (None, 10**6, 0.1), (4, 1, 0.1), (4, 2, 0.075), (4, 4, 0.025), (4, 5, 0.0), (4, 9, 0.0)])
def test_learning_rate_decays_over_its_own_horizon(decay, iteration, lr):
    config = Config(lr=0.1, lr_decay_iters=decay, max_iters=2)
    assert learning_rate(config, iteration) == pytest.approx(lr, rel=1e-15)


def test_the_decayed_rate_is_the_one_that_is_used():
    optimizer, params = make_optimizer(lr_decay_iters=2)
    assert take_step(optimizer, params, 2)[0] == 0.05
    # AdamW's first step is lr times the sign of the gradient
    assert params[1].tolist() == pytest.approx([0.95, 0.95])
