"""
Human comparisons: does a small reward model, from scratch or on the trunk of the review model, beat chance and the
rule that the longer answer is better?

    python -m experiments.sentiment ...        first: its out_dir gets the tokenizer and the trunk
    python -m experiments.human_comparisons --hh=hh.jsonl.gz --llmbar=llmbar.jsonl.gz --hhh=hhh.jsonl.gz

Each file is split into folds by prompt. train_rm.py trains a reward model on all folds but one, and that model judges
the remaining fold. So every pair is judged once, by a model that never saw its prompt, and the judgements are pooled.
The length rule, which learns nothing, and a bag of words trained on the same folds are judged as well. The models read
the last PROMPT_TOKENS of a prompt and the first RESPONSE_TOKENS of an answer. The rule and the bag of words read
everything.

Results already in out_dir are not computed again. Drawing needs matplotlib.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import data
import train_ppo
import train_rm
import train_sft
from experiments.ladder import run_jobs, write_results
from experiments.sentiment import Vocabulary, fit_linear, train_once, write_rows
from reward_model import calibration_table
from support.checkpoint import load_checkpoint
from support.device import setup
from support.flags import check_domains, require_one_process, run_script
from support.stages import load_reward_model
from tokenizer import DataError, decode, encode_prompt, encode_response, get_tokenizer
from tools.plot import COLOURS, import_pyplot

PROMPT_TOKENS, RESPONSE_TOKENS = 56, 80
MIN_PAIRS = 20  # every point of the figure covers at least this many
STARTS = ("scratch", "reviews")  # where a reward model's trunk comes from
OVER = {"over_longer": "longer-is-better", "over_shorter": "shorter-is-better"}  # the table's differences


@dataclass
class Config:
    hh: str = "data/hh_harmless_base_test.jsonl.gz"          # pairs or HH transcripts, as --data takes them
    llmbar: str = "data/llmbar_mtbench_human_pairs.jsonl.gz"  # the same
    hhh: str = "data/hhh_alignment_pairs.jsonl.gz"           # the same
    sentiment: str = "out/sentiment"           # out_dir of experiments/sentiment.py
    out_dir: str = "out/human_comparisons"     # a folder for each file, start, seed and fold
    seeds: int = 4                             # [1, inf) seeds 0, 1, ... of the folds and of the training
    folds: int = 3                             # [2, inf) parts of a file; a model trained on the others judges each
    max_epochs: float = 1.0                    # (0, inf) passes over the training pairs, 16 at a time
    workers: Optional[int] = None              # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/human_comparisons"       # path of the figure and its numbers, without .png or .json


# ---------------------------------------------------------------------------------------------------------------------
# pairs, folds, intervals

def read_pairs(path):
    """Usable rows (data.Row with two responses) of a file."""
    rows, _ = data.read_rows(path, convert=lambda row: data.to_row(row, 2))
    return [row for row in rows if not row.problem and row.responses[0] != row.responses[1]]


def fold_of(keys, n_folds, seed):
    """The fold (N,) of each row: rows with the same key share a fold, and all folds hold equally many keys."""
    distinct = sorted(set(keys))
    order = np.random.default_rng(seed).permutation(len(distinct))
    fold = {distinct[i]: n % n_folds for n, i in enumerate(order)}
    return np.array([fold[key] for key in keys])


def interval(values, groups):
    """(mean, low, high) of values (S, N) of S seeds: the 95 % interval by the normal approximation. Its variance has
    two parts. One is over prompts, for the mean over seeds: values of one group may depend on each other in any way,
    groups may not (cluster-robust [Liang & Zeger 1986]). The other is over seeds, and needs more than one."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    pairs, seeds = values.mean(0), values.mean(1)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    variance = (np.bincount(group, pairs - pairs.mean()) ** 2).sum() / len(pairs) ** 2
    if len(seeds) > 1:
        variance += seeds.var(ddof=1) / len(seeds)
    error = 1.96 * np.sqrt(variance)
    return pairs.mean(), pairs.mean() - error, pairs.mean() + error


def right(margins):
    """1 where the chosen answer is ahead, 0 where it is behind, 0.5 for a tie."""
    return (np.sign(np.asarray(margins)) + 1) / 2


