"""
Real reviews: a policy learns to continue the first words of a film review positively, and a separate judge rates it.

    python -m experiments.sentiment --labelled=train.jsonl.gz --test=test.jsonl.gz --unsup=unsup.jsonl.gz

Rows are {"text", "label"} (1 positive, 0 negative), or {"text"} in the unsup file: the Large Movie Review Dataset [Maas
et al. 2011] or any similar texts. The tokenizer and the SFT policy see `unsup`. The reward model sees the even rows of
`labelled`, the judge the odd ones. PPO sees the openings of all rows of `test`, except the last N_EVAL and the few
that begin like one of them. Policies are measured on the openings of the last N_EVAL, the reward model and the judge on
all of `test` except those few. No row is in two of these parts, though reviews in two parts may begin alike.

Every text is cut to its first `text_tokens` tokens and ends with EOS there. So the policy learns when to stop, and the
reward model reads in PPO what it was trained on, with EOS at the usual place. The reward model and the judge also learn
from the later passages of that length in a review, with the review's label. PROMPT precedes every text, because the two
reviews of a pair must share a prompt. The judge is a bag of words and never part of the training. If the reward model's
score rises and the judge's does not, PPO has found the reward model's mistakes.

All seeds share one SFT policy; they differ in the reward model and in PPO. Results already in out_dir are not computed
again: delete out_dir after changing the data or the sizes. Drawing needs matplotlib.
"""

import json
import os
import re
import time
from collections import Counter
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
from experiments.ladder import run_jobs, write_results
from rollout import generate, score_response
from support.checkpoint import atomic_write, load_checkpoint
from support.device import generator
from support.flags import check_domains, require, require_one_process, run_script
from support.stages import load_policy, load_reward_model
from tokenizer import DataError, decode, encode_prompt, encode_response, get_tokenizer
from tools.bpe import learn_bpe, write_ranks
from tools.plot import COLOURS, import_pyplot, read_run

KL_COEFS = (0.0, 0.05, 0.2)
PROMPT = ">"
OPENING = 4      # words of a review that the policy continues
PAIRINGS = 2     # pairs per labelled passage, each with another passage of the opposite label
N_EVAL = 512     # held-out openings; one continuation of each is judged
MEASURES = ("kl", "score", "judge", "positive", "perplexity", "repetition", "distinct_1", "distinct_2", "length",
            "eos_rate")


@dataclass
class Config:
    labelled: str = "data/imdb_train_20k.jsonl.gz"  # {"text", "label"}: reward model and judge
    test: str = "data/imdb_test_5k.jsonl.gz"        # {"text", "label"}: openings, and what is measured
    unsup: str = "data/imdb_unsup_25k.jsonl.gz"     # {"text"}: tokenizer and SFT policy
    out_dir: str = "out/sentiment"  # the shared stages, and a folder per seed
    seeds: int = 4                  # [1, inf) seeds 0, 1, ...
    vocab_size: int = 2048          # [256, inf) tokens of the tokenizer, EOS not counted
    text_tokens: int = 32           # [1, inf) tokens that a review is cut to
    n_layer: int = 2                # [1, inf) layers
    n_head: int = 4                 # [1, inf) attention heads
    n_embd: int = 128               # [1, inf) width
    sft_iters: int = 2000           # [1, inf) optimizer steps of the SFT policy, on 64 reviews each
    rm_iters: int = 1200            # [1, inf) optimizer steps of the reward model, on 32 pairs each
    max_iters: int = 40             # [1, inf) rollouts of each PPO run, of 128 continuations each
    every: int = 5                  # [1, inf) rollouts between looks at the policy
    workers: Optional[int] = None   # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/sentiment"    # path of the figure and its numbers, without .png or .json


# ---------------------------------------------------------------------------------------------------------------------
# texts

def one_line(text):
    """The words of a text, a space before each, so that a cut between words never changes how the rest is tokenized."""
    return "".join(f" {word}" for word in text.split())


