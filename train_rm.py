"""
Stage 1: the reward model. Trains a scalar score on comparisons, so that the preferred answer scores higher.

    python train_rm.py                                  the built-in task: needs out/atlas/sft.pt (python train_sft.py)
    python train_rm.py --data=pairs.jsonl               human comparisons from a file
    python train_rm.py --resume --max_iters=1000        continue from out_dir/rm.pt

On atlas this is section II of the derivation step by step: sample prompts, sample several candidates for each from
the SFT policy, have the (simulated) labeller compare them, fit the Bradley-Terry model to the comparisons. On a file
the comparisons are already there. Either way the finished model is calibrated on samples of the SFT policy, and
there is no PPO, no margin loss and no score centring here.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from typing import Optional

import numpy as np
import torch

import atlas
from data import BatchOrder, Comparison, collate_comparisons, load_comparisons, load_prompts, pad
from experience import Experience
from reward_model import RewardModel, bradley_terry_loss, calibration_table
from support import distributed
from support.checkpoint import open_run
from support.device import (CPU_BUDGET, activations, describe, hold_frozen, maybe_compile, micro_batch_size, setup,
                            spare_memory)
from support.flags import Flags, require, run_script
from support.metrics import Metrics, print_report, progress
from support.optimizer import Optimizer, update_average
from support.stages import load_policy, load_start, resolve_lr, resolve_max_new_tokens
from tokenizer import DataError, decode, encode_prompt, encode_response, eos_ids, run_tokenizer

EVAL_ROWS = 512         # one evaluation reads at most this many held-out comparisons
CANDIDATES = 24         # atlas: answers per prompt; with 12, the model memorises the labeller's noise
SAMPLE_ROWS = 1024      # at most this many answers are sampled at a time,
SAMPLE_BYTES = 1e9      # and no more than fit in a float32 KV cache of this many bytes
CALIBRATION_ROWS = 512  # samples of the SFT policy that set the zero and the unit of the score
SCORE_ROWS = 64         # of those, rows per forward pass


@dataclass
class Config(Flags):
    # this stage
    init_from: Optional[str] = None  # an SFT checkpoint or pretrained weights; default: out_dir/sft.pt
    max_iters: int = 600             # [1, inf) optimizer steps; stop before the held-out loss rises
    batch_size: int = 16             # [1, inf) comparisons per step; on atlas each holds --candidates answers
    lr: Optional[float] = None       # [0, inf) default: 7e-4, for width 128; 1e-5 from pretrained weights
    candidates: Optional[int] = None  # [2, inf) atlas: answers per prompt, compared pair by pair; default 24
    max_new_tokens: Optional[int] = None  # [1, inf) longest sampled answer, in tokens; default: as in train_ppo.py
    temperature: float = 1.0         # (0, inf) sampling temperature; use PPO's, because scores are calibrated at it
    log_interval: int = 100          # [1, inf) iterations between lines, each with the loss on held-out rows
    save_interval: int = 500         # [1, inf) iterations between checkpoints; the last iteration always saves


def sample(experience, policy, prompts, purpose, copies=1):
    """`copies` responses of the policy to each of prompts (lists of ids), one after the other: lists of ids that end
    with EOS. A cut response is given one, as in PPO: a reward model has only learned to judge texts that end."""
    rng, responses = experience.rng(purpose), []
    asked = [prompt for prompt in prompts for _ in range(copies)]
    longest = max(map(len, prompts)) + experience.config.max_new_tokens
    fit = int(SAMPLE_BYTES / (4 * policy.config.cache_size * longest))
    step = max(1, min(SAMPLE_ROWS, fit) // copies) * copies
    with progress(f"sampling {len(asked):,} answers of the SFT policy", lambda: f"{len(responses):,} done"):
        for i in range(0, len(asked), step):
            some = asked[i:i + step]
            rollout = experience.sample(policy, distributed.fill_up(some), rng, copies)
            responses += [response for _, response in rollout.ids()][:len(some)]
    ends = eos_ids(experience.encoding)
    return [response if response[-1] in ends else [*response, experience.pad] for response in responses]


def load_data(config, encoding, block_size):
    """The Split of comparisons (None for atlas, whose comparisons are sampled), and the prompts whose answers calibrate
    the score. Raises DataError."""
    resolve_max_new_tokens(config, encoding, block_size)
    split = None if config.data == "atlas" else load_comparisons(config.data, encoding, block_size, config.skip_bad,
                                                                      config.chat)
    return split, load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad,
                               chat=config.chat).train


def atlas_comparisons(experience, policy, split):
    """Steps 1 to 3 of section II: prompts, candidates from the SFT policy, the labeller's choice from each pair."""
    encoding, config = experience.encoding, experience.config
    rng, K = np.random.default_rng([config.seed, split == "heldout"]), config.candidates or CANDIDATES
    questions = atlas.prompts(split)
    prompts = [encode_prompt(encoding, question) for question in questions]
    answers = sample(experience, policy, prompts, f"candidates {split}", copies=K)
    comparisons = []
    for i, (question, prompt) in enumerate(zip(questions, prompts)):
        # Answers that were sampled more than once share a row, and so a forward pass, but each sample is compared with
        # all that differ from it: what the policy often says is judged often.
        sampled = [tuple(answer) for answer in answers[i * K:(i + 1) * K]]
        distinct = list(dict.fromkeys(sampled))
        row_of = {answer: row for row, answer in enumerate(distinct)}
        texts = [decode(encoding, answer) for answer in distinct]
        pairs = [(row_of[a], row_of[b]) for a, b in itertools.combinations(sampled, 2) if a != b]
        pairs = [(a, b) if atlas.label(question, texts[a], texts[b], rng) else (b, a) for a, b in pairs]
        if pairs:
            comparisons.append(Comparison(prompt, list(map(list, distinct)), pairs))
    return comparisons


