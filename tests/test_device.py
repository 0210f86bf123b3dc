"""Tests of support/device.py: device, precision, compilation, rows per pass, generators."""

import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import support.device as device_module
from model import GPTConfig
from paths import ROOT
from pretrained import LLAMA
from reward_model import RewardModel
from rollout import score_response
from support.device import (Clock, activations, describe, generator, hold_frozen, maybe_compile, micro_batch_size,
                            pick_device, rows_and_chunk, setup, spare_memory)
from support.flags import UserError
from tensors import V, make_gpt, random_ids
from tiny import Config


def test_cuda_that_is_not_there_is_refused_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Config()).type == "cpu"
    with pytest.raises(UserError, match="--device=cuda"):
        pick_device(Config(device="cuda"))


@pytest.mark.parametrize("dtype, expected",
                         [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_on_a_cpu_decides_what_a_matrix_product_computes_in(dtype, expected):
    device, autocast = setup(Config(device="cpu", dtype=dtype))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert ("bfloat16" in describe(device, autocast)) == (expected == torch.bfloat16)


@pytest.mark.parametrize("capabilities, lacks", [
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": False}, True),
    ({"avx2": True, "avx512_bf16": True, "amx_bf16": False, "avx_ne_convert": False}, False),
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": True, "avx_ne_convert": False}, False),
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": True}, False),
    ({"neon": True, "bf16": False, "sve_bf16": False}, True), ({"neon": True, "bf16": True}, False),
    ({"architecture": "ppc64le"}, False)])
def test_bfloat16_on_a_cpu_without_it_is_noted_once(capabilities, lacks, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    device_module.note_slow_bfloat16.cache_clear()
    setup(Config(device="cpu"))
    assert capsys.readouterr().out == ""
    for _ in range(2):  # train_ppo.py may run two earlier stages
        setup(Config(device="cpu", dtype="bfloat16"))
    assert capsys.readouterr().out.count("note: this CPU has no instructions for bfloat16") == lacks
    device_module.note_slow_bfloat16.cache_clear()


def test_bfloat16_is_refused_on_a_gpu_without_it_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    with pytest.raises(UserError, match="--dtype=bfloat16 was asked for, but this GPU does not support it"):
        setup(Config(dtype="bfloat16"))
    asked = []
    monkeypatch.setattr(torch, "autocast",
                        lambda device, dtype, enabled: asked.append((device, enabled)) or nullcontext())
    device, autocast = setup(Config(dtype="auto"))
    with autocast():
        pass
    assert device.type == "cuda" and asked == [("cuda", False)]


@pytest.mark.parametrize("dtype, precision", [("float32", "highest"), ("bfloat16", "high"), ("auto", "high")])
def test_float32_asked_for_by_name_is_no_tf32(dtype, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    setup(Config(dtype=dtype))
    assert asked == [precision]


FAULTS = """
import resource, torch, train_ppo
from support import device
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.ones(10 ** 7)
    before = faults()
    for _ in range(10):
        torch.ones(10 ** 7)
    print(faults() - before)
    device.setup(train_ppo.Config(device="cpu"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide for themselves")
def test_on_a_cpu_freed_memory_is_used_again():
    """Fetched from the kernel each time, every page would cost a fault."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    before, after = map(int, done.stdout.split())
    assert after < before / 5  # of ten tensors' pages those of one at most, where the heap has holes


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])  # musl and macOS, no C library, Windows
def test_without_glibc_memory_is_left_to_the_allocator_that_there_is(error, monkeypatch):
    def no_mallopt(name):
        raise error
    monkeypatch.setattr(device_module.ctypes, "CDLL", no_mallopt)
    setup(Config(device="cpu"))


@pytest.mark.parametrize("error", [
    torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None),
    torch._dynamo.exc.TorchDynamoException("no compiler")])
def test_compile_without_a_compiler_says_so_once_and_runs_eagerly(error, monkeypatch, capsys):
    attempts = []

    def broken(*args):
        attempts.append(args)
        raise error
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    double = maybe_compile(lambda x: 2 * x, True)
    assert [double(3), double(4)] == [6, 8]
    assert len(attempts) == 1 and capsys.readouterr().out.count("torch.compile failed") == 1


def test_compile_says_how_long_the_first_calls_took(monkeypatch, capsys):
    """The first call without gradients and the first with them compile a graph each."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)

    def double(x, by=2):
        return by * x
    for function, name in ((double, "double"), (partial(double, by=2), "double"), (torch.nn.Identity(), "Identity")):
        compiled = maybe_compile(function, True)
        for grad in (False, True, False, True):
            with torch.set_grad_enabled(grad):
                assert compiled(3) == function(3)
        lines = capsys.readouterr().out.splitlines()
        assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == [
            f"torch.compile: {name} took N s at first", f"torch.compile: {name} with gradients took N s at first"]


def test_compile_hides_no_error_of_the_function_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with pytest.raises(ZeroDivisionError):
        maybe_compile(lambda x: x / 0, True)(1)
    assert maybe_compile(len, False) is len


def test_generators_differ_by_purpose_and_spare_the_global_one():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=generator("cpu", *seeds)).tolist()
             for seeds in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a1"), (0, "a", 11),
                           (0, "a", 1, 1))]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert torch.rand(4, generator=generator("cpu", 0, "a", 1)).tolist() == draws[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lap_is_the_time_since_the_lap_before(monkeypatch):
    times = iter([10.0, 12.0, 15.0, 15.5])
    monkeypatch.setattr(device_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = Clock(torch.device("cpu"))
    assert [clock.lap("a"), clock.lap(), clock.lap("b")] == [2.0, 3.0, 0.5]
    assert clock.seconds == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize("rows, given, logits, size", [
    (12, None, 1, 12), (12, 3, 10**12, 3), (12, None, 256e6 / 4 / 5, 4), (12, None, 10**12, 1),
    (7, None, 256e6 / 4 / 6, 1)])
def test_micro_batch_is_the_flag_or_the_largest_divisor_in_budget(rows, given, logits, size):
    assert micro_batch_size(rows, given, logits) == size


@pytest.mark.parametrize("rows, given, logits, size", [(128, None, 1, 32), (90, None, 1, 30), (24, None, 1, 24),
                                                        (512, None, 1, 128), (512, None, 1e6, 64), (128, 64, 1, 64)])
def test_many_rows_sorted_by_length_make_four_passes(rows, given, logits, size):
    assert micro_batch_size(rows, given, logits, by_length=True) == size


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_arithmetic():
    with pytest.raises(UserError,
                       match=r"--micro_batch_size=5 must divide the 12 rows of a step: 12 = 2 x 5 \+ 2"):
        micro_batch_size(12, 5, 1)


GPT2, QWEN = (GPTConfig(1024, V, L, 12, C) for L, C, V in ((12, 768, 50257), (28, 1536, 151936)))


@pytest.mark.parametrize("config, R, spare, expected", [
    (GPT2, 128, None, (8, None)), (GPT2, 128, 30e9, (32, None)), (GPT2, 128, 3e9, (8, None)),
    (GPT2, 128, 0.6e9, (4, 248)),     # not even four rows' logits fit beside their activations
    (QWEN, 128, None, (2, None)), (QWEN, 512, None, (1, 140)), (QWEN, 128, 30e9, (32, None)),
    (QWEN, 512, 30e9, (8, None)), (QWEN, 512, 8e9, (4, 1096)), (QWEN, 2048, 30e9, (4, 1096))])
def test_rows_per_pass_follow_the_memory_that_is_there(config, R, spare, expected):
    """Of 128 rows. On a GPU a pass keeps a quarter of them at most, on a CPU the logits that the memory of a laptop
    holds; with a large vocabulary the head reads chunks before there is one row left."""
    found = rows_and_chunk(128, None, (R, config.vocab_size), activations(config, 64 + R), spare, by_length=True)
    assert found == expected


def test_the_entropy_takes_rows_and_a_given_micro_batch_stays():
    costs = (128, 50257), activations(GPT2, 192)
    assert rows_and_chunk(128, None, *costs, 6e9, True) == (16, None)
    assert [rows_and_chunk(128, None, *costs, 3.5e9, True, copies)[0] for copies in (3, 5)] == [16, 8]
    assert rows_and_chunk(128, 64, *costs, 6e9, True) == (64, None)
    assert rows_and_chunk(128, 1, *costs, None, True) == (1, None)
    assert rows_and_chunk(128, 64, *costs, 0.6e9, True) == (64, 248)


def test_recomputed_activations_are_those_of_one_layer():
    assert activations(GPT2, 10) == 16 * 12 * 10 * 768 and activations(GPT2, 10, True) == (12 + 16) * 10 * 768


def test_spare_memory_is_half_of_what_training_leaves(monkeypatch):
    """A trained weight still gets its gradient and two moments, 12 bytes."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    trained, frozen = torch.nn.Linear(10, 10), torch.nn.Linear(50, 50).requires_grad_(False)
    assert spare_memory(torch.device("cuda"), trained, frozen) == (10_000 - 12 * 110) / 2
    assert spare_memory(torch.device("cpu"), trained) is None


@pytest.mark.parametrize("kind", [{}, LLAMA.kind | dict(n_kv_head=1, mlp_dim=48), {"tied": False}],
                         ids=["gpt2", "llama", "untied"])
def test_frozen_matrices_are_held_in_bfloat16_with_the_same_results(kind):
    """Two bytes for a weight in place of four, and not a bit else: policy, value and reward."""
    device, autocast = torch.device("cpu"), partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    plain, held = (make_gpt(torch.float32, **kind).requires_grad_(False) for _ in range(2))
    rewards = [RewardModel(plain.config).requires_grad_(False) for _ in range(2)]
    rewards[1].load_state_dict(rewards[0].state_dict())
    hold_frozen(autocast, device, held, rewards[1], None)
    tokens, lens = random_ids(V, 3, 9), torch.tensor([2, 4, 3])
    with autocast():
        for ours, theirs in zip(score_response(held, tokens, lens, 4), score_response(plain, tokens, lens, 4)):
            assert torch.equal(ours, theirs)
        assert torch.equal(rewards[1](tokens, lens), rewards[0](tokens, lens))
    assert held.unembedding.dtype == torch.bfloat16 and held.trunk.wte.weight.dtype == torch.float32
    plain, held = (sum(p.nbytes for name, p in model.trunk.named_parameters() if p.dim() == 2 and name[:2] != "wp"
                       and name[:3] != "wte") for model in (plain, held))
    assert plain == 2 * held > 0


def test_models_without_autocast_stay_as_they_are():
    model = make_gpt(torch.float32)
    hold_frozen(partial(torch.autocast, "cpu", enabled=False), torch.device("cpu"), model)
    assert model.config.tied and {p.dtype for p in model.parameters()} == {torch.float32}
