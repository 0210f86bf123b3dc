"""
Draws the PPO curves of one or several runs from their metrics.jsonl.

    python -m tools.plot out/atlas                                    one run -> out/atlas/curves.png
    python -m tools.plot out/seed0 out/seed1 --save docs/curve.png    their mean, and a band from lowest to highest

Needs matplotlib, which nothing else does.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

PANELS = (  # title, metrics drawn in it
    ("share of answers that are right", ("gold", "gold_heldout")),
    ("score - kl_coef * KL, what PPO maximises", ("objective",)),
    ("KL to the SFT policy, nats per response", ("kl",)),
    ("entropy, nats per token", ("entropy",)),
)


def read_run(folder, stage="ppo"):
    """{metric: (iterations, values)} of a PPO stage; `objective` is score - kl_coef * kl."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is not there: give the out_dir of a finished run")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == stage and "iter" in row]
    if not rows:
        sys.exit(f"{path} has no PPO iterations yet")
    for row in rows:
        row["objective"] = row["score"] - row["kl_coef"] * row["kl"]
    names = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return {name: tuple(np.array(column) for column in zip(*[(row["iter"], row[name]) for row in rows
                                                             if row.get(name) is not None])) for name in names}


def import_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("drawing needs matplotlib: pip install matplotlib")
    return plt


def draw(folders, save):
    plt = import_pyplot()
    runs = [read_run(folder) for folder in folders]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), constrained_layout=True)
    for axis, (title, names) in zip(axes, PANELS):
        for name in names:
            curves = [run[name] for run in runs if name in run]
            if not curves:
                continue
            # Runs of different length are compared over the iterations that all of them have.
            iterations = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
            values = np.array([[y[x.tolist().index(i)] for i in iterations] for x, y in curves])
            line, = axis.plot(iterations, values.mean(0), label=name.replace("_", " "),
                              marker="." if len(iterations) < 10 else None)
            axis.fill_between(iterations, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=9, loc="lower right")
    figure.savefig(save, dpi=110)
    plt.close(figure)
    print(f"wrote {save}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="out_dir of each run")
    parser.add_argument("--save", help="the picture to write; default: curves.png in the first run's folder")
    options = parser.parse_args()
    draw(options.runs, options.save or Path(options.runs[0]) / "curves.png")
