"""
How the cost of an iteration grows: measured, and as its FLOPs predict.

    python -m experiments.scaling                                        docs/scaling.png and .json, about 10 minutes
    python -m experiments.scaling --processes=1,2                        with a panel over processes of one thread each
    python -m experiments.scaling --paper                                on many GPUs: computed, not measured

Width, batch and response length each vary by factors of two around a common size, all else equal. Each point is a run
of tools/bench.py in its own process. Exponents are slopes of straight lines in log-log. The expected exponent is that
of a process's FLOPs over the same points, which bench.work counts, so it has no free parameter. The measured slope over
width is lower where small matrices do not reach the machine's rate.

Drawing needs matplotlib.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np

from support import metrics
from support.flags import check_domains, require, require_one_process, run_script
from tools import bench
from tools.plot import import_pyplot

START = bench.Size(n_layer=4, n_head=4, n_embd=128, vocab_size=2048, batch_size=32, prompt_len=16, response_len=32,
                   epochs=2, minibatches=2)
SWEEPS = {"n_embd": (64, 128, 256, 512), "batch_size": (8, 16, 32, 64, 128), "response_len": (16, 32, 64, 128)}
STAGES = ("rollout", "score", "update", "iter")


@dataclass
class Config:
    iters: int = 3                   # [1, inf) iterations behind each median
    dtype: str = "float32"           # float32|bfloat16: bfloat16 is autocast
    processes: Optional[str] = None  # numbers of torchrun processes, such as 1,2,4, at START's batch; default: none
    paper: bool = False              # print the estimate for 1 to 1,024 GPUs instead
    save: str = "docs/scaling"       # path of the figure and its numbers, without .png or .json


def run_bench(config, size, processes=None):
    """The JSON line of tools/bench.py for a size: from one process with all threads or, if given, from `processes` of
    them under torchrun with one thread each, so that twice the processes have twice the cores."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes else {})
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = {"iters": config.iters, "dtype": config.dtype, "json": True} | asdict(size)
    done = subprocess.run([sys.executable, *(launcher if processes and processes > 1 else []), "-m", "tools.bench",
                           *(f"--{name}={value}" for name, value in flags.items())],
                          capture_output=True, text=True, env=environment)
    require(done.returncode == 0, f"tools.bench failed for {size}: {done.stderr.strip()[-300:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def flops_of(size, processes):
    """{stage: FLOPs} of an iteration, in each of the processes that share it."""
    flops = {stage: sum(piece.flops for piece in pieces) / (processes or 1)
             for stage, pieces in bench.work(size, "shared", 4).items()}
    return flops | {"iter": sum(flops.values())}


def slope(x, y):
    """The exponent of a power law through the points, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# on paper

# What is assumed of a GPU and its network. Rates are shares of those in the data sheet of an H100 SXM.
ASSUMED = {
    "rate": 0.45 * 989e12,      # FLOP/s in bfloat16
    "bandwidth": 0.7 * 3.35e12,  # bytes/s of its memory
    "launches": 15 * 5e-6,      # seconds per layer and decoding step: 15 kernel launches, none hidden
    "inside": 0.8 * 450e9,      # bytes/s per direction between the 8 GPUs of a node
    "between": 0.8 * 50e9,      # bytes/s per direction of each GPU's share of the network between nodes
    "hop": 20e-6,               # seconds for each of the 2 log2(n) hops of an all-reduce
}


def all_reduce_seconds(n_bytes, gpus, node=8):
    """Reduce-scatter inside each node, all-reduce of the shards between nodes, all-gather inside; nothing overlaps."""
    inside, nodes = min(gpus, node), max(1, gpus // node)
    return (2 * n_bytes * (inside - 1) / inside / ASSUMED["inside"]
            + 2 * n_bytes / inside * (nodes - 1) / nodes / ASSUMED["between"] + 2 * np.log2(gpus) * ASSUMED["hop"])


def on_paper(size, gpus):
    """{stage: seconds} of one iteration if each GPU holds the whole model and works on a batch of `size`, and float32
    gradients are averaged at each optimizer step."""
    pieces = bench.work(size, "shared", 2)
    seconds = {stage: bench.floor_seconds(part, ASSUMED["rate"], lambda working_set: ASSUMED["bandwidth"])
               for stage, part in pieces.items()}
    seconds["rollout"] += ASSUMED["launches"] * size.n_layer * size.response_len
    seconds["all-reduce"] = size.epochs * size.minibatches * float(all_reduce_seconds(4 * bench.n_params(size), gpus))
    return seconds


def print_paper():
    """GPT-2 XL with a batch that grows with the GPUs, then with a fixed one. Efficiency: tokens/s per GPU against 8."""
    names = ("rollout", "score", "update", "all-reduce")
    print("computed, not measured: GPT-2 XL, prompt 64, response 128, 4 epochs x 4 minibatches, data parallel\n"
          "assumed: " + ", ".join(f"{name} {value:.3g}" for name, value in ASSUMED.items()) + "\n")
    print("| responses | GPUs | each | " + " | ".join(names) + " | iteration, s | response tokens/s | efficiency |")
    print("|" + "---|" * 10)
    for batches in ((512, 4096, 65536), (4096, 4096, 4096)):
        speeds = []  # per GPU
        for batch, gpus in zip(batches, (8, 64, 1024)):
            seconds = on_paper(replace(bench.GPT2_XL, batch_size=batch // gpus), gpus)
            seconds_each = sum(seconds.values())
            speeds.append(batch * 128 / seconds_each / gpus)
            print(f"| {batch:,} | {gpus:,} | {batch // gpus} | " + " | ".join(f"{seconds[name]:.2f}" for name in names)
                  + f" | {seconds_each:.2f} | {speeds[-1] * gpus:,.0f} | {speeds[-1] / speeds[0]:.0%} |")


# ---------------------------------------------------------------------------------------------------------------------
# showing

def draw(results, save):
    plt = import_pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9, 8.6), constrained_layout=True)
    titles = {"n_embd": "width", "batch_size": "responses per rollout", "response_len": "tokens per response",
              "processes": "processes"}
    for axis, (name, result) in zip(axes.flat, results.items()):
        for n, stage in enumerate(STAGES):
            axis.plot(result["x"], result["seconds"][stage], f"C{n}o-", markersize=4,
                      label=f"{'whole iteration' if stage == 'iter' else stage} {result['slope'][stage]:.2f} "
                      f"({result['expected'][stage]:.2f})")
            flops = np.array(result["flops"][stage])
            axis.plot(result["x"], flops / flops[-1] * result["seconds"][stage][-1], f"C{n}:", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=titles[name])
        axis.set_xticks(result["x"], [str(x) for x in result["x"]], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=9, title="exponent, measured (expected)", title_fontsize=9, loc="upper center",
                    bbox_to_anchor=(0.5, -0.12))
    for axis in axes.flat[len(results):]:
        axis.set_axis_off()
    figure.supylabel("seconds; dotted: FLOPs, through the last point")
    figure.savefig(f"{save}.png", dpi=90)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/scaling.py")
    if config.paper:
        return print_paper()
    import_pyplot()  # reports a missing matplotlib before the runs, not after
    began, results, line = time.time(), {}, {}
    sweeps = {name: [(x, replace(START, **{name: x}), None) for x in xs] for name, xs in SWEEPS.items()}
    if config.processes:
        sweeps["processes"] = [(int(n), START, int(n)) for n in config.processes.split(",")]
    print("| grows | stage | seconds | exponent measured | expected from FLOPs |\n|---|---|---|---|---|", flush=True)
    for name, points in sweeps.items():
        lines = [run_bench(config, size, processes) for _, size, processes in points]
        x, line = [x for x, _, _ in points], line or lines[0]
        seconds = {stage: [line[f"sec_{stage}"] for line in lines] for stage in STAGES}
        flops = {stage: [flops_of(size, n)[stage] for _, size, n in points] for stage in STAGES}
        results[name] = {"x": x, "seconds": seconds, "flops": flops,
                         "slope": {stage: slope(x, seconds[stage]) for stage in STAGES},
                         "expected": {stage: slope(x, flops[stage]) for stage in STAGES}}
        for stage in STAGES:
            print(f"| {name} {x[0]} to {x[-1]} | {stage} | {seconds[stage][0]:.3f} to {seconds[stage][-1]:.3f} | "
                  f"{results[name]['slope'][stage]:.2f} | {results[name]['expected'][stage]:.2f} |", flush=True)
    made_by = {"device": line["device"], "commit": metrics.header(bench.Config(), "scaling")["commit"]}
    Path(f"{config.save}.json").write_text(json.dumps({"config": asdict(config), "start": asdict(START), **made_by,
                                                       "sweeps": results}) + "\n")
    draw(results, config.save)
    print(f"\nwrote {config.save}.png and .json; {(time.time() - began) / 60:.0f} minutes on {line['device']}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