def cut(encoding, text, n_tokens):
    """The longest run of whole words at the beginning of one_line(text) that has at most n_tokens tokens."""
    ids = encoding.encode_ordinary(one_line(text))
    head, rest = encoding.decode_bytes(ids[:n_tokens]), encoding.decode_bytes(ids[n_tokens:])
    return (head if not rest or rest.startswith(b" ") else head.rpartition(b" ")[0]).decode()


def passages(encoding, text, n_tokens):
    """A text in runs of whole words, each as long as n_tokens tokens allow. The first is cut(...). Later runs of fewer
    than half as many tokens are left out. The runs end before a word of more than n_tokens tokens."""
    runs, rest = [], one_line(text)
    while rest and (run := cut(encoding, rest, n_tokens)):
        runs.append(run)
        rest = rest[len(run):]
    return runs[:1] + [run for run in runs[1:] if 2 * len(encoding.encode_ordinary(run)) >= n_tokens]


def labelled_passages(encoding, rows, n_tokens):
    """(texts, labels) of the passages of rows {"text", "label"}."""
    labelled = [(run, row["label"]) for row in rows for run in passages(encoding, row["text"], n_tokens)]
    return tuple(map(list, zip(*labelled)))


def opening(text):
    return one_line(" ".join(text.split()[:OPENING]))


def split_texts(config):
    """{who: rows}: the rows of the files that each one sees. No two share a row, and no row of "prompts" begins like
    one of "test"."""
    labelled, test, unsup = (data.read_rows(path)[0] for path in (config.labelled, config.test, config.unsup))
    openings = {opening(row["text"]) for row in test[-N_EVAL:]}
    return {"sft": unsup, "rm": labelled[::2], "judge": labelled[1::2], "test": test[-N_EVAL:],
            "prompts": [row for row in test[:-N_EVAL] if opening(row["text"]) not in openings]}


def write_rows(path, rows):
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def prepare_texts(config):
    """Writes tokenizer.tiktoken and the data files of the three stages into out_dir, unless they exist."""
    folder, thirds = Path(config.out_dir), split_texts(config)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = folder / "tokenizer.tiktoken"
    if not ranks.exists():
        write_ranks(ranks, learn_bpe([one_line(row["text"])[:200] for row in thirds["sft"]], config.vocab_size))
    encoding = get_tokenizer(ranks)
    if not (folder / "prompts.jsonl").exists():
        write_rows(folder / "sft.jsonl", [{"prompt": PROMPT, "response": cut(encoding, row["text"], config.text_tokens)}
                                          for row in thirds["sft"]])
        texts, labels = labelled_passages(encoding, thirds["rm"], config.text_tokens)
        good, bad = ([text for text, other in zip(texts, labels) if other == label] for label in (1, 0))
        rng = np.random.default_rng(0)
        pairs = [pair for _ in range(PAIRINGS) for pair in zip(rng.permutation(good), rng.permutation(bad))]
        write_rows(folder / "pairs.jsonl", [{"prompt": PROMPT, "chosen": a, "rejected": b} for a, b in pairs])
        write_rows(folder / "prompts.jsonl", [{"prompt": PROMPT + opening(row["text"])} for row in thirds["prompts"]])
    return encoding, thirds


# ---------------------------------------------------------------------------------------------------------------------
# the judge, and the same classifier as a baseline for the reward model

