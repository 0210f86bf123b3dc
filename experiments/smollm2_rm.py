"""
Human comparisons judged by a reward model on real weights: does pretraining beat chance, both length rules and the bag
of words?

    python -m experiments.smollm2_rm --model=SmolLM2-135M-Instruct --hh=hh.jsonl.gz --llmbar=llmbar.jsonl.gz
                                     --hhh=hhh.jsonl.gz

The folds, the rules, the bag of words and the intervals are those of experiments/human_comparisons.py. Two judges are
new. `linear head`: the pretrained trunk is frozen, and a Bradley-Terry model is fitted to its hidden state at the last
token. `upper layers`: it starts from that head, and the layers above --lower are trained as well. The lower layers stay
frozen, so they run once per text, and their output is kept in out_dir. HH has too much text to train on cheaply, so it
gets the linear head alone.

Prompts are chat messages in the model's own rendering. The model reads the last PROMPT_TOKENS of a prompt and the
first RESPONSE_TOKENS of an answer; the rules and the bag of words read everything. Results already in out_dir are not
computed again, so delete out_dir after changing a flag. Drawing needs matplotlib.
"""

import copy
import json
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

import train_rm
from data import BatchOrder, pad
from experiments import human_comparisons
from experiments.human_comparisons import OVER, draw, fold_of, print_table, read_pairs, results_of
from experiments.ladder import run_jobs, write_results
from experiments.sentiment import fit_linear
from model import ScalarHead, rope
from pretrained import config_of, from_pretrained, local_path
from reward_model import bradley_terry_loss
from support.checkpoint import atomic_write
from support.device import keep_freed_memory
from support.flags import Flags, check_domains, require, require_one_process, run_script
from support.metrics import Metrics
from support.optimizer import Optimizer, update_average
from support.stages import read_start
from tokenizer import DataError, encode_response, render_messages, run_tokenizer
from tools.plot import import_pyplot

PROMPT_TOKENS, RESPONSE_TOKENS = 96, 128
CHUNK, ROWS = 32, 8  # pairs in a file of features, and texts in a forward pass
BATCH, MICRO = 16, 4  # pairs in an optimizer step, and in a pass
L2 = 1e-3, 1e-2, 1e-1, 1.0, 10.0  # the head's possible penalties; a fold's training pairs choose one
WHOLE = ("LLMBar and MT-Bench", "HHH")  # the files that layers are trained on


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"        # a folder of pretrained weights, or a public name
    hh: str = "data/hh_harmless_base_test.jsonl.gz"           # HH transcripts
    llmbar: str = "data/llmbar_mtbench_human_pairs.jsonl.gz"  # the same
    hhh: str = "data/hhh_alignment_pairs.jsonl.gz"            # the same
    out_dir: str = "out/smollm2_rm"  # a folder per file, which holds the features and a folder per seed and fold
    seeds: int = 4                   # [1, inf) seeds 0, 1, ... of the folds
    seeds_layers: int = 1            # [1, inf) how many of these seeds train layers, too
    folds: int = 3                   # [2, inf) parts of a file; a model trained on the others judges each
    lower: int = 20                  # [1, inf) layers that stay frozen
    lr: float = 2e-5                 # (0, inf) learning rate of the upper layers
    max_epochs: float = 1.0          # (0, inf) passes of the upper layers over the training pairs, 16 at a time
    workers: Optional[int] = None    # [1, inf) runs at a time, each on one thread; default: one per core
    save: str = "docs/smollm2_rm"    # path of the figure and its numbers, without .png or .json


# ---------------------------------------------------------------------------------------------------------------------
# texts and their features