def labeller_entropy(comparisons, encoding):
    """Mean entropy in nats of the labeller's choices on these pairs: no reward model can expect a lower loss."""
    probabilities = []
    for row in comparisons:
        question, texts = decode(encoding, row.prompt), [decode(encoding, answer) for answer in row.responses]
        probabilities += [atlas.preference(question, texts[a], texts[b]) for a, b in row.pairs]
    return float(atlas.label_entropy(np.array(probabilities)).mean())


def collated(comparisons, eos, device):
    """What collate_comparisons returns, on the device. On a GPU T is a multiple of 16: otherwise attention copies its
    mask in each layer."""
    multiple = 1 if torch.device(device).type == "cpu" else 16
    return (x.to(device) for x in collate_comparisons(comparisons, eos, multiple))


@torch.no_grad()
def margins_of(model, comparisons, micro, eos, device, autocast):
    """Score differences chosen - rejected (M,) of all pairs, on the CPU."""
    margins = [torch.empty(0)]
    for i in range(0, len(comparisons), micro):
        *texts, chosen, rejected = collated(comparisons[i:i + micro], eos, device)
        with autocast():
            scores = model(*texts)
        margins.append((scores[chosen] - scores[rejected]).float().cpu())
    return torch.cat(margins)


@torch.no_grad()
def calibrate(experience, model, policy, prompts):
    """Sets the zero and unit of the model's score to its mean and spread on the SFT policy's own answers."""
    some = BatchOrder([1] * len(prompts), CALIBRATION_ROWS, experience.config.seed).order(0)
    answers = sample(experience, policy, [prompts[i] for i in some], "calibration")
    rows = [prompts[i] + answer for i, answer in zip(some, answers)]
    tokens, lens = (x.to(experience.device) for x in pad(rows, experience.pad))
    with experience.autocast():
        raw = torch.cat([model(*part) for part in zip(*(x.split(SCORE_ROWS) for x in (tokens, lens)))])
    model.calibrate(raw)
    print(f"calibrated on {CALIBRATION_ROWS} answers of the SFT policy: raw mean {raw.mean():.3f} and std "
          f"{raw.std(unbiased=False):.3f} become 0 and 1")


def print_calibration(row, margins):
    """Prints the last held-out accuracy and loss, and whether the model is right as often as it is sure."""
    print(f"held-out accuracy {row['heldout_accuracy']:.3f}, loss {row['heldout_loss']:.4f} (no opinion: "
          f"{math.log(2):.4f})")
    print("when the model is this sure of a preference, the labeller agrees this often:")
    for low, high, count, predicted, observed in calibration_table(margins):
        print(f"  sure {low:.1f} to {high:.1f}: {count:>6,} pairs, mean {predicted:.3f}, agreed {observed:.3f}")


def train(config):
    """Runs the stage, writes out_dir/rm.pt and returns its final metrics."""
    config.check()
    require(config.data == "atlas" or config.candidates is None, "--candidates is for --data=atlas; a file "
            "holds the answers that were compared already")
    with open_run(replace(config), "rm") as run:
        return loop(run.config, run)