def fit_linear(features, labels, l2=1e-3):
    """Weights (V,) of a logistic regression on sparse features (N, V) for labels (N,) in {0, 1}: the minimum of the
    mean loss + l2 / 2 * |weights|^2, by LBFGS in float64, because in float32 its line search ends early."""
    features, labels = features.double(), labels.double()
    weights = torch.zeros(features.size(1), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.sparse.mm(features, weights[:, None])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + l2 * weights.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().float()


def words_of(text):
    return set(re.findall(r"[\w']+", text.lower()))


class Vocabulary:
    """Words of a text as a sparse row of 0 and 1: those in min_count or more of `texts`. Column 0 is 1 in every row."""

    def __init__(self, texts, min_count=5):
        counts = Counter(word for text in texts for word in words_of(text))
        self.column = {word: i for i, word in enumerate(sorted(w for w in counts if counts[w] >= min_count), 1)}

    def features(self, texts):
        """texts -> sparse (N, V) of 0 and 1."""
        where = [(i, j) for i, text in enumerate(texts)
                 for j in [0, *sorted(self.column[word] for word in words_of(text) if word in self.column)]]
        return torch.sparse_coo_tensor(torch.tensor(where).T, torch.ones(len(where)),
                                       (len(texts), 1 + len(self.column)), check_invariants=True).coalesce()


class Judge:
    """Bag-of-words logistic regression on texts and their labels (1 positive, 0 negative). probabilities(texts)
    returns the probability (N,) that each is positive."""

    def __init__(self, texts, labels):
        self.vocabulary = Vocabulary(texts)
        self.weights = fit_linear(self.vocabulary.features(texts), torch.tensor(labels, dtype=torch.float))

    def probabilities(self, texts):
        return torch.sigmoid(torch.sparse.mm(self.vocabulary.features(texts), self.weights[:, None])[:, 0])

    def accuracy(self, texts, labels):
        return ((self.probabilities(texts) > 0.5) == torch.tensor(labels)).float().mean().item()


def repetition(text):
    """Share of a text's 3-grams of words that occurred before in it; 0 for a text of fewer than 3 words."""
    grams = ngrams(text, 3)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts, n):
    """Number of different n-grams in all texts over the number of n-grams [Li et al. 2016, 1510.03055]."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def ngrams(text, n):
    words = text.split()
    return list(zip(*(words[i:] for i in range(n))))


# ---------------------------------------------------------------------------------------------------------------------
# stages: train_sft, train_rm and train_ppo do the training

def train_once(module, stage, config):
    """Runs a stage to max_iters. Resumes a checkpoint with the same flags, and overwrites one with other flags."""
    path = config.folder / f"{stage}.pt"
    saved = load_checkpoint(path, stage) if path.exists() else None
    same = bool(saved) and saved["iter"] <= config.max_iters and asdict(config) == saved["flags"] | {
        "max_iters": config.max_iters, "resume": False, "overwrite": False}
    if not (same and saved["iter"] == config.max_iters):
        module.train(replace(config, resume=same, overwrite=not same))


def train_policy(folder, config):
    """The SFT policy: folder/sft.pt. Its context is longer than the reviews, for experiments/human_comparisons.py."""
    train_once(train_sft, "sft", train_sft.Config(
        data=str(folder / "sft.jsonl"), tokenizer=str(folder / "tokenizer.tiktoken"), out_dir=str(folder), device="cpu",
        max_iters=config.sft_iters, batch_size=64, lr=2e-3, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, block_size=160, save_interval=100))


def train_reward_model(folder, config, seed):
    """folder/rm.pt, calibrated on whole reviews that the SFT policy writes."""
    train_once(train_rm, "rm", train_rm.Config(
        data=str(folder.parent / "pairs.jsonl"), init_from=str(folder.parent / "sft.pt"), seed=seed,
        out_dir=str(folder), device="cpu", max_iters=config.rm_iters, batch_size=32, lr=6e-4,
        max_new_tokens=config.text_tokens + 1))


def run_ppo(folder, config, seed, kl_coef):
    """One PPO run in folder/kl_coef <x>. Measures the policy every `every` rollouts, into curve.json."""
    run = folder / f"kl_coef {kl_coef}"
    run.mkdir(exist_ok=True)
    ppo = train_ppo.Config(
        data=str(folder.parent / "prompts.jsonl"), init_from=str(folder.parent / "sft.pt"), rm=str(folder / "rm.pt"),
        seed=seed, out_dir=str(run), device="cpu", batch_size=128, max_new_tokens=config.text_tokens + 1,
        kl_coef=kl_coef, save_interval=10**6, sample_interval=10**6)
    measure = Measure(config, folder / "rm.pt")
    curve = json.loads((run / "curve.json").read_text()) if (run / "curve.json").exists() else []
    if not curve:
        curve = [measure(folder.parent / "sft.pt", "sft") | {"iter": 0}]
    for stop in range(config.every, config.max_iters + 1, config.every):
        if stop <= curve[-1]["iter"]:
            continue
        path = run / "ppo.pt"
        if not path.exists() or load_checkpoint(path, "ppo")["iter"] < stop:
            train_ppo.train(replace(ppo, max_iters=stop, resume=path.exists()))
        curve.append(measure(path, "ppo") | {"iter": stop})
        (run / "curve.json").write_text(json.dumps(curve))


def reward_model_of(config, path):
    sft = load_checkpoint(Path(config.out_dir) / "sft.pt", "sft")
    flags = train_ppo.Config(rm=str(path), max_new_tokens=config.text_tokens + 1)
    return load_reward_model(flags, sft["tokenizer"], sft["model_config"]["block_size"], "cpu")[0]


class Measure:
    """measure(path, stage) -> {measure: number, "samples"} of the policy in a checkpoint, on the held-out openings."""

    def __init__(self, config, rm):
        folder = Path(config.out_dir)
        self.encoding, thirds = prepare_texts(config)
        self.judge_model = Judge(*labelled_passages(self.encoding, thirds["judge"], config.text_tokens))
        self.reference = load_policy(load_checkpoint(folder / "sft.pt", "sft"), "cpu")
        self.reward_model = reward_model_of(config, rm)
        self.openings, self.max_new_tokens = [opening(row["text"]) for row in thirds["test"]], config.text_tokens + 1

    @torch.no_grad()
    def __call__(self, path, stage):
        policy, eos = load_policy(load_checkpoint(path, stage), "cpu"), self.encoding.eot_token
        prompts, lens = data.collate_prompts(
            [encode_prompt(self.encoding, PROMPT + text) for text in self.openings], eos)
        rollout = generate(policy, prompts, lens, self.max_new_tokens, eos=eos,
                           generator=generator("cpu", "held-out openings"))
        return self.numbers(policy, rollout)

    @torch.no_grad()
    def numbers(self, policy, rollout):
        """The measures of a Rollout, whose log-probs are computed again under `policy` and under the SFT policy."""
        tokens, lens, mask = rollout.tokens, rollout.prompt_lens, rollout.mask
        logprob, ref_logprob = ((score_response(model, tokens, lens, mask.size(1))[0] * mask).sum(1)
                                for model in (policy, self.reference))
        ends = lens + rollout.response_lens
        texts = [decode(self.encoding, row[1:end]) for row, end in zip(tokens.tolist(), ends.tolist())]
        scores, verdicts = self.reward_model(tokens, ends), self.judge_model.probabilities(texts)
        has_eos = rollout.has_eos(self.encoding.eot_token)
        result = {"kl": (logprob - ref_logprob).mean(), "score": scores.mean(), "judge": verdicts.mean(),
                  "positive": (verdicts > 0.5).float().mean(), "perplexity": (-ref_logprob.sum() / mask.sum()).exp(),
                  "repetition": np.mean([repetition(text) for text in texts]), "distinct_1": distinct(texts, 1),
                  "distinct_2": distinct(texts, 2), "length": mask.sum() / len(mask),
                  "eos_rate": has_eos.float().mean()}
        # Samples are chosen by a fixed rule, not cherry-picked: three openings fixed in advance, and the reward model's
        # favourite among the texts that the judge calls negative.
        negative = (verdicts < 0.5).nonzero().flatten()
        chosen = [0, 1, 2] + ([int(negative[scores[negative].argmax()])] if len(negative) else [])
        return {name: round(float(result[name]), 4) for name in MEASURES} | {"samples": [
            {"opening": self.openings[i], "text": texts[i], "score": round(scores[i].item(), 2),
             "judge": round(verdicts[i].item(), 2)} for i in chosen]}


def columns(rows):
    return [row["text"] for row in rows], [row["label"] for row in rows]


def examine(config, folders):
    """Two dicts. The first says how accurate the judges are on reviews that none of them saw, cut like all others: the
    judge, and over pairs of a positive and a negative review the judge, each seed's reward model and a bag of words
    trained on the reward model's texts. The second has the measures of the real reviews with the held-out openings."""
    encoding, thirds = prepare_texts(config)
    texts, labels = columns(thirds["prompts"] + thirds["test"])
    texts = [cut(encoding, text, config.text_tokens) for text in texts]
    baseline = Judge(*labelled_passages(encoding, thirds["rm"], config.text_tokens))
    measure, good = Measure(config, folders[0] / "rm.pt"), torch.tensor(labels) == 1
    tokens, lens = data.pad([encode_prompt(encoding, PROMPT) + encode_response(encoding, text)
                             for text in texts], encoding.eot_token)
    models = [reward_model_of(config, folder / "rm.pt") for folder in folders]
    with torch.no_grad():
        scores = [torch.cat([model(*part) for part in zip(tokens.split(256), lens.split(256))]) for model in models]
    return {"reviews": len(texts), "judge": measure.judge_model.accuracy(texts, labels),
            "judge, pairs": paired_accuracy(measure.judge_model.probabilities(texts), good),
            "bag of words, pairs": paired_accuracy(baseline.probabilities(texts), good),
            "reward model, pairs": [paired_accuracy(x, good) for x in scores]
            }, real_reviews(measure, texts[-len(thirds["test"]):])