def messages_of(prompt):
    """A prompt in HH's format, "\\n\\nHuman: ...\\n\\nAssistant:", as messages. Raises DataError for any other."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", prompt)
    speakers, texts = parts[::2], [text.strip() for text in parts[1::2]]
    if before.strip() or speakers[-1:] != ["Assistant"] or texts[-1]:
        raise DataError(f"a prompt begins {prompt[:40]!r} and ends {prompt[-40:]!r}: give HH transcripts, which begin "
                        'with "\\n\\nHuman:" and end with "\\n\\nAssistant:"')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": text} for speaker, text in zip(speakers[:-1], texts)]


def ids_of(row, encoding, chat):
    """The ids of the chosen and of the rejected text as the model reads them: cut prompt, cut answer, EOS."""
    prompt = render_messages(encoding, messages_of(row.prompt), chat)[-PROMPT_TOKENS:]
    answers = [encode_response(encoding, text.strip()) for text in row.responses]
    return [prompt + answer[:-1][:RESPONSE_TOKENS] + answer[-1:] for answer in answers]


@torch.no_grad()
def write_features(folder, path, model, lower, whole):
    """Writes folder/<n>.pt for every CHUNK pairs of a file, unless it exists. `last` (pairs, 2, C) is the hidden state
    of the trunk at the last token of the chosen and the rejected text. With `whole`, `hidden` has two (T, C) for each
    pair: the output of the first `lower` layers at all positions."""
    rows, files = read_pairs(path), sorted(folder.glob("*.pt"))
    chunks = [rows[i:i + CHUNK] for i in range(0, len(rows), CHUNK)]
    if len(files) == len(chunks):
        return
    encoding, tokenizer = run_tokenizer(None, None, read_start(Flags(init_from=model))["tokenizer"])
    trunk, kept = from_pretrained(model).trunk.eval(), []
    keep_freed_memory()
    trunk.blocks[lower - 1].register_forward_hook(lambda block, inputs, output: kept.append(output))
    began = time.time()
    for n, chunk in enumerate(chunks[len(files):], len(files)):
        texts = [ids for row in chunk for ids in ids_of(row, encoding, tokenizer["chat"])]
        last, hidden = torch.empty(len(texts), trunk.config.n_embd), [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for some in (order[i:i + ROWS] for i in range(0, len(order), ROWS)):
            tokens, lens = pad([texts[i] for i in some], encoding.eot_token)
            last[some] = trunk(tokens)[torch.arange(len(some)), lens - 1]
            for i, length, states in zip(some, lens, kept.pop()):
                hidden[i] = states[:length].clone()
        pairs = list(zip(hidden[::2], hidden[1::2])) if whole else None
        with atomic_write(folder / f"{n:04}.pt") as file:
            torch.save({"last": last.view(len(chunk), 2, -1), "hidden": pairs}, file)
        left = (time.time() - began) / (n + 1 - len(files)) * (len(chunks) - n - 1)
        print(f"features {n + 1}/{len(chunks)}  eta {left / 60:.0f} minutes", flush=True)


def read_features(folder, name):
    """`last` (N, 2, C) or `hidden` [N pairs of (T, C)] of all pairs, in the order of the file."""
    parts = [torch.load(file, mmap=True, weights_only=True)[name] for file in sorted(folder.glob("*.pt"))]
    return torch.cat(parts) if name == "last" else [pair for part in parts for pair in part]


# ---------------------------------------------------------------------------------------------------------------------
# the judges

def fit_head(differences, keys, seed):
    """The weights (C,) of a Bradley-Terry model on differences (N, C) of two texts' features. The penalty, in units of
    the features' spread, is the one in L2 with the lowest loss over three folds by `keys`. The pairs to judge are not
    among these N."""
    spread = differences.square().mean(0).sqrt().clamp(min=1e-6)
    scaled = differences / spread
    folds = torch.tensor(fold_of(keys, 3, seed))

    def weights(rows, l2):
        return fit_linear(rows.to_sparse(), torch.ones(len(rows)), l2)

    losses = {}
    for l2 in L2:
        margins = torch.cat([scaled[folds == k] @ weights(scaled[folds != k], l2) for k in range(3)])
        losses[l2] = bradley_terry_loss(margins, torch.zeros_like(margins))[0].item()
    return weights(scaled, min(losses, key=losses.get)) / spread


def head_of(last, keys, folds, fold, seed):
    """fit_head on the pairs of all folds but one. last: (N, 2, C)."""
    train = np.flatnonzero(folds != fold)
    return fit_head(last[train, 0] - last[train, 1], [keys[i] for i in train], seed)


def head_margins(last, keys, n_folds, seed):
    """Out-of-fold margins (N,) of the linear head."""
    folds, margins = fold_of(keys, n_folds, seed), np.zeros(len(keys))
    for fold in range(n_folds):
        held = last[folds == fold]
        margins[folds == fold] = ((held[:, 0] - held[:, 1]) @ head_of(last, keys, folds, fold, seed)).numpy()
    return margins


class UpperLayers(nn.Module):
    """A reward model above its first `lower` layers: forward(hidden (N, T, C), their output, and lens (N,)) -> scores
    (N,). Its modules are the trunk's own."""

    def __init__(self, trunk, lower):
        super().__init__()
        self.config, self.blocks, self.ln_f = trunk.config, trunk.blocks[lower:], trunk.ln_f
        self.head = ScalarHead(trunk.config)

    def forward(self, hidden, lens):
        turns = self.config.position == "rope"
        rotation = rope(self.config, torch.arange(hidden.size(1))) if turns else None
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return self.head(self.ln_f(hidden[torch.arange(len(hidden)), lens - 1]))

    def margins(self, pairs):
        """Score differences (M,) of M pairs of hidden states (T, C)."""
        texts = [hidden for pair in pairs for hidden in pair]
        scores = self(pad_sequence(texts, batch_first=True), torch.tensor([len(hidden) for hidden in texts]))
        return scores[::2] - scores[1::2]


