"""
PPO on a chat model that people know: SmolLM2-135M-Instruct learns to answer sums, on a laptop's CPU.

    python -m experiments.smollm2 --model=SmolLM2-135M-Instruct          a folder, or a public name

The reward is verifiable: 1 if the last number of the answer is the sum, which is a column of the data. An answer that
does not end loses eos_penalty. --task has three other tasks. There is no reward model. All weights are trained, in
float32, on one thread per run. Runs differ in the seed and in the method. `group` compares 4 answers to each of 4
questions. `critic` gives one answer to each of 16 questions and trains a second copy of the model as critic. Both see
16 answers per iteration.

Held-out questions share no pair of numbers with the training questions, not even swapped. Each is answered several
times before and after training, at the training temperature, and once greedily. A run's checkpoint is deleted once it
has been measured. Results already in out_dir are not computed again, so delete out_dir after changing a flag. Drawing
needs matplotlib.
"""

import itertools
import json
import os
import random
import re
import resource
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np

import train_ppo
from data import collate_prompts
from experiments.ladder import run_jobs, write_results
from rollout import generate
from support.checkpoint import atomic_write, load_checkpoint
from support.device import generator
from support.flags import Flags, check_domains, require, require_one_process, run_script
from support.stages import load_policy, load_start
from tokenizer import DataError, decode, eos_ids, render_messages, run_tokenizer
from tools.plot import COLOURS, import_pyplot, read_run

METHODS = {"group": dict(advantage="group", samples_per_prompt=4),
           "critic": dict(critic="separate"),
           "group, no KL": dict(advantage="group", samples_per_prompt=4, kl_coef=0.0)}
TOKENS = {"sums": 16, "steps": 24, "chains": 24, "parity": 20}  # tokens of the longest answer
EXAMPLE = "What is 3 + 4 + 6?", "3 + 4 = 7, and 7 + 6 = 13."     # the turn before each question of `steps`
SHARED = dict(batch_size=16, minibatches=2, kl_coef=0.02, temperature=0.7, log_interval=1, sample_interval=10**6,
              save_interval=10**6, micro_batch_size=8)
N_EVAL = 240  # sampled answers to held-out questions, and at most as many questions
SHOWN = 12    # questions whose answers are kept


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of pretrained weights, or a public name
    task: str = "sums"              # sums|steps|chains|parity: a + b; a + b + c after an example; a + b + c; even/odd
    out_dir: str = "out/smollm2"    # a folder per run
    seeds: int = 4                  # [1, inf) seeds 0, 1, ... of `group` and `critic`
    seeds_no_kl: int = 2            # [0, inf) seeds of `group` with kl_coef=0
    critics: bool = True            # train `critic` runs, too
    max_iters: int = 40             # [2, inf) rollouts of each run
    workers: Optional[int] = None   # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/smollm2"      # path of the figure and its numbers, without .png or .json


# ---------------------------------------------------------------------------------------------------------------------
# the task

def problems(task):
    """(training, held-out) questions: lists of (numbers, question, answer). The same numbers in another order are on
    the same side. For `steps`, those of EXAMPLE are on neither."""
    triples = list(itertools.product(range(2, 10), repeat=3))
    shown = sorted(map(int, re.findall(r"\d+", EXAMPLE[0])))
    numbers = {"sums": itertools.product(range(2, 21), range(2, 10)), "parity": zip(range(2, 200)), "chains": triples,
               "steps": [row for row in triples if sorted(row) != shown]}[task]
    groups = {}
    for row in numbers:
        question, answer = f"What is {' + '.join(map(str, row))}?", str(sum(row))
        if task == "parity":
            question, answer = f"Is {row[0]} an even number?", ("even", "odd")[row[0] % 2]
        groups.setdefault(tuple(sorted(row)), []).append((row, question, answer))
    keys = sorted(groups)
    random.Random(0).shuffle(keys)
    n = len(keys) // 4
    return tuple([row for key in part for row in groups[key]] for part in (keys[n:], keys[:n]))


def messages(question, task):
    turns = [*EXAMPLE, question] if task == "steps" else [question]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def right(prompts, responses, rows):
    """The reward: 1 for an answer whose last number is the row's, or that has the row's word and not the other one."""
    def says(response, answer):
        if answer.isdigit():
            return re.findall(r"\d+", response)[-1:] == [answer]
        return set(re.findall(r"\b(?:even|odd)\b", response.lower())) == {answer}
    return [float(says(response, row["answer"])) for response, row in zip(responses, rows)]


# ---------------------------------------------------------------------------------------------------------------------
# jobs: each runs in its own process, and its results are in files

