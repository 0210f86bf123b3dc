"""
The ladder of the derivation on the built-in task: what each rung was meant to fix, and whether it did.

    python -m experiments.ladder                              all rungs and TRPO, four seeds: docs/ladder.png and .json
    python -m experiments.ladder --seeds=1 --max_iters=10 --out_dir=out/look --save=out/look/ladder       a quick look
    python -m experiments.ladder --objective=reinforce        one rung by itself, with the flags of train_ppo.py; then
                                                              reward_to_go, baseline, gae, cpi, kl_penalty, clip

The SFT policy and the reward model are trained once per seed and shared. Every run of a seed gets the same prompts in
the same order, in 50 rollouts. Runs differ in --objective and what follows from it. Up to `gae` a rollout allows one
optimizer step. From `cpi` on it is used for four steps, in two epochs. The runs named "8 epochs" use it for sixteen
steps, so that the ratio has time to run away, and have 12 rollouts. TRPO's critic takes eight steps of half the size
per rollout.

Runs already in out_dir are not repeated: delete out_dir after changing the task or a default of the first two stages.
--redraw draws the figure again from the numbers of an earlier run. Drawing needs matplotlib.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import data
import train_ppo
import train_rm
import train_sft
from experience import Experience
from experiments import rungs, trpo
from experiments.rungs import ONE_STEP, REUSE, surrogate_loss, token_advantages
from ppo import shape_rewards
from support import stages
from support.checkpoint import load_checkpoint
from support.device import setup
from support.flags import check_domains, require_one_process, run_script
from support.stages import load_policy, load_reward_model
from tokenizer import DataError, get_tokenizer
from tools.plot import COLOURS, import_pyplot, read_run

RUNS = {name: {"objective": name} for name in ONE_STEP} | {
    name: {"objective": name, "epochs": 2, "minibatches": 2} for name in REUSE} | {"trpo": {}} | {
    f"{name}, 8 epochs": {"objective": name, "epochs": 8, "minibatches": 2, "max_iters": 12}
    for name in ("cpi", "clip")}
# Where the estimators' variances are compared: after a third of a run, because the critic knows nothing at the start
# and nothing is left to learn at the end.
PROBE = {"objective": "baseline", "max_iters": 15}
DRAWS, RESPONSES = 48, 64  # gradients in a variance, and responses behind each gradient
LAST = 10                  # a run's row of the table is a mean over this many last rollouts


@dataclass
class Config:
    out_dir: str = "out/ladder"    # a folder per seed, and in it one per run
    seeds: int = 4                 # [1, inf) seeds 0, 1, ...
    max_iters: int = 50            # [2, inf) rollouts of each run
    workers: Optional[int] = None  # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/ladder"      # path of the figure and its numbers, without .png or .json
    redraw: bool = False           # draw the figure again from the numbers in `save`, without training


# ---------------------------------------------------------------------------------------------------------------------
# jobs: each runs in its own process and returns nothing, because its results are in files

def prepare(folder, seed):
    """Trains the sft.pt and rm.pt that the runs of a seed share, if they are missing."""
    stages.prepare(train_ppo.Config(out_dir=str(folder), seed=seed, device="cpu"), sft=train_sft, rm=train_rm)


def train(folder, seed, name, **flags):
    """One run from the shared sft.pt and rm.pt of `folder` into folder/name, unless it exists with these flags."""
    module = trpo if name == "trpo" else rungs
    config = module.Config(**{
        "out_dir": str(folder / name), "seed": seed, "device": "cpu", "overwrite": True, "save_interval": 10**6,
        "max_new_tokens": 16,
        "init_from": str(folder / "sft.pt"), "rm": str(folder / "rm.pt")} | flags)
    path, stage = checkpoint_of(folder, name)
    if path.exists():
        saved, resolved = load_checkpoint(path, stage), config if name == "trpo" else config.resolved()
        sources = {"sft": load_checkpoint(config.init_from, "sft")["sha256"],
                   "rm": load_checkpoint(config.rm, "rm")["sha256"]}
        # None means a default, which the run resolved and the checkpoint holds
        asked = {name: value for name, value in asdict(resolved).items() if value is not None}
        same = saved["flags"].keys() == asdict(resolved).keys() and asked.items() <= saved["flags"].items()
        if saved["finished"] and same and saved["sources"] == sources:
            return
    module.train(config)


def checkpoint_of(folder, name):
    stage = "trpo" if name == "trpo" else "ppo"
    return folder / name / f"{stage}.pt", stage


def job(job_function, folder, name):
    """Runs job_function(folder) on one thread; its output goes to folder/name.log. Returns its seconds."""
    torch.set_num_threads(1)
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "w") as log, contextlib.redirect_stdout(log):
        job_function(folder)
    return time.time() - began


def run_jobs(jobs, workers):
    """Runs jobs, [(function, folder, name)], each in its own process. The longest should come first. Raises the first
    exception of any job."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(job, *spec): f"{spec[1].name} {spec[2]}" for spec in jobs}
        for n, future in enumerate(as_completed(futures), 1):
            print(f"{n}/{len(jobs)}  {futures[future]}: {future.result():.0f} s", flush=True)


