"""
Draws the curves of PPO from metrics.jsonl, of one run or of several on top of each other.

    python -m tools.plot out/atlas                                   one run, also while it runs -> out/atlas/curves.png
    python -m tools.plot out/seed0 out/seed1 --save seeds.svg       seeds: their mean, and a band from lowest to highest
    python -m tools.plot out/low/* out/high/* --metrics kl score     runs whose flags differ: a colour for each group
    python -m tools.plot out/atlas --samples                         samples.jsonl -> out/atlas/samples.png

Runs that differ only in the seed and the folder are one group. A group is named by the flags in which it differs from
the others. For a single run, the band of --eval is its standard error. The range within the bounds of a rule in
support.metrics.HEALTH is green. Needs matplotlib.
"""

import argparse
import re
import sys
import textwrap
from itertools import cycle
from pathlib import Path

import numpy as np

from support.checkpoint import MAY_CHANGE
from support.flags import UserError, require
from support.metrics import HEALTH, objective, whole_lines

PANELS = {  # metric: title of its panel, unit, what else is drawn there, where the axis ends (None: where the data do)
    "gold": ("share of answers that are right", "share of responses", ("gold_heldout",), (-0.02, 1.02)),
    "objective": ("J = score - kl_coef * KL", "units of score", (), (None, None)),
    "score": ("score, before the KL is paid for", "units of score", ("score_heldout",), (None, None)),
    "eval": ("what --eval measures on held-out prompts", "units of --eval", (), (None, None)),
    "kl": ("KL to the SFT policy", "nats per response", ("kl_heldout",), (None, None)),
    "entropy": ("entropy", "nats per token", (), (0, None)),
    "clip_frac": ("clip fraction", "share of tokens", (), (0, None)),
    "explained_variance": ("explained variance of the critic", "share of the returns' variance", (), (-1, None)),
    "response_len": ("length of a response", "tokens", (), (None, None)),
    "eos_rate": ("responses that end by themselves", "share of responses", (), (-0.02, 1.02))}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe & Ito, colourblind-safe
HEALTHY = "#009E73"
# Flags in which the runs of a group may differ. A resumed run may give its data and sizes in another way, but
# different data or sizes make different groups.
SAME_GROUP = MAY_CHANGE - {"data", "tokenizer", "reward", "n_layer", "n_head", "n_embd", "block_size"} | {
    "seed", "init_from"}


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn

def read_lines(folder, stage="ppo"):
    """(flags, rows) of a stage: those of its header, {} if that is gone, and a dict per iteration."""
    path = Path(folder) / "metrics.jsonl"
    require(path.is_file(), f"{path} is not there: give the out_dir of a run")
    lines = [row for row in whole_lines(path) if row["stage"] == stage]
    rows = [row for row in lines if "iter" in row]
    require(rows, f"{path} has no {stage.upper()} iterations yet")
    return next((row["flags"] for row in lines if "flags" in row), {}), rows


def read_run(folder, stage="ppo"):
    """{metric: (iterations, values)} of a stage; `objective` is score - kl_coef * kl."""
    rows = [row | {"objective": objective(row)} for row in read_lines(folder, stage)[1]]
    names = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return {name: tuple(np.array(column) for column in zip(*[(row["iter"], row[name]) for row in rows
                                                             if row.get(name) is not None])) for name in names}


def group_runs(folders):
    """{name: [read_run, ...]}: runs with the same flags together, named by the flags that tell the groups apart."""
    groups = {}
    for folder in folders:
        flags = {name: value for name, value in read_lines(folder)[0].items() if name not in SAME_GROUP}
        groups.setdefault(tuple(sorted(flags.items())), []).append(read_run(folder))
    differ = {name for flags in groups for name, value in flags
              if any(dict(other).get(name) != value for other in groups)}
    return {" ".join(f"{name}={value}" for name, value in flags if name in differ and value is not None)
            or "default" * (len(groups) > 1): runs for flags, runs in groups.items()}


def panels_of(runs):
    """PANELS, and a panel for each part of a score that a run has."""
    parts = sorted({name for run in runs for name in run if re.match("(reward|eval)_(?!se$)", name)})
    return PANELS | {name: (name.replace("_", ", part ", 1), "units of the part", (), (None, None)) for name in parts}


def mean_and_band(runs, metric):
    """(iterations, mean, lowest, highest) over the runs that have the metric, where all of those have it; else None.
    In a single run, a metric with a standard error has that error on both sides."""
    curves = [run[metric] for run in runs if metric in run]
    iterations = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves))) if curves else []
    values = np.array([[y[x.tolist().index(i)] for i in iterations] for x, y in curves])
    errors = [run[f"{metric}_se"][1] for run in runs if f"{metric}_se" in run]
    error = errors[0] if len(errors) == len(curves) == 1 and len(errors[0]) == len(iterations) else 0
    return (iterations, values.mean(0), values.min(0) - error, values.max(0) + error) if iterations else None


