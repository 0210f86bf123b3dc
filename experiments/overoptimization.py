"""
Reward hacking and what the KL term buys: the reward model's score and the hidden utility, both against the distance
from the SFT policy, for PPO at several kl_coef and for best-of-n.

    python -m experiments.overoptimization              four seeds: docs/overoptimization.png and .json

The reward model is weak on purpose: a proxy trained for a few steps on a few comparisons, so that a laptop is fast
enough to hack it. Only the built-in task allows this, because only there the labeller's utility is known. Score and
utility are in standard deviations of the SFT policy's answers, whose mean is 0. d is sqrt(KL), as in Gao et al. 2023,
2210.10760. Their forms are fitted to the utility: d (a - b log d) for PPO and d (a - b d) for best-of-n.

The ladder's SFT policies are used if they are in out_dir. Drawing needs matplotlib.
"""

import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import atlas
import data
import train_ppo
import train_rm
from experience import Experience
from experiments.ladder import prepare, run_jobs, train, write_results
from support.checkpoint import load_checkpoint
from support.device import setup
from support.flags import check_domains, require_one_process, run_script
from support.stages import load_policy, load_reward_model
from tokenizer import DataError, decode, encode_prompt, get_tokenizer
from tools.plot import import_pyplot, read_run

KL_COEFS = (0.0, 0.05, 0.2)
N_SAMPLES = 128                      # answers per question that best-of-n is computed from
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
FIT_UP_TO = 3.0                      # d; farther out the utility nears its floor, which the fitted forms lack
LAST = 10                            # a run's row of the table is a mean over this many last rollouts


@dataclass
class Config:
    out_dir: str = "out/ladder"    # a folder per seed; the ladder's, so that both share the SFT policies
    seeds: int = 4                 # [1, inf) seeds 0, 1, ...
    max_iters: int = 60            # [5, inf) rollouts of each run
    rm_iters: int = 60             # [1, inf) optimizer steps of the proxy; more makes it harder to hack
    candidates: int = 6            # [2, inf) answers per question that the proxy's comparisons are made of
    workers: Optional[int] = None  # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/overoptimization"  # path of the figure and its numbers, without .png or .json


def train_proxy(folder, seed, rm_iters, candidates):
    """The weak reward model: folder/proxy/rm.pt."""
    config = train_rm.Config(out_dir=str(folder / "proxy"), init_from=str(folder / "sft.pt"), seed=seed, device="cpu",
                             max_iters=rm_iters, candidates=candidates, overwrite=True, max_new_tokens=16)
    path = config.folder / "rm.pt"
    saved = load_checkpoint(path, "rm") if path.exists() else None
    sft = load_checkpoint(folder / "sft.pt", "sft")["sha256"]
    # None means a default, which the run resolved and the checkpoint holds
    asked = {name: value for name, value in asdict(config).items() if value is not None}
    same = saved and saved["finished"] and asked.items() <= saved["flags"].items()
    if not (same and saved["sources"]["sft"] == sft):
        train_rm.train(config)


def train_at(folder, seed, kl_coef, max_iters):
    train(folder, seed, f"kl_coef {kl_coef}", rm=str(folder / "proxy" / "rm.pt"), kl_coef=kl_coef,
          max_iters=max_iters, epochs=2, minibatches=2)


def best_of_n_weights(n, n_drawn):
    """Probability (n_drawn,) that the answer of each rank, worst first, is the best of n picked from n_drawn answers
    without replacement: C(rank - 1, n - 1) / C(n_drawn, n). It averages over all picks, where one would be noisy."""
    return np.array([math.comb(rank, n - 1) / math.comb(n_drawn, n) for rank in range(n_drawn)])


def best_of_n_kl(p, n):
    """KL(best of n || p) for the probabilities p (K,) of distinct answers, worst first. At most log n - (n - 1) / n,
    and close to that if every p is small [Beirami et al. 2024, 2401.01879]."""
    below = p.cumsum() - p
    q = (below + p) ** n - below ** n
    return float((q * np.log(q / p))[q > 0].sum())