def crop(encoding, row):
    """The row as the models read it: the end of the prompt and the beginning of each answer."""
    ids = encoding.encode_ordinary(row.prompt)[-PROMPT_TOKENS:]
    answers = [decode(encoding, encoding.encode_ordinary(text)[:RESPONSE_TOKENS]) for text in row.responses]
    return {"prompt": decode(encoding, ids), "chosen": answers[0], "rejected": answers[1]}


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def scratch_trunk(folder, sentiment):
    """Makes folder/sft.pt: the review model's sizes with its initial random weights, kept by a learning rate of 0."""
    sft = load_checkpoint(Path(sentiment) / "sft.pt", "sft")["model_config"]
    train_once(train_sft, "sft", train_sft.Config(
        data=str(Path(sentiment) / "sft.jsonl"), tokenizer=str(Path(sentiment) / "tokenizer.tiktoken"),
        out_dir=str(folder), device="cpu", max_iters=1, batch_size=1, lr=0.0,
        **{name: sft[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}))


def judge_fold(folder, path, trunk, tokenizer, seed, fold, config):
    """Trains on the other folds and writes folder/margins.json: {row: score of chosen - score of rejected}. The
    scores lack the calibration for PPO, because the Bradley-Terry model turns raw differences into probabilities."""
    if (folder / "margins.json").exists():
        return
    encoding, rows = get_tokenizer(tokenizer), read_pairs(path)
    folds = fold_of([row.prompt for row in rows], config.folds, seed)
    texts = [crop(encoding, row) for row in rows]
    write_rows(folder / "train.jsonl", [text for text, other in zip(texts, folds) if other != fold])
    n_iters = max(1, round(config.max_epochs * (folds != fold).sum() / 16))
    # The answers that calibration samples are not needed here, so they are short.
    train_rm.train(train_rm.Config(data=str(folder / "train.jsonl"), init_from=str(trunk), out_dir=str(folder),
                                   seed=seed, device="cpu", max_iters=n_iters, lr=3e-4, max_new_tokens=1,
                                   overwrite=True, save_interval=10**6))
    sft = load_checkpoint(trunk, "sft")
    flags = train_ppo.Config(rm=str(folder / "rm.pt"), max_new_tokens=1)
    model, _ = load_reward_model(flags, sft["tokenizer"], sft["model_config"]["block_size"], "cpu")
    model.reset_calibration()
    fold_rows = [i for i, other in enumerate(folds) if other == fold]
    pairs = [data.Comparison(encode_prompt(encoding, texts[i]["prompt"]),
                             [encode_response(encoding, texts[i][name]) for name in ("chosen", "rejected")],
                             [(0, 1)]) for i in fold_rows]
    margins = train_rm.margins_of(model, pairs, 64, encoding.eot_token, torch.device("cpu"), setup(flags)[1])
    (folder / "margins.json").write_text(json.dumps(dict(zip(map(int, fold_rows), margins.tolist()))))


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def bag_of_words_margins(rows, folds):
    """Out-of-fold margins (N,) of a logistic regression on the difference of two answers' words."""
    margins = np.zeros(len(rows))
    for fold in np.unique(folds):
        halves = [[row for row, other in zip(rows, folds) if (other == fold) == held] for held in (False, True)]
        vocabulary = Vocabulary([text for row in halves[0] for text in row.responses], min_count=3)
        train, test = (vocabulary.features([row.responses[0] for row in part])
                       - vocabulary.features([row.responses[1] for row in part]) for part in halves)
        weights = fit_linear(train, torch.ones(len(halves[0])), l2=1e-2)
        margins[folds == fold] = torch.sparse.mm(test, weights[:, None])[:, 0].numpy()
    return margins


def pooled(folder, name, n_folds):
    """Margins (N,) of all rows, from the files that the runs folder/<name><fold> wrote."""
    margins = {}
    for fold in range(n_folds):
        margins |= json.loads((folder / f"{name}{fold}" / "margins.json").read_text())
    return np.array([margins[str(i)] for i in range(len(margins))])


def results_of(rows, learned, config):
    """{"rows", "prompts", "judges": {name: {"accuracy", "over_longer", "over_shorter", "over_words", "seeds",
    "calibration"}}} of one file. learned: {name: out-of-fold margins (N,) of each seed}; the rules and the bag of
    words are added. Rules learn nothing, so all their seeds are the same."""
    keys = [row.prompt for row in rows]
    longer = np.array([len(row.responses[0]) - len(row.responses[1]) for row in rows])
    margins = {"longer is better": [longer] * config.seeds, "shorter is better": [-longer] * config.seeds}
    margins["bag of words"] = [bag_of_words_margins(rows, fold_of(keys, config.folds, seed))
                               for seed in range(config.seeds)]
    baselines = {rule: right(runs) for rule, runs in zip(("longer", "shorter", "words"), margins.values())}
    predictors = {}
    for name, runs in (margins | learned).items():
        correct = right(runs)
        predictors[name] = {"accuracy": interval(correct, keys), "seeds": correct.mean(1).tolist()} | {
            f"over_{rule}": interval(correct - baseline[:len(correct)], keys) for rule, baseline in baselines.items()}
        if not name.endswith("better"):
            predictors[name]["calibration"] = calibration_table(torch.tensor(np.concatenate(runs)))
    return {"rows": len(rows), "prompts": len(set(keys)), "judges": predictors}


def print_table(results, over=OVER):
    print("\n| pairs | judge | accuracy (95%) | lowest to highest seed | "
          + " | ".join(f"minus {rule} (95%)" for rule in over.values()) + " |\n" + "|---" * (4 + len(over)) + "|")
    for file, result in results.items():
        pairs = f"{file}, {result['rows']:,} pairs, {result['prompts']:,} prompts"
        for name, numbers in result["judges"].items():
            seeds = f"{min(numbers['seeds']):.3f} to {max(numbers['seeds']):.3f}" if "calibration" in numbers else ""
            differences = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if (low, high) != (0, 0) else ""
                           for mean, low, high in map(numbers.get, over)]
            accuracy = "{:.3f} ({:.3f} to {:.3f})".format(*numbers["accuracy"])
            print(f"| {pairs} | {name} | {accuracy} | {seeds} | {' | '.join(differences)} |")


