"""A world small enough for a test: three stages of one layer on forty pairs or on atlas, and what a test looks at."""

import dataclasses
import json
import runpy
import sys
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Optional

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from experiments import rungs
from paths import ROOT
from support.flags import Flags
from support.optimizer import Optimizer

STAGES = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
SIZES = dict(n_layer=1, n_head=2, n_embd=32, block_size=64)
TINY = {"sft": dict(max_iters=4, batch_size=12, lr=3e-3, **SIZES),
        "rm": dict(max_iters=4, batch_size=6, lr=3e-3, max_new_tokens=8),
        "ppo": dict(max_iters=3, batch_size=12, minibatches=2, epochs=2, lr=3e-3, max_new_tokens=8)}
ONE_STEP = {"minibatches": None, "epochs": 1}  # for the objectives that may use a rollout once
CLOCKS = {"seconds", "sec_rollout", "sec_score", "sec_update", "tokens_per_s"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(offset=0):
    words = ["red", "blue", "green", "white", "black", "pink", "grey", "brown"]
    return [{"prompt": f"{words[i % 8]} or {words[(i + 1 + i // 8) % 8]}{offset + i}?",
             "chosen": " " + words[i % 8],
             "rejected": " no" * (1 + i % 3)} for i in range(40)]


def settings(stage, folder, **flags):
    """Config of a tiny run on the CPU in `folder`, with the data and tokenizer that `folder` was made for."""
    folder, module = Path(folder), module_of(stage, flags)
    world = {} if (folder / "atlas").exists() else {"data": str(folder / "pairs.jsonl"), "tokenizer": "bytes"}
    world |= {"candidates": 3} if stage == "rm" and not world else {}
    return module.Config(**{"out_dir": str(folder), "device": "cpu"} | world | TINY[stage] | flags)


def module_of(stage, flags):
    """The train module of a stage; experiments/rungs.py for PPO with an --objective."""
    return rungs if "objective" in flags else STAGES[stage]


def run(stage, folder, **flags):
    return module_of(stage, flags).train(settings(stage, folder, **flags))


def metrics(folder, stage, *drop):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKS.union(drop)} for row in rows
            if row["stage"] == stage and "iter" in row]


def weights(folder, stage, *more):
    saved = torch.load(Path(folder) / f"{stage}.pt", weights_only=True)
    return {name: saved[name] for name in ("model", "critic", "weights", *more) if name in saved}


def reward_file(folder, body):
    """Writes a file with a function f(prompts, responses) that returns `body`; the value for --reward."""
    (folder / "reward.py").write_text(f"def f(prompts, responses):\n    return {body}\n")
    return f"{folder / 'reward.py'}:f"


class Spy:
    """Replaces a function of train_ppo by itself, and keeps the arguments and result of each call."""

    def __init__(self, monkeypatch, name, module=train_ppo):
        self.calls, real = [], getattr(module, name)

        def spy(*args, **kwargs):
            result = real(*args, **kwargs)
            self.calls.append((args, result))
            return result
        monkeypatch.setattr(module, name, spy)


def command(script, *argv):
    """Runs the file as `python train_x.py --flags` would, in this process. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            return exit.code
    return 0


def tiny_flags(stage, folder, **flags):
    config = dataclasses.asdict(settings(stage, folder, **flags))
    default = dataclasses.asdict(module_of(stage, flags).Config())
    return [f"--{name}={value}" for name, value in config.items() if value != default[name]]


def shrink(monkeypatch):
    """Gives the earlier stages, which run with their own defaults, defaults that suit a test. The classes stay what
    they are, because their source is read for the domains of the flags."""
    for stage in ("sft", "rm"):
        config = STAGES[stage].Config
        tiny = {name: value for name, value in TINY[stage].items() if name not in SIZES}
        monkeypatch.setattr(config, "__init__", partialmethod(config.__init__, **tiny))


@dataclass
class Config(Flags):
    """Flags of every kind, for the tests of what all stages share."""
    # test flags
    lr: float = 0.1            # [0, inf) a number
    kl_coef: float = 0.05      # a name of two words
    width: Optional[int] = 4   # may be none
    rate: Optional[float] = None  # 5% of something
    reward: str = "rm"         # a file and a function


def make_optimizer(**flags):
    params = [torch.nn.Parameter(torch.arange(3.0)), torch.nn.Parameter(torch.ones(2))]
    return Optimizer(params, Config(lr=0.1, **flags)), params


def take_step(optimizer, params, iteration=1, poison=None, loss=0.5):
    for p in params:
        p.grad = torch.full_like(p, 0.3)
    if poison is not None:
        params[-1].grad[-1] = poison  # one number in the last tensor; clipping would spread it to all of them
    return optimizer.step(iteration, loss)