def loop(config, run):
    """The stage itself; `run` restores and saves its checkpoint."""
    device, autocast = setup(config)
    sft = load_start(config)
    encoding, tokenizer = run_tokenizer(config.tokenizer, config.data, sft["tokenizer"], config.chat)
    config.chat = tokenizer["chat"]
    block_size = sft["model_config"]["block_size"]
    resolve_lr(config, sft, 7e-4, 1e-5)
    resolve_max_new_tokens(config, encoding, block_size)
    sft["model_config"]["dropout"] = 0.0
    policy = load_policy(sft)
    model = RewardModel.from_policy(policy)
    average = copy.deepcopy(model).requires_grad_(False)  # what is evaluated, calibrated and saved as the reward model
    distributed.to_device(device, config, autocast, policy, model, average)
    hold_frozen(autocast, device, policy)
    optimizer = Optimizer(model.parameters(), config)
    start, _ = run.begin(optimizer, {"model": average, "weights": model}, tokenizer, {"sft": sft["sha256"]})
    average.reset_calibration()
    score = maybe_compile(model, config.compile)
    experience = Experience(config, encoding, device, autocast, SCORE_ROWS)
    eos = encoding.eot_token

    n_params = sum(p.numel() for p in model.parameters())
    print(f"train_rm: {n_params:,} parameters on {describe(device, autocast, config.recompute)}, tokenizer "
          f"{encoding.name} ({encoding.n_vocab:,} ids)")
    with progress(f"reading {config.data}"):
        split, prompts = load_data(config, encoding, block_size)
    if config.data == "atlas":
        train_rows, heldout = (atlas_comparisons(experience, policy, split) for split in ("train", "heldout"))
        report = [f"the SFT policy answered {len(train_rows):,} questions {config.candidates or CANDIDATES} times each"]
    else:
        train_rows, heldout, report = split.train, split.heldout[:EVAL_ROWS], split.report
    n_pairs = sum(len(row.pairs) for row in train_rows)
    require(train_rows, "every question got the same answer each time, so there is nothing to compare: the SFT "
            "policy has collapsed, train it again")
    row_lens = [len(row.prompt) + sum(map(len, row.responses)) for row in train_rows]
    micro = micro_batch_size(config.batch_size, config.micro_batch_size,
                             activations(model.config, max(row_lens), config.recompute),
                             budget=spare_memory(device, model) or CPU_BUDGET)
    print_report(config, report, f"; {n_pairs:,} pairs to train on, evaluation reads "
                 f"{sum(len(row.pairs) for row in heldout):,} held-out pairs of {len(heldout)} prompts; {micro} "
                 "comparisons per forward pass")

    order = BatchOrder(row_lens, config.batch_size, config.seed, window=20)
    metrics, row = Metrics(config, "rm", start), {}
    for iteration in range(start + 1, config.max_iters + 1):
        batch = [train_rows[i] for i in order.order(iteration - 1)]
        n_batch, loss, accuracy = sum(len(row.pairs) for row in batch), 0.0, 0.0
        rows = distributed.shard(batch)
        for i in range(0, len(rows), micro):
            *texts, chosen, rejected = collated(rows[i:i + micro], eos, device)
            with autocast():
                scores = score(*texts)
            part, stats = bradley_terry_loss(scores[chosen], scores[rejected])
            pair_fraction = len(chosen) / n_batch
            (part * pair_fraction).backward()
            loss += part.detach().double() * pair_fraction
            accuracy += stats["accuracy"].double() * pair_fraction
        loss, accuracy = distributed.all_reduce_sum(loss, accuracy)
        lr, grad_norm = optimizer.step(iteration, loss)
        update_average(average, model, iteration)

        last = iteration == config.max_iters
        heldout_stats = {}
        if heldout and (last or iteration % config.log_interval == 0):
            margins = margins_of(average, heldout, micro, eos, device, autocast)
            part, stats = bradley_terry_loss(margins, torch.zeros_like(margins))
            heldout_stats = {"heldout_loss": part.item(), "heldout_accuracy": stats["accuracy"].item()}
        if last:
            calibrate(experience, average, policy, prompts)
        row = metrics.write(iteration, {"loss": loss, "accuracy": accuracy, **heldout_stats, "lr": lr,
                                        "grad_norm": grad_norm, "skipped_steps": optimizer.skipped})
        run.end(iteration)

    if heldout:
        print_calibration(row, margins)
    if config.data == "atlas":
        row["best_loss"] = labeller_entropy(heldout, encoding)
        facts = [Comparison(encode_prompt(encoding, prompt),
                            [encode_response(encoding, answer) for answer in answers], [(0, 1)])
                 for prompt, *answers in atlas.country_pairs("heldout")]
        row["knows_country"] = (margins_of(average, facts, micro, eos, device, autocast) > 0).float().mean().item()
        print(f"the best loss any model could reach is the labeller's own noise, {row['best_loss']:.4f}; the right "
              f"country scores above a wrong one on {row['knows_country']:.1%} of the held-out questions")
    print(f"train_rm: wrote {run.path}")
    return row


if __name__ == "__main__":
    run_script(train, Config, __doc__, DataError)