def train_layers(folder, path, features, seed, fold, config):
    """Trains the upper layers on the other folds and writes folder/margins.json, {row: score of chosen - score of
    rejected}, unless it exists. The weights that judge are an average over the last steps, as in train_rm.py."""
    if (folder / "margins.json").exists():
        return
    keys = [row.prompt for row in read_pairs(path)]
    folds = fold_of(keys, config.folds, seed)
    pairs, train = read_features(features, "hidden"), np.flatnonzero(folds != fold)
    layers = UpperLayers(from_pretrained(config.model).trunk, config.lower)
    keep_freed_memory()
    with torch.no_grad():
        layers.head.linear.weight.copy_(head_of(read_features(features, "last"), keys, folds, fold, seed))
    average = copy.deepcopy(layers).requires_grad_(False)
    flags = train_rm.Config(out_dir=str(folder), seed=seed, device="cpu", batch_size=BATCH, lr=config.lr,
                            max_iters=max(1, round(config.max_epochs * len(train) / BATCH)), log_interval=1)
    optimizer, metrics = Optimizer(layers.parameters(), flags), Metrics(flags, "rm")
    lengths = np.array([max(map(len, pair)) for pair in pairs])
    order = BatchOrder(lengths[train], BATCH, seed, window=20)
    for iteration in range(1, flags.max_iters + 1):
        batch, loss, accuracy = train[order.order(iteration - 1)], 0.0, 0.0
        for rows in (batch[i:i + MICRO] for i in range(0, BATCH, MICRO)):
            margins = layers.margins([pairs[i] for i in rows])
            part, stats = bradley_terry_loss(margins, torch.zeros_like(margins))
            (part * len(rows) / BATCH).backward()
            loss, accuracy = loss + part.item() * len(rows) / BATCH, accuracy + stats["accuracy"] * len(rows) / BATCH
        lr, grad_norm = optimizer.step(iteration, torch.tensor(loss))
        update_average(average, layers, iteration)
        metrics.write(iteration, {"loss": loss, "accuracy": accuracy, "lr": lr, "grad_norm": grad_norm})
    held = sorted(np.flatnonzero(folds == fold), key=lambda i: lengths[i])
    judged = torch.cat([average.margins([pairs[i] for i in held[n:n + MICRO]]) for n in range(0, len(held), MICRO)])
    with atomic_write(folder / "margins.json") as file:
        file.write(json.dumps(dict(zip(map(int, held), judged.tolist()))).encode())


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def judge(path, folder, name, config):
    """results_of one file, with both judges if layers are trained on it."""
    rows = read_pairs(path)
    keys, last = [row.prompt for row in rows], read_features(folder / "features", "last")
    learned = {"linear head": [head_margins(last, keys, config.folds, seed) for seed in range(config.seeds)]}
    if name in WHOLE:
        learned["upper layers"] = [human_comparisons.pooled(folder, f"layers{seed}", config.folds)
                                   for seed in range(config.seeds_layers)]
    return results_of(rows, learned, config)


def main(config):
    check_domains(config)
    require_one_process("experiments/smollm2_rm.py")
    import_pyplot()  # reports a missing matplotlib before an hour of training, not after
    require(config.seeds_layers <= config.seeds, "--seeds_layers must be at most --seeds")
    n_layer = config_of(local_path(config.model)).n_layer
    require(config.lower < n_layer, f"--lower={config.lower} leaves nothing to train: {config.model} has {n_layer} "
            "layers")
    workers, began, root = config.workers or os.cpu_count(), time.time(), Path(config.out_dir)
    files = {"LLMBar and MT-Bench": config.llmbar, "HHH": config.hhh, "HH harmless": config.hh}
    for path in files.values():
        for row in read_pairs(path):
            messages_of(row.prompt)  # reports a wrong file before that hour, too
    run_jobs([(partial(write_features, path=path, model=config.model, lower=config.lower, whole=name in WHOLE),
               root / name / "features", "features") for name, path in files.items()], workers)
    jobs = [(partial(train_layers, path=files[name], features=root / name / "features", seed=seed, fold=fold,
                     config=config), root / name / f"layers{seed}{fold}", "rm")
            for seed in range(config.seeds_layers) for name in WHOLE for fold in range(config.folds)]
    run_jobs(jobs, workers)
    results = {name: judge(path, root / name, name, config) for name, path in files.items()}
    print_table(results, OVER | {"over_words": "bag of words"})
    write_results(config, jobs[0][1], began, draw, results, {"results": results})
    return results


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError)
