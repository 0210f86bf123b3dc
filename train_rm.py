"""
Stage 1: the reward model. Trains a scalar score on comparisons, so that the preferred answer scores higher.

    python train_rm.py                                  the built-in task: needs out/atlas/sft.pt (python train_sft.py)
    python train_rm.py --data=pairs.jsonl               human comparisons from a file
    python train_rm.py --resume --max_iters=1000        go on from out_dir/rm.pt

On atlas this is section II of the derivation step by step: sample prompts, sample several candidates for each from
the SFT policy, have the (simulated) labeller compare them, fit the Bradley-Terry model to the comparisons. On a file
the comparisons are already there. Either way the finished model is calibrated on samples of the SFT policy, and
there is no PPO, no margin loss and no score centring here.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Optional

import numpy as np
import torch

import atlas
import common
import data
import distributed
from checkpoint import load_checkpoint, open_run
from metrics import Metrics
from model import GPT, GPTConfig
from reward_model import RewardModel, bradley_terry_loss, calibration_table
from rollout import generate

EVAL_ROWS = 512         # one evaluation reads at most this many held-out comparisons
CANDIDATES = 24         # atlas: answers per prompt; with 12, the model remembers the labeller's noise instead
SAMPLE_ROWS = 1024      # answers sampled at a time, which bounds the memory of the KV cache
CALIBRATION_ROWS = 512  # samples of the SFT policy that set the zero and the unit of the score


@dataclass
class Config(common.Flags):
    init_from: Optional[str] = None  # the SFT checkpoint whose trunk it starts from; default: out_dir/sft.pt
    max_iters: int = 600             # optimizer steps; stop before held-out loss turns up
    batch_size: int = 16             # comparisons per step; on atlas each holds --candidates answers
    lr: float = 7e-4                 # from the small SFT model; 1e-5 to 5e-5 from GPT-2 weights
    log_interval: int = 50           # iterations between lines on the screen, each with a look at the held-out rows
    save_interval: int = 500         # iterations between checkpoints; the last iteration always saves
    candidates: Optional[int] = None  # atlas: answers sampled per prompt and compared pair by pair; default 24
    max_new_tokens: int = 16         # longest sampled answer, in tokens
    temperature: float = 1.0         # of the sampled answers; the same as in PPO, which the scores are calibrated for

    DOMAINS: ClassVar[dict] = common.Flags.DOMAINS | {"candidates": "[2, inf)", "max_new_tokens": "[1, inf)",
                                                      "temperature": "(0, inf)"}


def sample(policy, prompts, config, eos, device, autocast, purpose):
    """One response for each of prompts (lists of ids): lists of ids, ending with EOS unless they were cut. Each process
    samples its share, and all get all of them, so that they agree on what is compared."""
    rng, responses = common.generator(device, config.seed, distributed.own(purpose)), []
    mine = distributed.share(prompts)
    with autocast(), distributed.whole_on_each(policy):
        for i in range(0, len(mine), SAMPLE_ROWS):
            rows, prompt_lens = (x.to(device) for x in data.collate_prompts(mine[i:i + SAMPLE_ROWS], eos))
            rollout = generate(policy, rows, prompt_lens, config.max_new_tokens, eos=eos,
                               temperature=config.temperature, generator=rng)
            starts, ends = rollout.prompt_lens.tolist(), (rollout.prompt_lens + rollout.response_lens).tolist()
            responses += [row[start:end] for row, start, end in zip(rollout.tokens.tolist(), starts, ends)]
    return distributed.gather(responses)


def atlas_comparisons(policy, encoding, config, device, autocast, split):
    """Steps 1 to 3 of section II: prompts, candidates from the SFT policy, the labeller's word on each pair of them."""
    rng, K = np.random.default_rng([config.seed, split == "heldout"]), config.candidates or CANDIDATES
    questions = atlas.prompts(split)
    prompts = [data.encode_prompt(encoding, question) for question in questions]
    answers = sample(policy, [prompt for prompt in prompts for _ in range(K)], config, encoding.eot_token, device,
                     autocast, f"candidates {split}")
    comparisons = []
    for i, (question, prompt) in enumerate(zip(questions, prompts)):
        # Answers that were sampled more than once share a row, and so a forward pass, but each sample is compared with
        # all that differ from it: what the policy often says is judged often.
        sampled = [tuple(answer) for answer in answers[i * K:(i + 1) * K]]
        distinct = list(dict.fromkeys(sampled))
        row_of = {answer: row for row, answer in enumerate(distinct)}
        texts = [data.decode(encoding, answer) for answer in distinct]
        pairs = [(row_of[a], row_of[b]) for a, b in itertools.combinations(sampled, 2) if a != b]
        pairs = [(a, b) if atlas.label(question, texts[a], texts[b], rng) else (b, a) for a, b in pairs]
        if pairs:
            comparisons.append(data.Comparison(prompt, list(map(list, distinct)), pairs))
    return comparisons