def measure(policy, encoding, chat, task, file):
    """Writes what a policy answers to a task's held-out questions: accuracy when sampled and when greedy, the share of
    answers that end, their length, and some of them."""
    def answers(asked, temperature):
        prompts, lens = collate_prompts([render_messages(encoding, messages(text, task), chat) for _, text, _ in asked],
                                        eos_ids(encoding)[0])
        rollout = generate(policy, prompts, lens, TOKENS[task], eos=eos_ids(encoding),
                           temperature=temperature, generator=generator("cpu", "held-out questions"))
        return [decode(encoding, ids) for _, ids in rollout.ids()], rollout

    def accuracy(asked, texts):
        return float(np.mean(right(None, texts, [{"answer": answer} for _, _, answer in asked])))

    questions = problems(task)[1]
    asked = (questions * -(-N_EVAL // len(questions)))[:N_EVAL]
    sampled, rollout = answers(asked, SHARED["temperature"])
    greedy, _ = answers(asked[:len(questions)], 1e-4)
    found = {"accuracy": accuracy(asked, sampled), "greedy": accuracy(asked[:len(questions)], greedy),
             "ended": rollout.has_eos(eos_ids(encoding)).float().mean().item(),
             "length": rollout.response_lens.float().mean().item(), "samples": len(asked), "questions": len(questions),
             "answers": [(question, text) for (_, question, _), text in zip(asked[:SHOWN], sampled)]}
    with atomic_write(file) as opened:
        opened.write(json.dumps(found).encode())


def before(folder, model, task):
    """What the model says before any training."""
    if not (folder / "result.json").exists():
        start = load_start(Flags(init_from=model))
        encoding, tokenizer = run_tokenizer(None, None, start["tokenizer"])
        measure(load_policy(start), encoding, tokenizer["chat"], task, folder / "result.json")


def train(folder, model, task, method, seed, max_iters):
    """One run of PPO and its measurements, unless they exist."""
    if (folder / "result.json").exists():
        return
    if not (folder / "cost.json").exists():
        with atomic_write(folder / "data.jsonl") as file:
            for _, question, answer in problems(task)[0]:
                file.write((json.dumps({"prompt": messages(question, task), "answer": answer}) + "\n").encode())
        began, cpu = time.time(), time.process_time()
        train_ppo.train(train_ppo.Config(**SHARED | METHODS[method] | dict(
            init_from=model, data=str(folder / "data.jsonl"), reward=f"{__file__}:right", out_dir=str(folder),
            seed=seed, device="cpu", max_iters=max_iters, max_new_tokens=TOKENS[task], overwrite=True)))
        cost = {"minutes": (time.time() - began) / 60, "cpu_seconds": (time.process_time() - cpu) / max_iters,
                "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
        with atomic_write(folder / "cost.json") as file:
            file.write(json.dumps(cost).encode())
    saved = load_checkpoint(folder / "ppo.pt", "ppo")
    encoding, tokenizer = run_tokenizer(None, None, saved["tokenizer"])
    measure(load_policy(saved), encoding, tokenizer["chat"], task, folder / "result.json")
    for file in folder.glob("ppo*.pt"):  # 2 to 4 GB
        file.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# showing

def collect(folder, runs):
    """{method: [a dict for each seed]}: the result, the cost and the curves of each run."""
    results = {"before": [json.loads((folder / "before" / "result.json").read_text())]}
    for method, _, name in runs:
        run = read_run(folder / name, "ppo")
        curves = {metric: np.round(run[metric][1], 4).tolist() for metric in ("score", "kl", "response_len")}
        found = {key: value for file in ("result", "cost")
                 for key, value in json.loads((folder / name / f"{file}.json").read_text()).items()}
        results.setdefault(method, []).append(found | {"curves": curves})
    return results


def spread(values, form=".2f"):
    """Mean and range as text."""
    return f"{np.mean(values):{form}}" + (f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else "")


def print_table(results):
    print("\n| | held-out accuracy, sampled | greedy | KL at the end | tokens | answers that end | minutes | CPU s an "
          "iteration | GB |\n|---|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        columns = [spread([run[key] for run in runs]) for key in ("accuracy", "greedy")]
        trained = "curves" in runs[0]
        columns += [spread([np.mean(run["curves"]["kl"][-10:]) for run in runs])] if trained else ["0"]
        columns += [spread([run["length"] for run in runs], ".1f"), spread([run["ended"] for run in runs])]
        columns += [spread([run[key] for run in runs], ".1f") for key in ("minutes", "cpu_seconds", "gigabytes")] \
            if trained else [""] * 3
        print(f"| {name} | " + " | ".join(columns) + " |")
    last = next(iter(runs for name, runs in results.items() if name != "before"))[0]
    for (question, old), (_, new) in zip(results["before"][0]["answers"], last["answers"]):
        print(f"{question}\n    before  {old!r}\n    after   {new!r}")


def draw(results, save):
    plt = import_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, (metric, title) in zip(axes, (("score", "right answers in a rollout of 16, mean of 5 rollouts"),
                                            ("kl", "KL to the model before, nats per answer"))):
        for (name, runs), colour in zip([(n, r) for n, r in results.items() if n != "before"], COLOURS):
            curves = np.array([np.convolve(run["curves"][metric], np.ones(5) / 5, "valid") for run in runs])
            x = np.arange(5, 5 + curves.shape[1])
            axis.plot(x, curves.mean(0), label=name, color=colour)
            axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="iterations")
        axis.grid(alpha=0.3)
    axes[0].axhline(results["before"][0]["greedy"], color="grey", linestyle=":", label="held out, greedy, before")
    axes[0].legend()
    figure.savefig(f"{save}.png", dpi=80)
    plt.close(figure)


def main(config):
    check_domains(config)
    require_one_process("experiments/smollm2.py")
    import_pyplot()  # reports a missing matplotlib before an hour of training, not after
    require(config.seeds_no_kl <= config.seeds, "--seeds_no_kl must be at most --seeds")
    workers, began, folder = config.workers or os.cpu_count(), time.time(), Path(config.out_dir) / config.task
    methods = ["group"] + ["critic"] * config.critics + ["group, no KL"]
    runs = [(method, seed, f"{method.replace(', ', '_').replace(' ', '_')}_{seed}") for seed in range(config.seeds)
            for method in methods if method != "group, no KL" or seed < config.seeds_no_kl]
    run_jobs([(partial(before, model=config.model, task=config.task), folder / "before", "before")] + [
        (partial(train, model=config.model, task=config.task, method=method, seed=seed, max_iters=config.max_iters),
         folder / name, "run") for method, seed, name in runs], workers)
    results = collect(folder, runs)
    print_table(results)
    write_results(config, folder / runs[0][2], began, draw, results, {"runs": results})
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