@torch.no_grad()
def best_of_n(folder, seed):
    """Writes folder/best_of_n.json: {"kl", "score", "utility"}, each the expected value for the best of n answers by
    the proxy's score, for n in BEST_OF; and "mean", "std" of the utility of the SFT policy's answers."""
    checkpoint = load_checkpoint(folder / "sft.pt", "sft")
    policy, encoding = load_policy(checkpoint, "cpu"), get_tokenizer("atlas")
    config = train_ppo.Config(rm=str(folder / "proxy" / "rm.pt"), seed=seed, device="cpu", max_new_tokens=16)
    block_size = policy.config.block_size
    reward_model, _ = load_reward_model(config, checkpoint["tokenizer"], block_size, "cpu")
    questions = atlas.prompts("train")[::8]
    prompts = [encode_prompt(encoding, question) for question in questions for _ in range(N_SAMPLES)]
    experience = Experience(config, encoding, *setup(config), 1024)
    answers = train_rm.sample(experience, policy, prompts, "best of n")
    rows = data.pad([prompt + answer for prompt, answer in zip(prompts, answers)], encoding.eot_token)
    scores = torch.cat([reward_model(*part) for part in zip(*(x.split(1024) for x in rows))])
    scores = scores.view(-1, N_SAMPLES).numpy()
    utility = np.array([atlas.utility(questions[i // N_SAMPLES], decode(encoding, answer))
                        for i, answer in enumerate(answers)]).reshape(scores.shape)
    ranked = np.argsort(scores, axis=1)
    # Per question, how often each distinct answer was sampled, worst first: identical answers have the same score.
    shares = []
    for i in range(len(questions)):
        same = answers[i * N_SAMPLES:(i + 1) * N_SAMPLES]
        counts = Counter(tuple(same[j]) for j in ranked[i])
        shares.append(np.array(list(counts.values())) / N_SAMPLES)
    result = {"mean": utility.mean(), "std": utility.std(), "kl": [], "score": [], "utility": []}
    for n in BEST_OF:
        result["kl"].append(float(np.mean([best_of_n_kl(p, n) for p in shares])))
        for name, values in (("score", scores), ("utility", utility)):
            ordered = np.take_along_axis(values, ranked, axis=1)
            result[name].append(float((ordered * best_of_n_weights(n, N_SAMPLES)).sum(1).mean()))
    (folder / "best_of_n.json").write_text(json.dumps(result))


def fit(d, y, second):
    """Least squares of y = d (a - b second(d)): {"a", "b", "r2"}."""
    d, y = np.asarray(d), np.asarray(y)
    columns = np.stack([d, -d * second(d)], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = y - columns @ (a, b)
    return {"a": float(a), "b": float(b), "r2": float(1 - (residual ** 2).sum() / ((y - y.mean()) ** 2).sum())}


def collect(folders):
    """{"ppo": {kl_coef: {metric: a list per seed}}, "best_of_n": {metric: a list per seed}, "fits"}."""
    best = [json.loads((folder / "best_of_n.json").read_text()) for folder in folders]
    results = {"ppo": {}, "best_of_n": {
        "d": [[math.sqrt(kl) for kl in run["kl"]] for run in best],
        "score": [run["score"] for run in best],
        "utility": [[(u - run["mean"]) / run["std"] for u in run["utility"]] for run in best]}}
    for kl_coef in KL_COEFS:
        runs = [read_run(folder / f"kl_coef {kl_coef}") for folder in folders]
        results["ppo"][str(kl_coef)] = {
            "d": [np.sqrt(run["kl"][1].clip(0)).round(4).tolist() for run in runs],
            "utility": [((run["utility"][1] - sft["mean"]) / sft["std"]).round(4).tolist()
                        for run, sft in zip(runs, best)]} | {
            metric: [run[metric][1].round(4).tolist() for run in runs] for metric in ("score", "gold", "kl", "entropy")}
    free = results["ppo"]["0.0"]
    pairs = [(d, u) for ds, us in zip(free["d"], free["utility"]) for d, u in zip(ds, us) if 0 < d <= FIT_UP_TO]
    results["fits"] = {
        "ppo, kl_coef 0": fit(*zip(*pairs), np.log),
        "best of n": fit(*(np.concatenate(results["best_of_n"][name]) for name in ("d", "utility")), lambda d: d)}
    return results


def print_table(results):
    print("\n| policy | KL | proxy score | utility | gold | highest utility |\n|---|---|---|---|---|---|")
    for kl_coef, run in results["ppo"].items():
        ends = {name: [np.mean(curve[-LAST:]) for curve in run[name]] for name in ("kl", "score", "utility", "gold")}
        peak = [max(np.convolve(curve, np.ones(5) / 5, "valid")) for curve in run["utility"]]
        cells = [f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (*ends.values(), peak)]
        print(f"| kl_coef {kl_coef} | {' | '.join(cells)} |")
    best = results["best_of_n"]
    for i, n in enumerate(BEST_OF):
        cells = [f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in
                 ([seed[i] for seed in best[name]] for name in ("score", "utility"))]
        print(f"| best of {n} | {np.mean([seed[i] ** 2 for seed in best['d']]):.2f} | {' | '.join(cells)} | | |")
    for name, numbers in results["fits"].items():
        print(f"{name}: a = {numbers['a']:.3f}, b = {numbers['b']:.3f}, R^2 = {numbers['r2']:.3f}")


def draw(results, save):
    plt = import_pyplot()
    figure, panels = plt.subplot_mosaic("AB;CC", figsize=(10, 8), constrained_layout=True)
    axes = [panels[name] for name in "ABC"]
    for n, (kl_coef, run) in enumerate(results["ppo"].items()):
        for seed, (d, score, utility) in enumerate(zip(run["d"], run["score"], run["utility"])):
            label = f"kl_coef {kl_coef}" if seed == 0 else None
            axes[0].plot(d, score, ".", color=f"C{n}", markersize=2, alpha=0.5, label=label)
            axes[1].plot(d, utility, ".", color=f"C{n}", markersize=2, alpha=0.5)
        utility = np.array(run["utility"])
        x = np.arange(1, utility.shape[1] + 1)
        axes[2].plot(x, utility.mean(0), color=f"C{n}", label=f"utility, kl_coef {kl_coef}")
        axes[2].plot(x, np.array(run["score"]).mean(0), ":", color=f"C{n}")
    best, fits = results["best_of_n"], results["fits"]
    axes[0].plot(np.mean(best["d"], axis=0), np.mean(best["score"], axis=0), "k+-", label="best of n")
    axes[1].plot(np.mean(best["d"], axis=0), np.mean(best["utility"], axis=0), "k+", label="best of n")
    d = np.linspace(1e-3, np.max(best["d"]), 100)
    axes[1].plot(d, d * (fits["best of n"]["a"] - fits["best of n"]["b"] * d), "k-", linewidth=0.8, label="d (a - b d)")
    d = np.linspace(1e-3, FIT_UP_TO, 100)
    axes[1].plot(d, d * (fits["ppo, kl_coef 0"]["a"] - fits["ppo, kl_coef 0"]["b"] * np.log(d)), "C0-", linewidth=0.8,
                 label="d (a - b log d), kl_coef 0")
    for axis, title, x in zip(axes, ("what PPO sees: the proxy's score", "what the labeller wants: the hidden utility",
                                     "utility (solid) and score (dotted), mean of seeds"),
                              ("sqrt(KL to the SFT policy)",) * 2 + ("rollouts",)):
        axis.set(title=title, xlabel=x, ylabel="std of SFT answers")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, markerscale=4)
    figure.savefig(f"{save}.png", dpi=80)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/overoptimization.py")
    import_pyplot()  # reports a missing matplotlib before the training, not after
    workers, began = config.workers or os.cpu_count(), time.time()
    folders = [Path(config.out_dir) / f"seed{seed}" for seed in range(config.seeds)]
    run_jobs([(partial(prepare, seed=seed), folder, "stages") for seed, folder in enumerate(folders)], workers)
    run_jobs([(partial(train_proxy, seed=seed, rm_iters=config.rm_iters, candidates=config.candidates), folder, "proxy")
              for seed, folder in enumerate(folders)], workers)
    run_jobs([(partial(train_at, seed=seed, kl_coef=kl_coef, max_iters=config.max_iters), folder, f"kl_coef {kl_coef}")
              for kl_coef in KL_COEFS for seed, folder in enumerate(folders)]
             + [(partial(best_of_n, seed=seed), folder, "best of n") for seed, folder in enumerate(folders)], workers)
    results = collect(folders)
    print_table(results)
    write_results(config, folders[0] / "kl_coef 0.0", began, draw, results, results)
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
