"""
All three stages on a chat model that people know, and how far a reward model on real weights can be pushed: short
human comparisons of HH, and SmolLM2-135M-Instruct.

    python -m experiments.smollm2_stages --model=SmolLM2-135M-Instruct --hh=hh.jsonl.gz

The short comparisons are split by prompt into two halves. train_sft.py learns the first half's chosen answers and
train_rm.py its comparisons: that reward model is the proxy. A second reward model, from the same SFT model, learns the
other half: the judge. PPO maximises the proxy's score at two values of kl_coef, and once with a larger learning rate
and no KL term. PPO's prompts are in neither half, and --eval asks the judge about held-out ones. Both scores are in
standard deviations of the SFT model's answers, whose mean is 0. If only the proxy's score rises, PPO has found flaws of
the proxy [Gao et al. 2023, 2210.10760]. The judge is not human: it has the proxy's trunk and size, and shares what both
took from the pretraining.

Results already in out_dir are not computed again, so delete out_dir after changing a flag. A seed takes about an hour
and a half on one core. Drawing needs matplotlib.
"""

import json
import os
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import train_ppo
import train_rm
import train_sft
from data import load_comparisons, pad
from experiments.human_comparisons import read_pairs
from experiments.ladder import run_jobs, write_results
from experiments.sentiment import repetition, write_rows
from experiments.smollm2_rm import messages_of
from support.checkpoint import load_checkpoint
from support.device import keep_freed_memory
from support.flags import Flags, check_domains, require_one_process, run_script
from support.stages import load_reward_model, read_start
from tokenizer import DataError, encode_response, eos_ids, render_messages, run_tokenizer
from tools.plot import COLOURS, import_pyplot, read_run

RUNS = {"kl_coef 0": dict(kl_coef=0.0, lr=1e-5), "kl_coef 0.05": dict(kl_coef=0.05, lr=1e-5),
        "kl_coef 0, lr 3e-5": dict(kl_coef=0.0, lr=3e-5)}  # the name of a run, and its flags
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 48  # the longest that a comparison may have; EOS counts
PPO_PROMPT_TOKENS = 96                   # the longest prompt of PPO, which gets more prompts that way
ROWS = 8                                 # texts in a forward pass of the judge
LAST = 10                                # a length in the table is a mean over this many first or last rollouts


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of pretrained weights, or a public name
    hh: str = "data/hh_harmless_base_test.jsonl.gz"     # HH transcripts
    out_dir: str = "out/smollm2_stages"  # a folder per seed
    seeds: int = 1                       # [1, inf) seeds 0, 1, ...
    sft_iters: int = 60                  # [1, inf) steps of 8 answers
    rm_iters: int = 40                   # [1, inf) steps of 8 comparisons
    max_iters: int = 20                  # [2, inf) rollouts of 4 answers to each of 4 prompts
    workers: Optional[int] = None        # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/smollm2_stages"    # path of the figure and its numbers, without .png or .json


def write_data(root, model, hh):
    """Writes root/proxy.jsonl and root/judge.jsonl (comparisons), root/prompts.jsonl. No two files share a prompt."""
    encoding, tokenizer = run_tokenizer(None, None, read_start(Flags(init_from=model))["tokenizer"])
    comparisons, prompts = {}, {}
    for row in read_pairs(hh):
        messages = messages_of(row.prompt)
        texts = [text.strip() for text in row.responses]
        prompt_tokens = len(render_messages(encoding, messages, tokenizer["chat"]))
        if prompt_tokens <= PPO_PROMPT_TOKENS:
            prompts[row.prompt] = {"prompt": messages}
        if prompt_tokens <= PROMPT_TOKENS and max(len(encode_response(encoding, text)) for text in texts) \
                <= RESPONSE_TOKENS:
            comparisons[row.prompt] = {"prompt": messages, "chosen": texts[0], "rejected": texts[1]}
    keys = sorted(comparisons)
    random.Random(0).shuffle(keys)
    halves = {"proxy": keys[::2], "judge": keys[1::2]}
    for name, half in halves.items():
        write_rows(root / f"{name}.jsonl", [comparisons[key] for key in half])
    write_rows(root / "prompts.jsonl", [row for key, row in prompts.items() if key not in comparisons])


