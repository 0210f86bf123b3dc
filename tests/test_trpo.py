"""
Tests of experiments/trpo.py on a language small enough to list: 40 responses, so the Fisher matrix, its pseudo-inverse
and every expectation are exact sums, in float64. Then training runs of a tiny model on atlas.
"""

import dataclasses
import json
import math
import runpy
import shutil
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_ppo
from enumerable import enumerate_responses
from experiments import trpo
from experiments.trpo import (conjugate_gradient, fisher_vector_product, flat_grad, line_search, response_distributions,
                              set_flat, token_kl, trpo_step)
from model import GPT, GPTConfig
from ppo import cpi_loss, zero_outside
from rollout import score_response
from support import flags
from support.flags import UserError
from tensors import randn

RESPONSES, MASK = enumerate_responses(vocab_size=4, max_len=3)
(N, R), TEMPERATURE = MASK.shape, 0.7
TOKENS = torch.cat([torch.ones(N, 1, dtype=torch.long), RESPONSES], dim=1)  # after a prompt of one token
PROMPT_LENS = torch.ones(N, dtype=torch.long)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def same_bits(a, b):
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


class Problem:
    """A policy of 3,440 random weights, random advantages, and exact expectations over all responses."""

    def __init__(self, seed=0):
        self.policy = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=2, n_embd=16)).double()
        for i, (name, p) in enumerate(self.policy.named_parameters()):
            p.data = ("ln_" in name and name.endswith("weight")) + 0.15 * randn(*p.shape, seed=1000 * seed + i)
        self.params = list(self.policy.trunk.parameters())
        self.advantages = randn(N, R, seed=seed)
        self.renew()

    def renew(self):
        """The policy as it is now becomes pi_old."""
        with torch.no_grad():
            self.old_logprobs, self.old = self.logprobs(), self.distributions()
        self.weights = zero_outside(self.old_logprobs, MASK).sum(1, keepdim=True).exp()  # (N, 1) probabilities

    @sdpa_kernel(SDPBackend.MATH)
    def logprobs(self):
        return score_response(self.policy, TOKENS, PROMPT_LENS, R, TEMPERATURE)[0]

    @sdpa_kernel(SDPBackend.MATH)  # the attention that can be differentiated twice
    def distributions(self):
        return response_distributions(self.policy, TOKENS, PROMPT_LENS, R, TEMPERATURE)

    def surrogate(self):
        """E[sum over tokens of ratio * A]: cpi_loss is a mean over MASK.sum() tokens that count alike."""
        advantages = self.advantages * self.weights * MASK.sum()
        return -cpi_loss(self.logprobs(), self.old_logprobs, advantages, MASK)[0]

    def kl(self):
        return (zero_outside(token_kl(self.old, self.distributions()), MASK) * self.weights).sum()

    def scores(self):
        """(N, 3440), F = scores^T scores by definition: row y is sqrt(p(y)) times the gradient of log p(y)."""
        logprobs = zero_outside(self.logprobs(), MASK).sum(1)
        return self.weights.sqrt() * torch.stack([flat_grad(x, self.params, retain_graph=True) for x in logprobs])

    def fisher_product(self, v):
        return self.scores().t() @ (self.scores() @ v)

    def gradient(self):
        return flat_grad(self.surrogate(), self.params)

    def matvec(self, damping):
        kl_grad = flat_grad(self.kl(), self.params, create_graph=True)
        return lambda v: fisher_vector_product(kl_grad, self.params, v) + damping * v

    def natural(self):
        """F^+ g. F has 39 eigenvalues above 1e-4, 13 states times the 3 freedoms of 4 probabilities, and no others."""
        _, sigma, v = torch.linalg.svd(self.scores(), full_matrices=False)
        assert sigma[38] ** 2 > 1e-4 and sigma[39] ** 2 < 1e-20
        return v[:39].t() @ (v[:39] @ self.gradient() / sigma[:39] ** 2)


@pytest.fixture
def problem():
    return Problem()


# ----------------------------------------------------------------------------------------------------------
# the parts of a step, exactly

def test_distributions_hold_the_log_probs_that_rollouts_are_scored_with(problem):
    distributions = problem.distributions()
    assert torch.equal(distributions.gather(2, RESPONSES.unsqueeze(2)).squeeze(2)[MASK], problem.logprobs()[MASK])
    assert (distributions.exp().sum(-1) - 1).abs().max() < 1e-14


