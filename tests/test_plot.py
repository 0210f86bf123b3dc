"""Tests of tools/plot.py: the curves are those of metrics.jsonl, and what is missing is said in a sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest

from paths import ROOT
from support.flags import UserError
from support.metrics import HEALTH
from tools import plot


def write_run(folder, gold, stage="ppo", **flags):
    folder.mkdir(parents=True)
    rows = [{"stage": "sft", "iter": 1, "loss": 1.0}, {"stage": stage, "flags": flags | {"out_dir": str(folder)}}]
    rows += [{"stage": stage, "iter": i, "score": 2.0, "kl": 10.0, "kl_coef": 0.05, "entropy": 1.0, "gold": g}
             | ({"gold_heldout": g} if i == 1 else {}) for i, g in enumerate(gold, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_read_with_its_objective_and_sparse_metrics(tmp_path):
    run = plot.read_run(write_run(tmp_path / "run", [0.25, 0.5]))
    assert [x.tolist() for x in run["gold"]] == [[1, 2], [0.25, 0.5]]
    assert run["objective"][1].tolist() == [1.5, 1.5]  # 2 - 0.05 * 10
    assert [x.tolist() for x in run["gold_heldout"]] == [[1], [0.25]]


def test_a_line_that_is_being_written_is_left_for_the_next_look(tmp_path):
    folder = write_run(tmp_path / "run", [0.25, 0.5])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "iter": 3, "sco')
    assert plot.read_run(folder)["gold"][0].tolist() == [1, 2]


@pytest.mark.parametrize("stage", ["ppo", "trpo"])
def test_only_the_stage_that_was_asked_for_is_read(stage, tmp_path):
    folder = write_run(tmp_path / "run", [0.25], stage)
    other = "trpo" if stage == "ppo" else "ppo"
    assert "loss" not in plot.read_run(folder, stage)
    with pytest.raises(UserError, match=f"no {other.upper()} iterations"):
        plot.read_run(folder, other)


def test_a_missing_run_or_matplotlib_or_panel_is_said_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nowhere.metrics.jsonl is not there: give the out_dir of a run"):
        plot.read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--save=a.jpeg2 must end in .png, .svg or .pdf"):
        plot.draw([], "a.jpeg2")
    with pytest.raises(UserError, match="--metrics has no panel loss: choose from gold, objective, score, eval, kl, "):
        plot.draw([], "a.png", ["kl", "loss"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.import_pyplot()


def test_the_command_exits_2_with_one_sentence_when_there_is_no_run(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tools.plot", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("plot: ") and done.stderr.count("\n") == 1


def test_runs_are_grouped_over_seeds_and_named_by_what_differs(tmp_path):
    runs = [write_run(tmp_path / f"{seed}{kl_coef}{critic}", [0.1], seed=seed, kl_coef=kl_coef, critic=critic, lr=1e-3)
            for seed in (0, 1) for kl_coef, critic in ((0.0, None), (0.2, "shared"))]
    groups = plot.group_runs(runs)
    assert {name: len(group) for name, group in groups.items()} == {"kl_coef=0.0": 2, "critic=shared kl_coef=0.2": 2}
    assert [*plot.group_runs(runs[::2])] == [""]  # there is nothing to tell apart


def test_the_band_reaches_from_the_lowest_to_the_highest_run(tmp_path):
    """It covers the iterations that all runs have."""
    runs = [plot.read_run(write_run(tmp_path / name, gold))
            for name, gold in (("a", [0.1, 0.2, 0.3]), ("b", [0.3, 0.4]), ("c", [0.5, 0.3]))]
    iterations, *curves = plot.mean_and_band(runs, "gold")
    assert iterations == [1, 2]
    assert [curve.round(9).tolist() for curve in curves] == [[0.3, 0.3], [0.1, 0.2], [0.5, 0.4]]
    assert plot.mean_and_band(runs, "utility") is None


def test_the_band_of_an_evaluation_in_a_lone_run_is_its_standard_error():
    run = {"eval": ([1, 5], [0.5, 0.75]), "eval_se": ([1, 5], [0.25, 0.125])}
    run = {name: tuple(map(np.array, columns)) for name, columns in run.items()}
    assert [list(column) for column in plot.mean_and_band([run], "eval")] == [[1, 5], [0.5, 0.75], [0.25, 0.625],
                                                                               [0.75, 0.875]]
    lowest, highest = plot.mean_and_band([run, run], "eval")[2:]
    assert [*lowest] == [*highest] == [0.5, 0.75]  # of several runs it is what they have


def test_each_part_of_a_score_has_a_panel_of_its_own():
    runs = [{"reward_format": 0, "score": 0, "eval_se": 0}, {"eval_right": 0, "eval": 0, "reward": 0}]
    panels = plot.panels_of(runs)
    assert [*panels] == [*plot.PANELS, "eval_right", "reward_format"]
    assert panels["reward_format"][0] == "reward, part format"


def test_samples_are_drawn_with_the_median_of_each_look(tmp_path, monkeypatch):
    plt, drawn = pytest.importorskip("matplotlib.pyplot"), {}
    rows = [{"iter": i, "prompt": "p", "response": "r", "score": s, "kl": 0.0, "tokens": s, "ended": True}
            for i, scores in ((1, (1, 2, 9)), (4, (3, 5))) for s in scores]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iter": 5, "pro')
    close = plt.close

    def look(figure):
        drawn.update({axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes})
        close(figure)
    monkeypatch.setattr(plt, "close", look)
    plot.draw_samples(tmp_path, tmp_path / "samples.png")
    looks, medians = [[[1, 1], [1, 2], [1, 9]], [[4, 3], [4, 5]]], [[1, 2], [4, 4]]
    assert drawn["score of each sample, and the median"] == [*looks, medians]
    assert len(drawn) == 3 and (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="nowhere.samples.jsonl has no samples: give the out_dir of a PPO run"):
        plot.draw_samples(tmp_path / "nowhere", "a.png")


def test_the_healthy_range_is_the_one_that_the_rules_warn_outside_of():
    def healthy_range(metric, *values):
        return plot.healthy_range(metric, [{metric: (range(1, 7), [value] * 5 + [9.0])} for value in values] + [{}])
    assert healthy_range("kl", 1.0) == (-0.1, 10.0) and healthy_range("score", 1.0) == (None, None)
    assert healthy_range("clip_frac", 1.0) == (None, next(rule.high for rule in HEALTH if rule.metric == "clip_frac"))
    assert healthy_range("eos_rate", 1.0) == (0.5, None)
    assert healthy_range("entropy", 1.0) == (pytest.approx(0.1), None)  # of the first five iterations
    assert healthy_range("entropy", 0.6, 0.8, 0.05) == (pytest.approx(0.08), None)  # the narrowest of several runs
    assert healthy_range("eos_rate") == (None, None)


@pytest.mark.parametrize("name, begins", [("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml")])
def test_the_figure_has_a_panel_for_each_metric_and_names_the_groups(name, begins, tmp_path, monkeypatch):
    plt, panels, texts, shaded = pytest.importorskip("matplotlib.pyplot"), [], [], []
    runs = [write_run(tmp_path / "a", [0.1, 0.2, 0.3], clip=0.1), write_run(tmp_path / "b", [0.3, 0.4], clip=0.2)]
    close = plt.close

    def look(figure):
        texts.extend(text.get_text() for legend in figure.legends for text in legend.get_texts())
        note = figure._supxlabel.get_window_extent()
        assert figure.bbox.x0 <= note.x0 and note.x1 <= figure.bbox.x1
        for axis in figure.axes:
            panels.append(axis.get_title())
            shaded.extend([axis.get_title()] * len(axis.patches))
        close(figure)
    monkeypatch.setattr(plt, "close", look)
    plot.draw(runs, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert panels == [plot.PANELS[metric][0] for metric in ("gold", "objective", "score", "kl", "entropy")] + [""] * 3
    assert texts == ["clip=0.1", "clip=0.2"] and shaded == [plot.PANELS[metric][0] for metric in ("kl", "entropy")]
    panels.clear()
    plot.draw(runs, tmp_path / name, ["entropy", "gold"])
    assert panels == [plot.PANELS["entropy"][0], plot.PANELS["gold"][0]]
    plot.draw([*runs, write_run(tmp_path / "c", [0.3], clip=0.2)], tmp_path / name, ["entropy"])