def prepare(folder, model, seed, config):
    """Makes the SFT model and both reward models: folder/sft.pt, folder/proxy/rm.pt and folder/judge/rm.pt. Writes
    folder/accuracy.json: how often each reward model agrees with people on the pairs of the other one's half."""
    if (folder / "accuracy.json").exists():
        return
    keep_freed_memory()
    root, shared = folder.parent, dict(seed=seed, device="cpu", batch_size=8, save_interval=10**6)
    if not (folder / "sft.pt").exists():
        train_sft.train(train_sft.Config(data=str(root / "proxy.jsonl"), init_from=model, out_dir=str(folder), lr=2e-5,
                                         max_iters=config.sft_iters, **shared))
    for name in ("proxy", "judge"):
        if not (folder / name / "rm.pt").exists():
            train_rm.train(train_rm.Config(
                data=str(root / f"{name}.jsonl"), init_from=str(folder / "sft.pt"), out_dir=str(folder / name),
                lr=2e-5, max_iters=config.rm_iters, max_new_tokens=RESPONSE_TOKENS, **shared))
    accuracy = {}
    for name, other in (("proxy", "judge"), ("judge", "proxy")):
        judge = Judge(folder / name / "rm.pt")
        split = load_comparisons(root / f"{other}.jsonl", judge.encoding, judge.model.config.block_size,
                                 chat=judge.chat)
        pairs = split.train + split.heldout
        scores = judge.scores([row.prompt + answer for row in pairs for answer in row.responses])
        accuracy[name] = {"accuracy": (scores[::2] > scores[1::2]).float().mean().item(), "pairs": len(pairs)}
    (folder / "accuracy.json").write_text(json.dumps(accuracy))


class Judge:
    """A reward model as an --eval function: judge(prompts, responses, rows) -> scores."""

    def __init__(self, path):
        saved = load_checkpoint(path, "rm")
        self.encoding, tokenizer = run_tokenizer(None, None, saved["tokenizer"])
        self.chat = tokenizer["chat"]
        flags = train_ppo.Config(rm=str(path), max_new_tokens=RESPONSE_TOKENS)
        self.model, _ = load_reward_model(flags, saved["tokenizer"], saved["model_config"]["block_size"], "cpu")

    @torch.no_grad()
    def scores(self, texts):
        """Scores (N,) of lists of ids that end with EOS."""
        parts = [pad(texts[i:i + ROWS], eos_ids(self.encoding)[0]) for i in range(0, len(texts), ROWS)]
        return torch.cat([self.model(*part) for part in parts])

    def __call__(self, prompts, responses, rows):
        return self.scores([render_messages(self.encoding, row["prompt"], self.chat)
                            + encode_response(self.encoding, response) for row, response in zip(rows, responses)])


def train_at(folder, seed, name, max_iters):
    """One run of PPO in folder/name, with looks at held-out prompts every 5 rollouts."""
    run = folder / name
    if (run / "done").exists():
        return
    run.mkdir(exist_ok=True)
    (run / "judge.py").write_text("from experiments.smollm2_stages import Judge\n"
                                  f"judge = Judge({str(folder / 'judge' / 'rm.pt')!r})\n")
    train_ppo.train(train_ppo.Config(
        data=str(folder.parent / "prompts.jsonl"), init_from=str(folder / "sft.pt"),
        rm=str(folder / "proxy" / "rm.pt"), eval=f"{run / 'judge.py'}:judge", out_dir=str(run), seed=seed, device="cpu",
        advantage="group", samples_per_prompt=4, batch_size=16, minibatches=2, micro_batch_size=8,
        max_iters=max_iters, max_new_tokens=RESPONSE_TOKENS, log_interval=1, sample_interval=5, save_interval=10**6,
        overwrite=True, **RUNS[name]))
    (run / "done").touch()
    for file in run.glob("ppo*.pt"):  # 1.6 GB
        file.unlink()


