"""
Runs on a pretend GPU (tests/pretend_cuda.py): nothing mixes devices, and the host waits for the device a known number
of times. They need g++, and no GPU.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from paths import ROOT

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(not GXX, reason="there is no g++")
# Two epochs of two minibatches are four optimizer steps; 8 tokens are sampled one by one.
PPO = {"max_iters": 3, "batch_size": 8, "minibatches": 2, "epochs": 2}


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """Path of the compiled tests/pretend_guard.cpp."""
    path = tmp_path_factory.mktemp("guard") / "guard.so"
    libraries = [f"{flag}{folder}" for folder in library_paths() for flag in ("-L", "-Wl,-rpath,")]
    subprocess.run([GXX, "-O0", "-shared", "-fPIC", "-std=c++20", *(f"-I{folder}" for folder in include_paths()),
                    str(ROOT / "tests" / "pretend_guard.cpp"), "-o", str(path), *libraries, "-lc10", "-ltorch_cpu"],
                   check=True)
    return path


@pytest.fixture
def pretend(guard, tmp_path):
    """pretend(*runs): for each of runs (stage, folder, flags) the waits {place: n} of its second iteration. Raises
    what they raise, as RuntimeError."""
    def start(*runs, more=()):
        (tmp_path / "runs.json").write_text(json.dumps([(stage, str(folder), flags) for stage, folder, flags in runs]))
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "pretend_cuda.py"), str(guard),
                               str(tmp_path / "runs.json"), *more], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return [iterations[1] for iterations in json.loads(done.stdout)]
    return start


def test_no_stage_mixes_devices_or_waits_in_each_pass(pretend, world):
    """An iteration of PPO waits once for each sampled token, at most once for each optimizer step and twice for each
    epoch, and 17 times for the rest: with 4 x 4 that is 41 besides the tokens."""
    llama = world("sft")
    sft, rm, _, _, *ppo = pretend(
        ("sft", world("sft"), {"max_iters": 3, "micro_batch_size": 3}),
        ("rm", world("rm"), {"max_iters": 3, "micro_batch_size": 3}),
        ("sft", llama, {"arch": "llama"}), ("rm", llama, {}), ("ppo", llama, PPO | {"micro_batch_size": 4}),
        ("ppo", world("ppo"), PPO | {"micro_batch_size": 4}),
        ("ppo", world("ppo"), PPO | {"micro_batch_size": 1, "recompute": True}),
        ("ppo", world("ppo"), PPO | {"micro_batch_size": 2, "critic": "shared", "kl_in": "loss", "ent_coef": 0.1}),
        ("ppo", world("ppo"), PPO | {"advantage": "group", "samples_per_prompt": 2, "temperature": 0.7,
                                     "dtype": "float32"}))
    batches = sum(n for place, n in sft.items() if "train_sft.py" in place)  # four tensors in each of four passes
    assert batches == 16 and sum(sft.values()) - batches == 2
    batches = sum(n for place, n in rm.items() if "train_rm.py" in place)
    assert batches == 14 and sum(rm.values()) - batches == 2  # seven tensors in each of two passes
    for waits in ppo:
        assert sum(waits.values()) <= 8 + 4 + 2 * 2 + 17, waits


def test_a_tensor_that_stayed_on_the_cpu_is_found(pretend, world):
    with pytest.raises(RuntimeError, match=r"add.Tensor of tensors on a GPU and one of shape \(257,\) on the CPU"):
        pretend(("ppo", world("ppo"), PPO), more=["plant"])