def write_results(config, run, began, draw, results, contents):
    """Writes config.save + .json (the dict contents, the flags, and the commit, torch and machine from the header of
    the folder `run`). draw(results, config.save) makes .png. began: time.time() at the start, for the closing line."""
    header = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    made_by = {name: header[name] for name in ("commit", "torch", "device", "threads")}
    Path(config.save).parent.mkdir(parents=True, exist_ok=True)
    # The folders of the machine that ran it help nobody elsewhere, so only the last part of a path is kept.
    flags = {name: Path(value).name if isinstance(value, str) else value for name, value in asdict(config).items()}
    Path(f"{config.save}.json").write_text(json.dumps({"config": flags, **made_by, **contents}) + "\n")
    draw(results, config.save)
    print(f"\nwrote {config.save}.png and .json; {(time.time() - began) / 60:.0f} minutes")


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def gradient_variances(folder, seed):
    """{objective: variance of the policy's gradient from RESPONSES responses, summed over parameters}, at the probe's
    policy and critic, all on the same DRAWS draws. The rungs that reuse a rollout first take gae's gradient."""
    torch.set_num_threads(1)
    probe = load_checkpoint(folder / "probe" / "ppo.pt", "ppo")
    sft = load_checkpoint(folder / "sft.pt", "sft")
    policy, critic, reference = (load_policy(probe | {"model": weights})
                                 for weights in (probe["model"], probe["critic"], sft["model"]))
    config = replace(rungs.Config(**probe["flags"]), batch_size=RESPONSES, minibatches=1, seed=seed)
    reward_model, _ = load_reward_model(config, probe["tokenizer"], policy.config.block_size)
    encoding, params = get_tokenizer("atlas"), list(policy.trunk.parameters())
    experience = Experience(config, encoding, *setup(config), RESPONSES)
    prompts = data.load_prompts("atlas", encoding, policy.config.block_size, config.max_new_tokens).train
    order = data.BatchOrder([1] * len(prompts), RESPONSES, seed)
    gradients = {objective: [] for objective in ONE_STEP}
    for draw in range(DRAWS):
        rollout, texts = experience.collect(policy, [prompts[i] for i in order.order(draw)],
                                            experience.rng("variance", draw))
        (scores, _), has_eos = experience.score_by_model(reward_model, rollout, texts), rollout.has_eos(experience.eos)
        passes, mask = experience.minibatch_passes(rollout), rollout.mask
        ref_logprobs, _ = experience.recompute(reference, rollout, passes)
        values = experience.recompute_values(critic, rollout, passes)
        logprobs, _, _ = experience.score_response(policy, rollout.tokens, rollout.prompt_lens, mask.size(1),
                                                   entropy=False)
        rewards = shape_rewards(scores - config.eos_penalty * ~has_eos, logprobs, ref_logprobs, mask, config.kl_coef)
        for objective in ONE_STEP:
            advantages, _ = token_advantages(objective, rewards, values, mask, config.gamma, config.lam)
            loss, _ = surrogate_loss(objective, logprobs, logprobs, advantages, mask)
            gradients[objective].append(trpo.flat_grad(loss, params, retain_graph=True))
    return {objective: torch.stack(draws).var(0).sum().item() for objective, draws in gradients.items()}


def collect(config, folders):
    """Everything the table and the figure show: {run: {metric: a list per seed}}, curves and numbers."""
    results = {}
    for name in RUNS:
        runs = [read_run(folder / name, checkpoint_of(folder, name)[1]) for folder in folders]
        results[name] = {metric: [np.round(run[metric][1], 4).tolist() for run in runs]
                         for metric in ("objective", "gold", "kl", "ratio_max") if metric in runs[0]}
        results[name]["seconds"] = [float(np.median(sum(run[f"sec_{phase}"][1] for phase in
                                                        ("rollout", "score", "update")))) for run in runs]
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for variances in pool.map(gradient_variances, folders, range(config.seeds)):
            for objective, variance in variances.items():
                results[objective].setdefault("gradient_variance", []).append(variance)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# showing