def labeller_entropy(comparisons, encoding):
    """Mean entropy in nats of the labeller's word on these pairs: no reward model can expect a lower loss."""
    probabilities = []
    for row in comparisons:
        question, texts = data.decode(encoding, row.prompt), [data.decode(encoding, answer) for answer in row.responses]
        probabilities += [atlas.preference(question, texts[a], texts[b]) for a, b in row.pairs]
    return float(atlas.label_entropy(np.array(probabilities)).mean())


@torch.no_grad()
def margins_of(model, comparisons, micro, eos, device, autocast):
    """Score differences chosen - rejected (M,) of all pairs, on the CPU."""
    margins = [torch.empty(0)]
    for i in range(0, len(comparisons), micro):
        tokens, lens, chosen, rejected = (x.to(device) for x in data.collate_comparisons(comparisons[i:i + micro], eos))
        with autocast():
            scores = model(tokens, lens)
        margins.append((scores[chosen] - scores[rejected]).float().cpu())
    return torch.cat(margins)


def train(config):
    """Runs the stage, writes out_dir/rm.pt and returns its final metrics."""
    config.check()
    common.require(config.data == "atlas" or config.candidates is None, "--candidates is for --data=atlas; a file "
                   "holds the answers that were compared already")
    with open_run(config, "rm") as run:
        return loop(config, run)