def draw(results, save):
    plt = import_pyplot()
    n_rows = -(-len(results) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(10, 4.2 * n_rows), sharey=True, constrained_layout=True)
    for axis in axes.flat[len(results):]:
        axis.set_axis_off()
    for axis, (file, result) in zip(axes.flat, results.items()):
        axis.plot([0.5, 1], [0.5, 1], "k:", linewidth=0.8, label="perfectly calibrated")
        learned = [(name, numbers) for name, numbers in result["judges"].items() if "calibration" in numbers]
        for n, (name, numbers) in enumerate(learned):
            _, _, count, predicted, observed = map(np.array, zip(*numbers["calibration"]))
            count = count / len(numbers["seeds"])  # the seeds judge the same pairs, so each pair counts once
            error = 1.96 * np.sqrt(observed * (1 - observed) / count)
            # side by side, so that bars do not cover each other
            x, y, error = (values[count >= MIN_PAIRS] for values in (predicted + 0.004 * (n - 1), observed, error))
            axis.errorbar(x, y, error, fmt=".-", color=COLOURS[n], linewidth=0.8, label=name)
        axis.set(title=file, xlabel="probability that the model gives", ylim=(0.2, 1.02))
        axis.grid(alpha=0.3)
        if axis in axes[..., 0]:
            axis.set_ylabel("how often people agree")
    axes.flat[0].legend(fontsize=8, loc="lower right")
    figure.savefig(f"{save}.png", dpi=80)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/human_comparisons.py")
    import_pyplot()  # reports a missing matplotlib before the training, not after
    workers, began, root = config.workers or os.cpu_count(), time.time(), Path(config.out_dir)
    files = {"HH harmless": config.hh, "LLMBar and MT-Bench": config.llmbar, "HHH": config.hhh}
    for path in files.values():
        read_pairs(path)  # reports a missing or damaged file before the training
    run_jobs([(partial(scratch_trunk, sentiment=config.sentiment), root / "scratch", "sft")], workers)
    trunks = {"scratch": root / "scratch" / "sft.pt", "reviews": Path(config.sentiment) / "sft.pt"}
    tokenizer = str(Path(config.sentiment) / "tokenizer.tiktoken")
    jobs = [(partial(judge_fold, path=path, trunk=trunks[start], tokenizer=tokenizer, seed=seed, fold=fold,
                     config=config), root / name / f"{start}{seed}{fold}", "rm")
            for seed in range(config.seeds) for name, path in files.items() for start in STARTS
            for fold in range(config.folds)]
    run_jobs(jobs, workers)
    results = {name: results_of(read_pairs(path), {
        f"reward model, {start}": [pooled(root / name, f"{start}{seed}", config.folds) for seed in range(config.seeds)]
        for start in STARTS}, config) for name, path in files.items()}
    print_table(results)
    write_results(config, jobs[0][1], began, draw, results, {"results": results})
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