def test_token_kl_sums_to_the_kl_of_responses(problem):
    """The chain rule of KL(pi_old || pi). KL(pi || pi_old) of the same two policies is another number."""
    set_flat(problem.params, flat(problem.params) + 0.1 * randn(3440, seed=5))
    with torch.no_grad():
        ratio = zero_outside(problem.logprobs() - problem.old_logprobs, MASK).sum(1)
        exact = -(problem.weights.squeeze(1) * ratio).sum()
        assert abs(problem.kl() - exact) < 1e-13 and exact > 0.05
        assert abs((problem.weights.squeeze(1) * ratio.exp() * ratio).sum() - exact) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_fisher_vector_product_is_exact(seed):
    """F is the mean outer product of the gradients of responses."""
    problem, v = Problem(seed), randn(3440, seed=7)
    assert relative(problem.matvec(damping=0)(v), problem.fisher_product(v)) < 1e-13


def test_fisher_vector_products_are_linear_and_symmetric(problem):
    """They may be taken repeatedly from one graph."""
    product, u, v = problem.matvec(damping=0), randn(3440, seed=1), randn(3440, seed=2)
    assert relative(product(2 * u - 3 * v), 2 * product(u) - 3 * product(v)) < 1e-13
    assert abs(u @ product(v) - v @ product(u)) < 1e-12 * abs(u @ product(v))