def healthy_range(metric, runs):
    """(low, high): the narrowest bounds of the rules on the metric in these runs; None where they have none."""
    bounds = [rule.bounds([{}, *({metric: value} for value in run[metric][1])])
              for rule in HEALTH for run in runs if rule.metric == metric and metric in run]
    lows, highs = ([pair[side] for pair in bounds if pair[side] is not None] for side in (0, 1))
    return max(lows, default=None), min(highs, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# drawing

def import_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    return plt


def draw_panel(axis, groups, metric, panel, low, high):
    """Draws a panel, green from low to high. groups: lists of runs; COLOURS are in the same order."""
    title, unit, others, ends_of_axis = panel
    for n, (runs, colour) in enumerate(zip(groups, cycle(COLOURS))):
        for curve, style in zip((metric, *others), ("-", ":")):
            drawn = mean_and_band(runs, curve)
            if drawn is None:
                continue
            x, mean, lowest, highest = drawn
            axis.plot(x, mean, style, color=colour, label=curve.replace("_", " ") if n == 0 else None,
                      marker="." if len(x) < 10 else None)
            axis.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    axis.set_ylim(*ends_of_axis)
    bottom, top = axis.get_ylim()
    if (low, high) != (None, None):
        axis.axhspan(max(bottom, bottom if low is None else low), min(top, top if high is None else high),
                     color=HEALTHY, alpha=0.07, linewidth=0, zorder=0)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit, fontsize=9)
    axis.grid(alpha=0.3)
    if others and len(axis.lines) > len(groups):
        axis.legend(fontsize=9, loc="lower right", frameon=False)


def draw(folders, save, metrics=None):
    """Draws the panels of `metrics` (default: those that a run has) into a .png, .svg or .pdf file."""
    require_picture(save)
    groups = group_runs(folders)
    runs = sum(groups.values(), [])
    panels = panels_of(runs)
    unknown = [metric for metric in metrics or () if metric not in panels]
    require(not unknown, f"--metrics has no panel {', '.join(unknown)}: choose from {', '.join(panels)}")
    plt = import_pyplot()
    metrics = metrics or [metric for metric in panels if any(metric in run for run in runs)]
    ranges = [healthy_range(metric, runs) for metric in metrics]
    columns = len(metrics) if len(metrics) <= 4 else 3 if len(metrics) % 3 == 0 else 4
    rows = -(-len(metrics) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.7 * rows + 0.5), squeeze=False,
                                constrained_layout=True)
    for axis, metric, bounds in zip(axes.flat, metrics, ranges):
        draw_panel(axis, groups.values(), metric, panels[metric], *bounds)
    if len(groups) > 1:
        figure.legend([plt.Line2D([], [], color=colour) for colour, _ in zip(cycle(COLOURS), groups)], groups,
                      loc="outside upper center", ncols=columns, fontsize=9, frameon=False)
    for axis in axes.flat[len(metrics):]:
        axis.set_axis_off()
    note = "iteration"
    sizes = sorted({len(group) for group in groups.values()})
    if sizes != [1]:
        note += f"     line and band: mean, lowest and highest of {' or '.join(map(str, sizes))} runs"
    if any(bounds != (None, None) for bounds in ranges):
        note += "     green: where no rule of support/metrics.py warns"
    figure.supxlabel(textwrap.fill(note, 58 * columns), fontsize=9)
    finish(plt, figure, save)


def draw_samples(folder, save):
    """Draws the score, the KL and the length of each row of samples.jsonl, and the median of each look."""
    require_picture(save)
    path = Path(folder) / "samples.jsonl"
    rows = whole_lines(path, "iter")
    require(rows, f"{path} has no samples: give the out_dir of a PPO run")
    plt, looks = import_pyplot(), sorted({row["iter"] for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for axis, (name, unit) in zip(axes, (("score", "units of score"), ("kl", "nats"), ("tokens", "tokens"))):
        values = [[row[name] for row in rows if row["iter"] == look and row[name] is not None] for look in looks]
        for look, column in zip(looks, values):
            axis.plot([look] * len(column), column, ".", color=COLOURS[0], alpha=0.4)
        axis.plot(looks, [np.median(column) if column else np.nan for column in values], color=COLOURS[0])
        axis.set_title(f"{name} of each sample, and the median", fontsize=10)
        axis.set_ylabel(unit, fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("iteration", fontsize=9)
    finish(plt, figure, save)


def require_picture(save):
    require(Path(save).suffix in (".png", ".svg", ".pdf"), f"--save={save} must end in .png, .svg or .pdf")


def finish(plt, figure, save):
    figure.savefig(save, dpi=110)
    plt.close(figure)
    print(f"wrote {save}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="out_dir of each run")
    parser.add_argument("--save", help="the picture, .png, .svg or .pdf; default: curves.png in the first run's folder")
    parser.add_argument("--metrics", nargs="+", help=f"the panels: {', '.join(PANELS)}, reward_<part> and "
                                                     "eval_<part>; default: all of them")
    parser.add_argument("--samples", action="store_true", help="draw samples.jsonl of one run instead, as samples.png")
    options = parser.parse_args()
    try:
        if options.samples:
            require(len(options.runs) == 1 and not options.metrics, "--samples draws one run, without --metrics")
            draw_samples(options.runs[0], options.save or Path(options.runs[0]) / "samples.png")
        else:
            draw(options.runs, options.save or Path(options.runs[0]) / "curves.png", options.metrics)
    except (UserError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
