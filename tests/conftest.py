"""The fixtures that several test files use. This file also puts tests/ on sys.path, for tiny.py and the like."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import train_sft
from model import GPT, GPTConfig
from paths import ROOT
from pretrained import LLAMA, save_pretrained
from tiny import SIZES, pairs, reward_file, run, write_jsonl
from tokenizer import get_tokenizer

torch.set_num_threads(1)  # with more, sums are taken in another order and the last bits differ
# A process that a shell starts with & ignores Ctrl-C, and so do its children. Some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Folders with finished sft.pt and rm.pt, on pairs, on atlas, and on pairs from a pretrained Llama; tests write
    into copies of them."""
    folders = {}
    for name in ("pairs", "atlas", "llama"):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        (folder / "atlas").touch() if name == "atlas" else write_jsonl(folder / "pairs.jsonl", pairs())
        if name == "llama":
            torch.manual_seed(0)
            kind = LLAMA.kind | dict(vocab_size=260, n_kv_head=1, head_dim=12, mlp_dim=40, tied=False)
            save_pretrained(GPT(GPTConfig(**kind, **SIZES)), get_tokenizer("bytes"), folder / "llama")
        start = {"init_from": str(folder / "llama")} if name == "llama" else {}
        run("sft", folder, max_iters=30 if name == "atlas" else 60, **start)
        run("rm", folder)
    return folders


@pytest.fixture
def world(worlds, tmp_path):
    """Copies a world into a fresh folder, with the checkpoints of the stages before `stage`."""
    count = iter(range(10**6))

    def make(stage, name="pairs"):
        folder = tmp_path / f"world{next(count)}"
        ahead = {"sft": ["sft.pt", "rm.pt"], "rm": ["rm.pt"], "ppo": []}[stage] + ["metrics.jsonl"]
        shutil.copytree(worlds[name], folder, ignore=shutil.ignore_patterns(*ahead))
        return folder
    return make


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    """Path of a tiny SFT checkpoint of the built-in task, whose answers look like answers."""
    folder = tmp_path_factory.mktemp("sft")
    train_sft.train(train_sft.Config(out_dir=str(folder), device="cpu", max_iters=150, batch_size=64, lr=5e-3,
                                     **SIZES | {"block_size": 128}))
    return str(folder / "sft.pt")


@pytest.fixture
def reward_e(tmp_path):
    """The value for --reward of a function that counts the letter e."""
    return reward_file(tmp_path, "[float(response.count('e')) for response in responses]")


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(out_dir, what it printed) of `python train_ppo.py` as a user starts it, in a process of its own. It takes
    minutes, so all slow tests that need a trained run share this one; whoever would write into it takes a copy."""
    folder = tmp_path_factory.mktemp("default")
    process = subprocess.run([sys.executable, str(ROOT / "train_ppo.py"), f"--out_dir={folder}", "--device=cpu"],
                             cwd=folder, capture_output=True, text=True, env=os.environ)
    assert process.returncode == 0, process.stderr[-2000:]
    return folder, process.stdout