@pytest.mark.parametrize("n", [1, 5, 30])
def test_conjugate_gradient_takes_one_product_per_eigenvalue(n):
    """It solves a system of n distinct eigenvalues in at most n products."""
    q, _ = torch.linalg.qr(randn(30, 30, seed=0))
    matrix, b = q * torch.linspace(1, 2, n).double().repeat(30 // n) @ q.t(), randn(30, seed=1)
    calls = []

    def matvec(v):
        calls.append(v)
        return matrix @ v

    x = conjugate_gradient(matvec, b, iters=n)
    assert relative(x, torch.linalg.solve(matrix, b)) < 1e-9 and len(calls) <= n
    assert n < 30 or len(calls) > 5  # a narrow spectrum: it need not use all


def test_conjugate_gradient_ends_at_its_tolerance_or_its_iterations():
    """For a right-hand side of 0 it gives 0."""
    matrix, b = torch.diag(torch.logspace(0, 3, 20).double()), randn(20, seed=1)
    errors = [relative(matrix @ conjugate_gradient(lambda v: matrix @ v, b, 100, tolerance), b)
              for tolerance in (1e-1, 1e-4, 1e-8)]
    assert errors[0] < 1e-1 and errors[1] < 1e-4 and errors[2] < 1e-8
    assert errors[0] > 1e-4 and errors[1] > 1e-8  # and no further than asked
    calls = []
    conjugate_gradient(lambda v: calls.append(v) or matrix @ v, b, 3)
    assert len(calls) == 3
    assert torch.equal(conjugate_gradient(lambda v: matrix @ v, 0 * b, 5), 0 * b)


@pytest.mark.parametrize("seed", range(3))
def test_the_natural_direction_is_exact(seed):
    """The direction is the pseudo-inverse of the exact Fisher matrix times the gradient. Damping d changes the part
    along an eigenvalue e by d / e: at most 1e-10 / 1e-4."""
    problem = Problem(seed)
    direction = conjugate_gradient(problem.matvec(damping=1e-10), problem.gradient(), iters=300)
    assert relative(direction, problem.natural()) < 1e-6


# ----------------------------------------------------------------------------------------------------------
# the line search

def search(kl, surrogate, step=1.0, delta=0.5, start=0.0, **settings):
    """Along one parameter x, from `start`; kl and surrogate are functions of x. Returns x and the stats."""
    x = torch.tensor([start], dtype=torch.float64)
    stats = line_search([x], torch.tensor([step], dtype=torch.float64), lambda: surrogate(x)[0], lambda: kl(x)[0],
                        surrogate(x)[0].clone(), delta, **settings)
    return x.item(), stats


@pytest.mark.parametrize("kl, surrogate, fraction", [
    (lambda x: x ** 2 / 2, lambda x: x, 1.0),                     # the constraint is met with equality
    (lambda x: x ** 2 / 2 + 1e-9, lambda x: x, 0.5),              # and missed by a hair
    (lambda x: 8 * x ** 2, lambda x: x, 0.25),                    # the constraint asks for two halvings
    (lambda x: 0 * x, lambda x: x * (0.2 - x), 0.125),            # the surrogate asks for three
    (lambda x: 8 * x ** 2, lambda x: x * (0.2 - x), 0.125),       # both: the smaller of the two
    (lambda x: 0 * x, lambda x: x - (x > 0.3).double(), 0.25),
    (lambda x: torch.where(x > 0.3, math.nan, 0 * x), lambda x: x, 0.25),   # NaN is out of bounds, not in
    (lambda x: 0 * x, lambda x: torch.where(x > 0.3, math.nan, x), 0.25)])
def test_line_search_takes_the_longest_step_that_meets_both(kl, surrogate, fraction):
    """It must meet the constraint and raise the surrogate."""
    x, stats = search(kl, surrogate, shrink=0.5)
    assert x == fraction == stats["step_fraction"]
    at = torch.tensor([fraction], dtype=torch.float64)
    assert stats["approx_kl"] == kl(at) and stats["surrogate_gain"] == surrogate(at) - surrogate(0 * at)


@pytest.mark.parametrize("kl, surrogate", [
    (lambda x: x * 0 + 1, lambda x: x), (lambda x: 0 * x, lambda x: -x), (lambda x: 0 * x, lambda x: 0 * x),
    (lambda x: 0 * x + math.nan, lambda x: x), (lambda x: 0 * x, lambda x: torch.where(x == 0.1, x, math.nan))])
def test_line_search_puts_the_parameters_back_when_no_try_will_do(kl, surrogate):
    x, stats = search(kl, surrogate, start=0.1, step=0.3)  # 0.1 + 0.3 - 0.3 is not 0.1
    assert x == 0.1 and set(stats.values()) == {0}
    assert set(stats) == {"step_fraction", "approx_kl", "surrogate_gain"}


def test_line_search_gives_up_after_its_tries():
    assert search(lambda x: x, lambda x: x, delta=0.5 ** 9, shrink=0.5)[0] == 0.5 ** 9
    assert search(lambda x: x, lambda x: x, delta=0.5 ** 10, shrink=0.5)[0] == 0
    assert search(lambda x: x, lambda x: x, delta=0.5 ** 10, shrink=0.5, tries=11)[0] == 0.5 ** 10


# ----------------------------------------------------------------------------------------------------------
# whole steps

def exact_step(problem, delta):
    natural = problem.natural()
    return math.sqrt(2 * delta / (problem.gradient() @ natural)) * natural


def step(problem, delta, damping=1e-10, cg_iters=300, **settings):
    return trpo_step(problem.params, problem.surrogate, problem.kl, delta, damping, cg_iters, **settings)


def proposed(problem, monkeypatch, *args, **settings):
    """The step that trpo_step hands to the line search."""
    monkeypatch.setattr(trpo, "line_search", lambda params, step, *rest: {"step": step})
    return step(problem, *args, **settings)["step"]


def test_the_proposed_step_has_the_length_of_the_derivation(problem, monkeypatch):
    """It is sqrt(2 delta / (g F^-1 g)) along the natural direction."""
    for delta in (1e-6, 1e-2):
        assert relative(proposed(problem, monkeypatch, delta), exact_step(problem, delta)) < 1e-6


@pytest.mark.parametrize("damping", [1e-10, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_the_full_step_attains_a_kl_of_delta_the_closer_the_smaller_delta(seed, damping, monkeypatch):
    """The KL's error is of third order in the step, so KL / delta - 1 falls as sqrt(delta): tenfold for a hundredth."""
    errors = []
    for delta in (1e-6, 1e-8):
        problem = Problem(seed)
        set_flat(problem.params, flat(problem.params) + proposed(problem, monkeypatch, delta, damping))
        errors.append(abs(problem.kl().item() / delta - 1))
    assert errors[1] < 0.01 and 7 < errors[0] / errors[1] < 13


def test_at_equal_kl_the_natural_step_gains_more_than_the_gradient(problem, monkeypatch):
    """The gain is the one that theory gives."""
    delta, gradient = 1e-8, problem.gradient()
    before, start = problem.surrogate().item(), flat(problem.params)
    best, curvature = math.sqrt(2 * delta * (gradient @ problem.natural())), problem.fisher_product(gradient)

    def gain(step):
        set_flat(problem.params, start + step)
        return problem.surrogate().item() - before

    natural = gain(proposed(problem, monkeypatch, delta))
    plain = gain(math.sqrt(2 * delta / (gradient @ curvature)) * gradient)
    assert abs(natural / best - 1) < 0.002 and 0 < plain < 0.9 * natural


def test_curvature_is_of_fisher_kl_fn_and_the_constraint_of_kl_fn(problem, monkeypatch):
    full = proposed(problem, monkeypatch, 1e-4)
    half = proposed(problem, monkeypatch, 1e-4, damping=4e-10, fisher_kl_fn=lambda: 4 * problem.kl())
    assert relative(half, full / 2) < 1e-6
    monkeypatch.undo()
    stats = step(problem, 1e-4, fisher_kl_fn=lambda: problem.kl() / 4)  # proposes twice the length: four times the KL
    assert 0 < stats["step_fraction"] < 0.6 and problem.kl() == stats["approx_kl"] <= 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_every_step_holds_the_constraint_and_raises_the_surrogate(seed):
    """Settings from sensible to absurd. Rejected steps leave no trace."""
    problem, rng = Problem(seed), torch.Generator().manual_seed(seed)
    fractions = []
    for n in range(12):
        problem.advantages = randn(N, R, seed=100 * seed + n)
        delta, damping = (10 ** (low + 4 * torch.rand((), generator=rng).item()) for low in (-3, -4))
        start, before = flat(problem.params), problem.surrogate().item()
        stats = step(problem, delta, damping, cg_iters=1 + n)
        with torch.no_grad():
            kl, gain = problem.kl().item(), problem.surrogate().item() - before
        assert (kl, gain) == (stats["approx_kl"], stats["surrogate_gain"])
        assert kl <= delta and gain >= 0
        assert same_bits(flat(problem.params), start) == (stats["step_fraction"] == 0) == (gain == 0)
        fractions.append(stats["step_fraction"])
        problem.renew()
    assert max(fractions) == 1 and min(fractions) < 1  # the settings do ask for backtracking


@pytest.mark.parametrize("broken", ["falls", "kl", "nan surrogate", "nan kl", "no gradient"])
def test_a_rejected_step_restores_the_parameters_bit_for_bit(broken, problem):
    """A step is rejected when no fraction of it meets the constraint and raises the surrogate."""
    start = flat(problem.params)

    def moved():
        return sum((p - s.view_as(p)).abs().sum() for p, s in
                   zip(problem.params, start.split([p.numel() for p in problem.params])))

    def surrogate():
        value = problem.surrogate() * (0 if broken == "no gradient" else 1)
        penalty = {"falls": 1e6, "nan surrogate": math.nan}.get(broken, 0) if moved() > 0 else 0
        return value - penalty

    def kl():
        return problem.kl() + ({"kl": 1.0, "nan kl": math.nan}.get(broken, 0) if moved() > 0 else 0)

    stats = trpo_step(problem.params, surrogate, kl, 0.01, 0.1, 10)
    assert same_bits(flat(problem.params), start)
    assert stats["step_fraction"] == stats["surrogate_gain"] == stats["approx_kl"] == 0


def test_a_step_leaves_no_gradient_behind_and_reports_norm_and_residual(problem):
    gradient = problem.gradient()
    stats = step(problem, 0.01, damping=0.1, cg_iters=3)
    assert all(p.grad is None for p in problem.params)
    assert stats["grad_norm"] == gradient.norm()
    problem = Problem()
    x = conjugate_gradient(problem.matvec(0.1), gradient, 3)
    assert abs(stats["cg_residual"] - relative(problem.matvec(0.1)(x), gradient)) < 1e-9


# ----------------------------------------------------------------------------------------------------------
# training runs on atlas

TINY = dict(max_iters=3, batch_size=24, minibatches=2, epochs=1, fisher_rows=12, max_new_tokens=8, device="cpu")


@pytest.fixture(scope="module")
def atlas(worlds):
    """The folder with finished sft.pt and rm.pt on atlas; tests write into copies of it."""
    return worlds["atlas"]


@pytest.fixture
def run(atlas, tmp_path):
    """run(folder name, **flags) -> (final metrics, rows of stage trpo, checkpoint), in a copy of that folder."""
    def go(name="run", **flags):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(atlas, folder)
        final = trpo.train(trpo.Config(**TINY | {"out_dir": str(folder)} | flags))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "trpo" and "iter" in row]
        return final, rows, torch.load(folder / "trpo.pt", weights_only=True)
    return go


def test_a_run_on_atlas_holds_the_constraint_and_writes_its_metrics(run, atlas):
    final, rows, checkpoint = run(delta=0.02)
    assert [row["iter"] for row in rows] == [1, 2, 3] and final == rows[-1]
    names = ("episodes score kl reward gold entropy approx_kl surrogate_gain step_fraction grad_norm cg_residual "
             "value_loss explained_variance response_len eos_rate kl_coef lr skipped_steps seconds sec_rollout "
             "sec_score sec_update").split()
    for row in rows:
        assert all(math.isfinite(row[name]) for name in names)
        assert 0 < row["approx_kl"] <= 0.02 and row["surrogate_gain"] > 0 and 0 < row["step_fraction"] <= 1
        assert row["reward"] == pytest.approx(row["score"] - 0.05 * row["kl"] - 1.0 * (1 - row["eos_rate"]), abs=1e-5)
    assert rows[0]["kl"] == 0 and rows[1]["kl"] != 0  # the reference stays where the policy began
    assert "gold_heldout" in rows[0] and "gold_heldout" not in rows[1] and "gold_heldout" in final
    sft, rm = (torch.load(atlas / f"{name}.pt", weights_only=True)["model"] for name in ("sft", "rm"))
    for name, weights in checkpoint["model"].items():
        assert torch.equal(weights, sft[name]) == name.startswith("value_head"), name
    assert not torch.equal(checkpoint["critic"]["trunk.wte.weight"], rm["trunk.wte.weight"])
    assert checkpoint["finished"] and checkpoint["iter"] == 3


def test_a_policy_that_stands_still_samples_and_scores_what_train_ppo_does(run, atlas, tmp_path):
    """So that the two can be compared rollout by rollout: same prompts in the same order, same random numbers."""
    flags = {"temperature": 0.7, "eos_penalty": 2.0, "kl_coef": 0.5, "seed": 3}
    _, rows, _ = run(delta=1e-30, **flags)
    folder = tmp_path / "ppo"
    shutil.copytree(atlas, folder)
    same = {name: value for name, value in TINY.items() if name != "fisher_rows"}
    train_ppo.train(train_ppo.Config(out_dir=str(folder), lr=0.0, **same, **flags))
    theirs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    theirs = [row for row in theirs if row["stage"] == "ppo" and "iter" in row]
    names = "episodes score reward gold utility entropy response_len eos_rate kl_coef".split()
    for ours, row in zip(rows, theirs, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(row[name], abs=1e-5), name
    assert rows[-1]["gold_heldout"] == theirs[-1]["gold_heldout"]


def test_both_kls_are_zero_where_a_step_begins(run, monkeypatch):
    """The Fisher matrix is measured on some of the rows."""
    real, kls = trpo.trpo_step, []

    def spy(params, surrogate_fn, kl_fn, *args, fisher_kl_fn):
        with torch.no_grad():
            start = flat(params)
            set_flat(params, 1.1 * start)
            moved = kl_fn().item(), fisher_kl_fn().item()
            set_flat(params, start)
            kls.append((kl_fn().item(), fisher_kl_fn().item(), *moved))
        return real(params, surrogate_fn, kl_fn, *args, fisher_kl_fn=fisher_kl_fn)

    monkeypatch.setattr(trpo, "trpo_step", spy)
    run()
    for kl, fisher_kl, moved, fisher_moved in kls:
        assert kl == 0 and abs(fisher_kl) < 1e-6  # fewer rows may round differently
        assert moved > 1e-4 and 0.5 < fisher_moved / moved < 2 and fisher_moved != moved


def test_the_score_rises(run):
    _, rows, _ = run(max_iters=12, batch_size=96, fisher_rows=24, delta=0.03, kl_coef=0.0)
    scores = [row["score"] for row in rows]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


@pytest.fixture(scope="module")
def base(atlas, tmp_path_factory):
    """The checkpoint of a run of two iterations with no flag changed."""
    folder = tmp_path_factory.mktemp("base") / "run"
    shutil.copytree(atlas, folder)
    trpo.train(trpo.Config(**TINY | {"out_dir": str(folder), "max_iters": 2}))
    return torch.load(folder / "trpo.pt", weights_only=True)


@pytest.mark.parametrize("name, value", {
    "delta": 0.001, "damping": 0.1, "cg_iters": 2, "fisher_rows": 24, "minibatches": 1, "epochs": 2, "lr": 1e-2,
    "lr_decay_iters": 2, "grad_clip": 1e-3, "max_new_tokens": 4, "temperature": 0.7, "kl_coef": 1.0, "gamma": 0.5,
    "lam": 0.5, "eos_penalty": 3.0, "seed": 1, "batch_size": 12}.items())
def test_every_flag_does_something(name, value, run, base):
    _, _, changed = run(max_iters=2, **{name: value})
    assert any(not torch.equal(base[module][key], changed[module][key]) for module in ("model", "critic")
               for key in base[module])


def test_a_run_that_is_resumed_equals_one_that_was_never_stopped(run):
    _, rows, whole = run("whole", max_iters=4)
    run("parts", max_iters=2)
    final, parts_rows, parts = run("parts", max_iters=4, resume=True)
    clocks = {"seconds", "sec_rollout", "sec_score", "sec_update", "gold_heldout", "score_heldout", "kl_heldout"}
    assert [{k: v for k, v in row.items() if k not in clocks} for row in rows] == \
           [{k: v for k, v in row.items() if k not in clocks} for row in parts_rows]
    for module in ("model", "critic"):
        assert all(torch.equal(whole[module][key], parts[module][key]) for key in whole[module])


def test_an_error_behind_the_policys_step_saves_no_moved_policy(run, monkeypatch, tmp_path):
    """The step is not the optimizer's. A policy saved behind it would take it twice when resumed."""
    step = trpo.trpo_step

    def fails(params, *args, **kwargs):
        stats, seen = step(params, *args, **kwargs), fails.calls
        fails.calls += 1
        return 1 / 0 if seen == 1 else stats
    fails.calls = 0
    monkeypatch.setattr(trpo, "trpo_step", fails)
    with pytest.raises(ZeroDivisionError):
        run()
    assert not (tmp_path / "run" / "trpo.pt").exists()


def command(monkeypatch, *flags):
    """What `python -m experiments.trpo flags` does; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["trpo.py", "--device=cpu", *flags])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(trpo.__file__, run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize("missing", ["sft", "rm"])
def test_a_missing_policy_or_reward_model_exits_2(missing, atlas, tmp_path, monkeypatch, capsys):
    """The message names the script that trains it."""
    out = tmp_path / "out"
    if missing == "rm":
        out.mkdir()
        shutil.copy(atlas / "sft.pt", out)
    assert command(monkeypatch, f"--out_dir={out}") == 2
    error = capsys.readouterr().err
    assert f"{missing}.pt is not there" in error and f"train_{missing}.py" in error and error.count("\n") == 1
    assert not {"trpo.pt", "metrics.jsonl"} & {path.name for path in out.glob("*")}


@pytest.mark.parametrize("flags, word", [
    (["--fisher_rows=300"], "--fisher_rows"), (["--batch_size=10"], "--minibatches"), (["--compile"], "--compile"),
    (["--micro_batch_size=8"], "--micro_batch_size"), (["--recompute"], "--recompute"),
    (["--dtype=bfloat16"], "--dtype"), (["--delta=0"], "--delta"),
    (["--damping=-1"], "--damping"), (["--cg_iters=0"], "--cg_iters"), (["--resume", "--overwrite"], "--resume"),
    (["--clip=0.2"], "--clip"), (["--data=nowhere.jsonl"], "nowhere.jsonl")])
def test_flags_that_make_no_sense_end_in_a_sentence_and_exit_2(flags, word, atlas, tmp_path, monkeypatch, capsys):
    shutil.copytree(atlas, tmp_path / "out")
    assert command(monkeypatch, f"--out_dir={tmp_path / 'out'}", *flags) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out" / "trpo.pt").exists()


def test_a_finished_run_is_not_written_over_unless_told_to(run):
    run()
    with pytest.raises(UserError, match="--overwrite"):
        run()
    run(overwrite=True)


def test_every_flag_has_a_help(capsys):
    with pytest.raises(SystemExit):
        flags.parse_flags(trpo.Config, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(trpo.Config))