def collect(folders):
    """{"accuracy": [a dict per seed], "runs": {name: [a dict per seed]}}: curves and the first and last samples."""
    results = {"accuracy": [json.loads((folder / "accuracy.json").read_text()) for folder in folders], "runs": {}}
    for name in RUNS:
        for folder in folders:
            run = read_run(folder / name)
            found = {metric: [column.round(4).tolist() for column in run[metric]]
                     for metric in ("score", "kl", "response_len", "score_heldout", "kl_heldout", "eval", "eval_se")}
            samples = [json.loads(line) for line in (folder / name / "samples.jsonl").open()]
            looks = [[row for row in samples if row["iter"] == at] for at in (samples[0]["iter"], samples[-1]["iter"])]
            found["repetition"] = [float(np.mean([repetition(row["response"]) for row in look])) for look in looks]
            found["samples"] = [[(row["prompt"], row["response"], row["score"]) for row in look] for look in looks]
            results["runs"].setdefault(name, []).append(found)
    return results


def print_table(results):
    for seed, accuracy in enumerate(results["accuracy"]):
        print(f"\nseed {seed}: " + ", ".join(f"{name} right on {found['accuracy']:.3f} of the other half's "
                                             f"{found['pairs']} pairs" for name, found in accuracy.items()))
    print("\n| run | proxy, first to last look | judge, first to last look (standard error) | judge at its best | KL "
          f"| tokens, first and last {LAST} rollouts | repetition, first to last look |\n|---|---|---|---|---|---|---|")
    for name, runs in results["runs"].items():
        for run in runs:
            proxy, kl, judge, error = (run[metric][1] for metric in ("score_heldout", "kl_heldout", "eval", "eval_se"))
            length = run["response_len"][1]
            print(f"| {name} | {proxy[0]:+.2f} to {proxy[-1]:+.2f} | {judge[0]:+.2f} to {judge[-1]:+.2f} "
                  f"({error[-1]:.2f}) | {max(judge):+.2f} | {kl[-1]:.1f} | {np.mean(length[:LAST]):.0f}, "
                  f"{np.mean(length[-LAST:]):.0f} | {run['repetition'][0]:.2f} to {run['repetition'][1]:.2f} |")
    for name, runs in results["runs"].items():
        print(f"\n{name}")
        for (prompt, before, low), (_, after, high) in list(zip(*runs[0]["samples"]))[:6]:
            print(f"{prompt!r}\n    {low:+.2f}  {before!r}\n    {high:+.2f}  {after!r}")


def draw(results, save):
    plt = import_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for (name, runs), colour in zip(results["runs"].items(), COLOURS):
        for axis, x in zip(axes, (None, "kl_heldout")):
            for n, run in enumerate(runs):
                at = run["eval"][0] if x is None else np.sqrt(np.maximum(run[x][1], 0))
                proxy, judge = (None, None) if n else (f"proxy, {name}", f"judge, {name}")
                axis.plot(at, run["score_heldout"][1], ":", color=colour, label=proxy)
                axis.errorbar(at, run["eval"][1], run["eval_se"][1], color=colour, label=judge)
    for axis, label in zip(axes, ("rollouts", "sqrt(KL to the SFT model)")):
        axis.set(xlabel=label, ylabel="score, std of the SFT model's answers")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(f"{save}.png", dpi=80)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/smollm2_stages.py")
    import_pyplot()  # reports a missing matplotlib before an hour of training, not after
    workers, began, root = config.workers or os.cpu_count(), time.time(), Path(config.out_dir)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "prompts.jsonl").exists():
        write_data(root, config.model, config.hh)
    folders = [root / f"seed{seed}" for seed in range(config.seeds)]
    run_jobs([(partial(prepare, model=config.model, seed=seed, config=config), folder, "stages")
              for seed, folder in enumerate(folders)], workers)
    run_jobs([(partial(train_at, seed=seed, name=name, max_iters=config.max_iters), folder, name)
              for seed, folder in enumerate(folders) for name in RUNS], workers)
    results = collect(folders)
    print_table(results)
    write_results(config, folders[0] / next(iter(RUNS)), began, draw, results, results)
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