def paired_accuracy(scores, good):
    """Share of all pairs of a positive (good (N,) True) and a negative text in which the positive one scores higher."""
    return (scores[good][:, None] > scores[~good][None, :]).float().mean().item()


@torch.no_grad()
def real_reviews(measure, texts):
    """The measures that make sense for the real reviews with the same openings."""
    rows = [encode_prompt(measure.encoding, PROMPT + opening(text)) for text in texts]
    rest = [encode_response(measure.encoding, text[len(opening(text)):]) for text in texts]
    tokens, prompt_lens, _, mask = data.collate_demonstrations(
        [data.Demonstration(*row) for row in zip(rows, rest)], measure.encoding.eot_token)
    logprobs = score_response(measure.reference, tokens, prompt_lens, mask.size(1))[0]
    verdicts = measure.judge_model.probabilities(texts)
    return {"judge": verdicts.mean().item(), "positive": (verdicts > 0.5).float().mean().item(),
            "perplexity": (-logprobs[mask].mean()).exp().item(),
            "repetition": float(np.mean([repetition(text) for text in texts])),
            "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def collect(folders, kl_coefs):
    """{kl_coef: {measure: a curve per seed, "iter", "samples" of the first seed's first and last policy}}."""
    results = {}
    for kl_coef in kl_coefs:
        curves = [json.loads((folder / f"kl_coef {kl_coef}" / "curve.json").read_text()) for folder in folders]
        results[str(kl_coef)] = {name: [[point[name] for point in curve] for curve in curves] for name in MEASURES} | {
            "iter": [point["iter"] for point in curves[0]],
            "samples": {"before": curves[0][0]["samples"], "after": curves[0][-1]["samples"]}}
    return results


def step_seconds(root, folders):
    """{stage: median seconds of a step}. Pauses of a shared machine hardly move a median."""
    runs = {"sft": [root], "rm": folders, "ppo": [folder / f"kl_coef {x}" for folder in folders for x in KL_COEFS]}
    return {stage: float(np.median(np.concatenate([read_run(run, stage)["seconds"][1] for run in some])))
            for stage, some in runs.items()}


def over_seeds(values, digits):
    """"mean (lowest to highest)" of a number per seed."""
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def print_table(results):
    """Prints Markdown: every second look at the policies and the last, the accuracy of the judges, and samples."""
    digits = {name: {"judge": 3, "positive": 3, "repetition": 3, "perplexity": 0}.get(name, 2) for name in MEASURES}
    print("\n| policy, rollouts | " + " | ".join(MEASURES) + " |\n|" + "---|" * (len(MEASURES) + 1))
    for n, (kl_coef, run) in enumerate(results["ppo"].items()):
        looks = sorted({*range(0, len(run["iter"]), 2), len(run["iter"]) - 1})
        for look in looks[min(n, 1):]:  # the first policy is the same for every kl_coef
            cells = [over_seeds([curve[look] for curve in run[name]], digits[name]) for name in MEASURES]
            title = f"kl_coef {kl_coef}, {run['iter'][look]}" if look else "SFT, 0"
            print(f"| {title} | {' | '.join(cells)} |")
    real, accuracy = results["real reviews"], results["accuracy"]
    cells = [f"{real[name]:.{digits[name]}f}" if name in real else "" for name in MEASURES]
    print(f"| real reviews | {' | '.join(cells)} |\n\n| on {accuracy['reviews']:,} reviews | accuracy |\n|---|---|")
    for name in list(accuracy)[1:]:
        print(f"| {name} | {over_seeds(np.atleast_1d(accuracy[name]), 3)} |")
    print("\n| stage | seconds of a step (median) |\n|---|---|")
    for stage, seconds in results["seconds"].items():
        print(f"| {stage} | {seconds:.2f} |")
    before = next(iter(results["ppo"].values()))["samples"]["before"]
    for title, samples in [("SFT", before)] + [(f"kl_coef {kl_coef}", run["samples"]["after"])
                                               for kl_coef, run in results["ppo"].items()]:
        print(f"\n{title}:\n")
        for sample in samples:
            print(f"    score {sample['score']:+.2f}  judge {sample['judge']:.2f}  {sample['text'].strip()!r}")


def draw(results, save):
    plt = import_pyplot()
    panels = (("score", "what PPO sees: the reward model's score", "std of SFT texts"),
              ("judge", "what the judge sees", "mean probability of being positive"),
              ("perplexity", "fluency: perplexity under the SFT policy", "per token, log scale"),
              ("distinct_2", "variety: different word pairs", "share of all word pairs"))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for axis, (name, title, unit) in zip(axes.flat, panels):
        for n, (kl_coef, run) in enumerate(results["ppo"].items()):
            for kl, values in zip(run["kl"], run[name]):  # one line per seed
                axis.plot(np.clip(kl, 0, None), values, color=COLOURS[n], linewidth=0.8, alpha=0.35)
            axis.plot(np.clip(np.mean(run["kl"], 0), 0, None), np.mean(run[name], 0), ".-", color=COLOURS[n],
                      linewidth=2.4, markersize=9, label=f"kl_coef {kl_coef}")
        if name in results["real reviews"]:
            axis.axhline(results["real reviews"][name], color="k", linewidth=0.8, linestyle=":", label="real reviews")
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
        axis.set(title=title, ylabel=unit)
        axis.set_xlim(left=0)
        axis.set_xticks([kl for kl in (0, 2, 10, 25, 50, 100, 200, 400) if kl <= axis.get_xlim()[1]])
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("KL to the SFT policy, nats per text (square-root scale)")
    axes[0, 1].legend()
    perplexity = axes[1, 0]
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    perplexity.yaxis.set_major_formatter("{x:.0f}")
    perplexity.yaxis.set_minor_formatter(plt.NullFormatter())
    figure.savefig(f"{save}.png", dpi=80)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/sentiment.py")
    require(config.max_iters % config.every == 0, f"--max_iters={config.max_iters} is no multiple of "
            f"--every={config.every}, so the last rollouts would be left out: change one of them")
    import_pyplot()  # reports a missing matplotlib before the training, not after
    workers, began, root = config.workers or os.cpu_count(), time.time(), Path(config.out_dir)
    prepare_texts(config)
    folders = [root / f"seed{seed}" for seed in range(config.seeds)]
    run_jobs([(partial(train_policy, config=config), root, "sft")], workers)
    run_jobs([(partial(train_reward_model, config=config, seed=seed), folder, "rm")
              for seed, folder in enumerate(folders)], workers)
    run_jobs([(partial(run_ppo, config=config, seed=seed, kl_coef=kl_coef), folder, f"kl_coef {kl_coef}")
              for seed, folder in enumerate(folders) for kl_coef in KL_COEFS], workers)
    accuracy, real = examine(config, folders)
    results = {"ppo": collect(folders, KL_COEFS), "accuracy": accuracy, "real reviews": real,
               "seconds": step_seconds(root, folders)}
    print_table(results)
    write_results(config, folders[0] / "kl_coef 0.0", began, draw, results, results)
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
