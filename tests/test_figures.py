"""Tests of experiments/figures.py: docs/derivation.md shows what it draws, and the numbers behind it are right."""

import re

import pytest
import torch

from experiments import figures
from paths import ROOT


def test_the_derivation_shows_every_figure_of_the_script_and_no_other():
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.png\)", (ROOT / "docs/derivation.md").read_text())
    assert shown == list(figures.FIGURES)  # in the order of the sections
    assert {path.name for path in (ROOT / "docs/figures").iterdir()} == {f"{name}.png" for name in figures.FIGURES}


def test_every_section_of_the_derivation_has_a_figure():
    sections = re.split(r"^## (?=[IVX]+\. )", (ROOT / "docs/derivation.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) == 9 and not [text.split("\n")[0] for text in sections if "](figures/" not in text]


@pytest.mark.parametrize("name", ["tree", "clip", "kl"])
def test_a_figure_is_written(name, tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(figures.Config(str(tmp_path)), [name])
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_toy_language_has_40_responses_whose_probabilities_sum_to_1():
    assert len(set(figures.ROWS)) == 40 and abs(figures.P_OLD.sum() - 1) < 1e-12
    ends = zip(figures.ROWS, figures.LENS.tolist())
    assert all(row[-1] == figures.EOS or n == figures.R for row, n in ends)


def test_the_gradient_is_the_derivative_of_j_whatever_the_baseline():
    theta = figures.OLD.clone().requires_grad_()
    exact, = torch.autograd.grad(figures.probs(theta) @ figures.SCORES, theta)
    for b in (0, 3, figures.VALUES, figures.best_baseline()):
        assert torch.allclose(figures.gradient(figures.RETURNS - b)[0], exact.flatten(), rtol=0, atol=1e-12)


def test_the_variance_falls_from_no_baseline_over_v_to_the_best():
    none, value, best = (figures.gradient(figures.RETURNS - b)[1]
                         for b in (0, figures.VALUES, figures.best_baseline()))
    assert best < 0.95 * value < 0.5 * none
    for s in range(len(figures.PREFIXES)):  # no state's baseline can be moved without a loss
        for step in (-0.01, 0.01):
            moved = figures.best_baseline() + step * (figures.STATES == s)
            assert figures.gradient(figures.RETURNS - moved)[1] > best


def test_gae_is_biased_only_by_a_wrong_critic_and_lambda_below_1():
    def bias(error, lam):
        advantages, _ = figures.gae(figures.REWARDS, figures.VALUES + error, figures.MASK, 1.0, lam)
        return float((figures.gradient(advantages)[0] - figures.gradient(figures.ADVANTAGES)[0]).norm())

    wrong = figures.randn(len(figures.PREFIXES), seed=3)[figures.STATES]
    assert bias(0, 0.5) < 1e-12 and bias(wrong, 1.0) < 1e-12 < 0.01 < bias(wrong, 0.5)


def test_the_surrogate_touches_j_at_the_old_policy_with_its_slope():
    h = 1e-4
    J, L, KL, _ = figures.along_a_line([-h, 0.0, h])
    assert abs(J[1]) < 1e-12 and abs(L[1]) < 1e-12 and abs(KL[1]) < 1e-12
    slope = float(J[2] - J[0]) / (2 * h)
    assert abs(slope) > 0.05 and abs(float(L[2] - L[0]) / (2 * h) - slope) < 1e-3 * abs(slope)
    J, L, *_ = figures.along_a_line([0.75, 1.5])  # what the caption says
    assert L[1] > L[0] and J[1] < J[0]


def test_the_bound_is_below_j_along_the_line():
    C = figures.R * (figures.R - 1) * figures.ADVANTAGES.abs().max()
    J, L, KL, max_KL = figures.along_a_line(figures.linspace(-0.4, 0.4, 9))
    assert (J - (L - C * max_KL) >= -1e-6).all() and (max_KL >= 0).all() and (KL >= -1e-6).all()


def test_ppo_ends_at_the_optimum_of_its_beta():
    reference, beta = figures.randn(len(figures.PREFIXES), figures.V, seed=2), 0.3
    kl, score = figures.optimum(reference, beta)
    path = figures.ppo_path(reference, beta)
    mean_kl, mean_score = (sum(point[i] for point in path[-20:]) / 20 for i in (0, 1))
    assert score - beta * kl - 0.01 < mean_score - beta * mean_kl <= score - beta * kl + 1e-9
    assert abs(mean_kl - kl) < 0.1 and path[0][0] == 0


def test_the_optimum_is_worth_beta_log_z():
    """(IX.9) of docs/derivation.md, at the optimum."""
    reference, beta = figures.randn(len(figures.PREFIXES), figures.V, seed=2), 0.3
    kl, score = figures.optimum(reference, beta)
    log_z = (figures.probs(reference).log() + figures.SCORES / beta).logsumexp(0)
    assert abs(score - beta * kl - beta * float(log_z)) < 1e-12