def ends(curves):
    """The mean of the last rollouts of each seed's curve, as text: mean over seeds (lowest to highest)."""
    values = [np.mean(curve[-LAST:]) for curve in curves]
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_table(results):
    reference = results["reinforce"]
    print("\n| objective | score - kl_coef KL | gold | KL | largest ratio | gradient variance | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        ratio = f"{np.max(result['ratio_max']):.3g}" if "ratio_max" in result else ""
        variance = np.mean([a / b for a, b in zip(result["gradient_variance"], reference["gradient_variance"])]) \
            if "gradient_variance" in result else None
        seconds = np.mean([a / b for a, b in zip(result["seconds"], reference["seconds"])])
        print(f"| {name} | {ends(result['objective'])} | {ends(result['gold'])} | {ends(result['kl'])} | {ratio} | "
              f"{'as gae' if variance is None else f'{variance:.2f}'} | {seconds:.2f} |")


def draw(results, save):
    """Draws each rung's accuracy on its own axes, and below them the gradients' variances and the runs of 8 epochs."""
    plt = import_pyplot()
    figure, axes = plt.subplots(3, 4, figsize=(10, 7), constrained_layout=True)
    rungs_shown, overdone = ([name for name in results if (" epochs" in name) == long] for long in (False, True))
    base = np.mean(results["reinforce"]["gold"], 0)
    for axis, name in zip(axes[:2].flat, rungs_shown):
        axis.plot(np.arange(1, len(base) + 1), base, color="0.6", linestyle="--", linewidth=1)
        band(axis, results[name]["gold"], COLOURS[0])
        axis.set(ylim=(0.3, 1), yticks=(0.4, 0.6, 0.8, 1))
        axis.tick_params(labelleft=axis in axes[:, 0], labelbottom=axis in axes[1])
        axis.set_title(f"{name}, {np.mean([curve[-LAST:] for curve in results[name]['gold']]):.2f}", fontsize=10)
    axes[0, 0].annotate("dashed: reinforce", (0.98, 0.05), xycoords="axes fraction", ha="right", color="0.4",
                        fontsize=9)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("accuracy")

    axis, ratios = axes[2, 0], {name: np.divide(results[name]["gradient_variance"],
                                                results["reinforce"]["gradient_variance"]) for name in ONE_STEP}
    axis.barh(list(ratios), [ratio.mean() for ratio in ratios.values()], color=COLOURS[0], alpha=0.5)
    for y, ratio in enumerate(ratios.values()):
        axis.plot(ratio, [y] * len(ratio), "k.", markersize=4)  # one dot per seed
    axis.invert_yaxis()
    axis.set_title("variance of the gradient,\nreinforce = 1", fontsize=10)
    for axis, (metric, title) in zip(axes[2, 1:], (("gold", "accuracy"), ("kl", "KL to SFT, nats per response"),
                                                   ("ratio_max", "largest ratio"))):
        for name, colour in zip(overdone, COLOURS[1:]):
            band(axis, results[name][metric], colour, name.split(",")[0])
        axis.set_title(f"8 epochs:\n{title}", fontsize=10)
    axes[2, 1].legend(fontsize=9, loc="upper left", frameon=False)
    axes[2, 1].set_ylim(0, 1)
    axes[2, 3].set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in (*axes[1], *axes[2, 1:]):
        axis.set_xlabel("rollouts")
    figure.savefig(f"{save}.png", dpi=110)
    from PIL import Image  # comes with matplotlib; 64 colours take a third of the bytes
    Image.open(f"{save}.png").convert("RGB").quantize(64).save(f"{save}.png", optimize=True)
    plt.close(figure)


def band(axis, curves, colour, label=None):
    """Plots the mean over seeds by rollout, in a band from the lowest seed to the highest. curves: a list per seed."""
    curves = np.array(curves)
    x = np.arange(1, curves.shape[1] + 1)
    axis.plot(x, curves.mean(0), color=colour, label=label)
    axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)


def main(config):
    check_domains(config)
    require_one_process("experiments/ladder.py")
    import_pyplot()  # reports a missing matplotlib before half an hour of training, not after
    if config.redraw:
        results = json.loads(Path(f"{config.save}.json").read_text())["runs"]
        draw(results, config.save)
        return results
    config.workers = config.workers or os.cpu_count()
    began, folders = time.time(), [Path(config.out_dir) / f"seed{seed}" for seed in range(config.seeds)]
    run_jobs([(partial(prepare, seed=seed), folder, "stages") for seed, folder in enumerate(folders)], config.workers)
    flags = {name: {"max_iters": config.max_iters} | run for name, run in (RUNS | {"probe": PROBE}).items()}
    longest_first = sorted(flags, key=lambda name: name == "trpo" or name in REUSE or "8 epochs" in name, reverse=True)
    run_jobs([(partial(train, seed=seed, name=name, **flags[name]), folder, name)
              for name in longest_first for seed, folder in enumerate(folders)], config.workers)
    results = collect(config, folders)
    print_table(results)
    write_results(config, folders[0] / "clip", began, draw, results, {"runs": results})
    return results


if __name__ == "__main__":
    if any(arg.startswith("--objective") for arg in sys.argv[1:]):
        run_script(rungs.train, rungs.Config, rungs.__doc__, DataError)
    else:
        run_script(main, Config, __doc__, DataError)
