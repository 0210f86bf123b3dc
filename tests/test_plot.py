"""Tests of tools/plot.py: the curves are those of metrics.jsonl, and what is missing is said in a sentence."""

import json
import sys

import pytest

from tools import plot


def write_run(folder, gold, stage="ppo"):
    folder.mkdir()
    rows = [{"stage": "sft", "iter": 1, "loss": 1.0}, {"stage": stage, "flags": {}}]
    rows += [{"stage": stage, "iter": i, "score": 2.0, "kl": 10.0, "kl_coef": 0.05, "entropy": 1.0, "gold": g}
             | ({"gold_heldout": g} if i == 1 else {}) for i, g in enumerate(gold, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_read_with_what_ppo_maximises_and_with_the_iterations_of_sparse_metrics(tmp_path):
    run = plot.read_run(write_run(tmp_path / "run", [0.25, 0.5]))
    assert [x.tolist() for x in run["gold"]] == [[1, 2], [0.25, 0.5]]
    assert run["objective"][1].tolist() == [1.5, 1.5]  # 2 - 0.05 * 10
    assert [x.tolist() for x in run["gold_heldout"]] == [[1], [0.25]]


@pytest.mark.parametrize("stage", ["ppo", "trpo"])
def test_only_the_stage_that_was_asked_for_is_read(stage, tmp_path):
    folder = write_run(tmp_path / "run", [0.25], stage)
    assert "loss" not in plot.read_run(folder, stage)
    with pytest.raises(SystemExit, match="no PPO iterations"):
        plot.read_run(folder, "trpo" if stage == "ppo" else "ppo")


def test_a_missing_run_or_matplotlib_is_said_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere.metrics.jsonl is not there: give the out_dir of a finished run"):
        plot.read_run(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot.import_pyplot()


def test_runs_of_different_length_are_drawn_over_the_iterations_that_all_have(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", [0.1, 0.2, 0.3]), write_run(tmp_path / "b", [0.3, 0.4])]
    plot.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