def loop(config, run):
    """What train does once out_dir is its own; `run` restores and saves its checkpoint."""
    device, autocast = common.setup(config)
    sft = load_checkpoint(config.init_from or config.folder / "sft.pt", "sft")
    encoding, tokenizer = data.run_tokenizer(config.tokenizer, config.data, sft["tokenizer"])
    common.resolve_sizes(config, sft["model_config"])
    policy = GPT(GPTConfig(**sft["model_config"] | {"dropout": 0.0})).eval()
    policy.load_state_dict(sft["model"], strict=True)
    model = RewardModel.from_policy(policy)
    average = copy.deepcopy(model).requires_grad_(False)  # what is evaluated, calibrated and saved as the reward model
    distributed.place(device, config, policy, model, average)
    optimizer = common.Optimizer(model.parameters(), config)
    start, _ = run.begin(optimizer, {"model": average, "weights": model}, tokenizer, {"sft": sft["sha256"]})
    average.reset_calibration()
    score = common.maybe_compile(model, config.compile)
    eos, block_size = encoding.eot_token, policy.config.block_size

    n_params = sum(p.numel() for p in model.parameters())
    print(f"train_rm: {n_params:,} parameters on {common.describe(device, autocast, config.recompute)}, tokenizer "
          f"{encoding.name} ({encoding.n_vocab:,} ids)")
    if config.data == "atlas":
        train_rows, heldout = (atlas_comparisons(policy, encoding, config, device, autocast, split)
                               for split in ("train", "heldout"))
        report = [f"the SFT policy answered {len(train_rows):,} questions {config.candidates or CANDIDATES} times each"]
    else:
        split = data.load_comparisons(config.data, encoding, block_size, config.skip_bad)
        train_rows, heldout, report = split.train, split.heldout[:EVAL_ROWS], split.report
    prompts = data.load_prompts(config.data, encoding, block_size, config.max_new_tokens, config.skip_bad).train
    n_pairs = sum(len(row.pairs) for row in train_rows)
    common.require(train_rows, "every question got the same answer each time, so there is nothing to compare: the SFT "
                               "policy has collapsed, train it anew")
    # About 16 activations per token, layer and channel live until the backward pass.
    longest = max(sum(len(row.prompt) + len(answer) for answer in row.responses) for row in train_rows)
    micro = common.micro_batch_size(config.batch_size, config.micro_batch_size,
                                    16 * longest * model.config.n_layer * model.config.n_embd)
    print(f"{config.data}: {'; '.join(report)}; {n_pairs:,} pairs to train on, evaluation reads "
          f"{sum(len(row.pairs) for row in heldout):,} held-out pairs of {len(heldout)} prompts; {micro} comparisons "
          "per forward pass")

    order = data.BatchOrder([len(row.prompt) + max(map(len, row.responses)) for row in train_rows], config.batch_size,
                            config.seed, window=20)
    metrics, row = Metrics(config, "rm", start), {}
    for iteration in range(start + 1, config.max_iters + 1):
        batch = [train_rows[i] for i in order.order(iteration - 1)]
        n_batch, loss, accuracy = sum(len(row.pairs) for row in batch), 0.0, 0.0
        rows = distributed.share(batch)
        for i in range(0, len(rows), micro):
            tokens, lens, chosen, rejected = (x.to(device) for x in data.collate_comparisons(rows[i:i + micro], eos))
            with autocast():
                scores = score(tokens, lens)
            part, stats = bradley_terry_loss(scores[chosen], scores[rejected])
            share = len(chosen) / n_batch
            (part * share).backward()
            loss, accuracy = loss + part.item() * share, accuracy + stats["accuracy"].item() * share
        loss, accuracy = distributed.total(loss, accuracy)
        lr, grad_norm = optimizer.step(iteration, loss)
        common.follow(average, model, iteration)

        last = iteration == config.max_iters
        heldout_stats = {}
        if heldout and (last or iteration % config.log_interval == 0):
            margins = margins_of(average, heldout, micro, eos, device, autocast)
            part, stats = bradley_terry_loss(margins, torch.zeros_like(margins))
            heldout_stats = {"heldout_loss": part.item(), "heldout_accuracy": stats["accuracy"].item()}
        if last:
            # The unit of the score becomes the spread of the SFT policy's own answers.
            some = data.BatchOrder([1] * len(prompts), CALIBRATION_ROWS, config.seed).order(0)
            answers = sample(policy, [prompts[i] for i in some], config, eos, device, autocast, "calibration")
            rows = [prompts[i] + answer for i, answer in zip(some, answers)]
            tokens, lens = (x.to(device) for x in data.pad(rows, eos))
            with torch.no_grad(), autocast():
                raw = torch.cat([average(*part) for part in zip(tokens.split(64), lens.split(64))])
            average.calibrate(raw)
        row = metrics.write(iteration, {"loss": loss, "accuracy": accuracy, **heldout_stats, "lr": lr,
                                        "grad_norm": grad_norm, "skipped_steps": optimizer.skipped},
                            show={"loss": "7.4f", "accuracy": ".3f", "heldout_loss": "7.4f", "heldout_accuracy": ".3f"})
        if run.due(iteration):
            run.save(iteration)

    if heldout:
        print(f"held-out accuracy {row['heldout_accuracy']:.3f}, loss {row['heldout_loss']:.4f} (no opinion: "
              f"{math.log(2):.4f})")
        print("when the model is this sure of a preference, the labeller agrees so often:")
        for low, high, count, predicted, observed in calibration_table(margins):
            print(f"  sure {low:.1f} to {high:.1f}: {count:>6,} pairs, mean {predicted:.3f}, agreed {observed:.3f}")
    if config.data == "atlas":
        row["best_loss"] = labeller_entropy(heldout, encoding)
        facts = [data.Comparison(data.encode_prompt(encoding, prompt),
                                 [data.encode_response(encoding, answer) for answer in answers], [(0, 1)])
                 for prompt, *answers in atlas.country_pairs("heldout")]
        row["knows_country"] = (margins_of(average, facts, micro, eos, device, autocast) > 0).float().mean().item()
        print(f"the best loss any model could reach is the labeller's own noise, {row['best_loss']:.4f}; the right "
              f"country scores above a wrong one on {row['knows_country']:.1%} of the held-out questions")
    print(f"calibrated on {CALIBRATION_ROWS} answers of the SFT policy: raw mean {raw.mean():.3f} and std "
          f"{raw.std(unbiased=False):.3f} become 0 and 1")
    print(f"train_rm: wrote {run.path}")
    return row


if __name__ == "__main__":
    common.main(train, Config, __doc__, data.DataError)
