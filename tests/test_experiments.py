"""Tests of experiments/ladder.py and experiments/overoptimization.py: their arithmetic, and a tiny run of each."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest

import train_rm
import train_sft
from experiments import ladder, overoptimization, rungs
from paths import ROOT
from support.checkpoint import load_checkpoint


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_weights_are_an_average_over_every_subset(n):
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    expected = np.mean([max(subset) for subset in itertools.combinations(values, n)])
    assert np.isclose(overoptimization.best_of_n_weights(n, 5) @ sorted(values), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_best_of_n_kl_is_that_of_the_distribution_which_draws_make(n):
    p = np.array([0.5, 0.2, 0.3])
    draws = itertools.product(range(3), repeat=n)
    best = np.zeros(3)
    for draw in draws:
        best[max(draw)] += np.prod(p[list(draw)])
    kl = overoptimization.best_of_n_kl(p, n)
    assert np.isclose(kl, (best * np.log(best / p)).sum(), rtol=1e-12) and 0 < kl < math.log(n) - (n - 1) / n
    assert overoptimization.best_of_n_kl(p, 1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("second", [np.log, lambda d: d], ids=["PPO", "best of n"])
def test_the_fit_finds_the_coefficients_that_made_the_curve(second):
    d = np.linspace(0.1, 4, 30)
    found = overoptimization.fit(d, d * (1.7 - 0.4 * second(d)), second)
    assert found == pytest.approx({"a": 1.7, "b": 0.4, "r2": 1.0})
    noisy = overoptimization.fit(d, d * (1.7 - 0.4 * second(d)) + np.random.default_rng(0).normal(size=30), second)
    assert noisy["r2"] < 0.99


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """out_dir with seed0/sft.pt and rm.pt of a tiny model, so that the experiments find the shared stages finished."""
    out_dir = tmp_path_factory.mktemp("experiments")
    folder = str(out_dir / "seed0")
    train_sft.train(train_sft.Config(out_dir=folder, device="cpu", max_iters=80, batch_size=32, lr=3e-3, n_layer=1,
                                     n_head=2, n_embd=32, block_size=64))
    train_rm.train(train_rm.Config(out_dir=folder, device="cpu", max_iters=3, batch_size=4, candidates=3))
    return out_dir


@pytest.mark.slow
def test_the_ladder_runs_every_rung_once_and_measures_it(stages, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "import_pyplot", lambda: None)  # drawing is for those who have matplotlib
    monkeypatch.setattr(ladder, "draw", lambda results, save: None)
    monkeypatch.setattr(ladder, "RUNS", {name: flags for name, flags in ladder.RUNS.items() if "8" not in name})
    config = ladder.Config(out_dir=str(stages), seeds=1, max_iters=2, save=str(stages / "ladder"))
    ladder.main(config)
    results = json.loads((stages / "ladder.json").read_text())["runs"]
    assert results.keys() == {*rungs.OBJECTIVES, "trpo"}
    for name, result in results.items():
        assert all(len(curve) == 2 and all(map(math.isfinite, curve)) for curve in result["objective"] + result["gold"])
        assert ("gradient_variance" in result) == (name in ladder.ONE_STEP)
    # The first rollout is of the SFT policy on every rung, and the rungs part after it.
    assert len({result["gold"][0][0] for result in results.values()}) == 1
    assert len({result["objective"][0][1] for result in results.values()}) > 4
    variance = {name: results[name]["gradient_variance"][0] for name in ladder.ONE_STEP}
    assert min(variance.values()) > 0 and len(set(variance.values())) == 4
    assert "| clip |" in capsys.readouterr().out
    runs = [path.stat().st_mtime_ns for path in sorted(stages.glob("seed0/*/*.pt"))]
    ladder.main(config)
    assert runs == [path.stat().st_mtime_ns for path in sorted(stages.glob("seed0/*/*.pt"))]  # nothing ran again


def test_the_ladder_is_redrawn_from_its_numbers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(ladder, "run_jobs", None)  # nothing may run
    shutil.copy(ROOT / "docs/ladder.json", tmp_path)
    results = ladder.main(ladder.Config(save=str(tmp_path / "ladder"), redraw=True))
    assert results.keys() == ladder.RUNS.keys()
    assert 20_000 < (tmp_path / "ladder.png").stat().st_size < 100_000


@pytest.mark.slow
def test_overoptimization_compares_ppo_and_best_of_n_on_one_proxy(stages, monkeypatch, capsys):
    monkeypatch.setattr(overoptimization, "import_pyplot", lambda: None)
    monkeypatch.setattr(overoptimization, "draw", lambda results, save: None)
    monkeypatch.setattr(overoptimization, "KL_COEFS", (0.0, 0.1))
    overoptimization.main(overoptimization.Config(out_dir=str(stages), seeds=1, max_iters=6, rm_iters=5, candidates=3,
                                                  save=str(stages / "overoptimization")))
    results = json.loads((stages / "overoptimization.json").read_text())
    best = results["best_of_n"]
    assert best["d"][0][0] == 0 and best["d"][0] == sorted(best["d"][0])
    assert best["score"][0] == sorted(best["score"][0])  # more to choose from never scores less
    # The best of one is the SFT policy's average answer, in units in which it has mean 0.
    assert best["utility"][0][0] == pytest.approx(0, abs=1e-9)
    assert results["ppo"].keys() == {"0.0", "0.1"} and all(len(run["d"][0]) == 6 for run in results["ppo"].values())
    assert load_checkpoint(stages / "seed0" / "proxy" / "rm.pt", "rm")["iter"] == 5
    screen = capsys.readouterr().out
    assert "| kl_coef 0.1 |" in screen and "R^2 =" in screen
