"""
Tests of common.py: flags from the command line, the guarded optimizer step. What a train script makes of them is in
test_train.py, checkpoints are in test_checkpoint.py, metrics in test_metrics.py.
"""

import dataclasses
import math
import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import common
import sample
import train_ppo
import train_rm
import train_sft
from checkpoint import digest
from common import UserError
from tiny import Config, make_optimizer, take_step

CONFIGS = [train_sft.Config, train_rm.Config, train_ppo.Config, sample.Config]


# ----------------------------------------------------------------------------------------------------------
# flags

@pytest.mark.parametrize("argv, name, value", [
    ("--lr=1e-5", "lr", 1e-5), ("--lr 1e-5", "lr", 1e-5), ("--kl-coef=2", "kl_coef", 2.0),
    ("--kl_coef=2", "kl_coef", 2.0), ("--kl-coef 2", "kl_coef", 2.0), ("--compile", "compile", True),
    ("--compile=true", "compile", True), ("--compile=false", "compile", False),
    ("--compile no", "compile", False),
    ("--compile --lr=1", "compile", True), ("--skip-bad=1", "skip_bad", True),
    ("--width=none", "width", None),
    ("--width=None", "width", None), ("--width=7", "width", 7), ("--rate=none", "rate", None),
    ("--data=a.jsonl --data=b.jsonl", "data", "b.jsonl"), ("", "lr", 0.1)])
def test_every_spelling_of_a_flag(argv, name, value):
    parsed = getattr(common.parse_flags(Config, argv.split()), name)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("argv, says", [
    ("--lrr=1", "unknown flag --lrr, did you mean --lr?"), ("--kl-coeff 1", "did you mean --kl_coef?"),
    # argparse alone would take it for an abbreviation
    ("--micro_batch=4", "did you mean --micro_batch_size?"),
    ("--zzzzzz", "unknown flag --zzzzzz"), ("stray", "unknown flag stray"),
    ("--lr=fast", "'fast' is not a number"), ("--width=2.5", "'2.5' is not a whole number"),
    ("--compile=maybe", "'maybe' is neither true nor false"), ("--lr", "expected one argument"),
    ("--lr=none", "'none' is not a number")])
def test_a_flag_that_does_not_parse_exits_2_with_a_sentence(argv, says, capsys):
    with pytest.raises(SystemExit) as exit:
        common.parse_flags(Config, argv.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and says in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("config_class", [Config, *CONFIGS], ids=lambda c: c.__module__)
def test_every_flag_has_a_comment_and_help_lists_it_with_its_default(config_class, capsys):
    comments = common.flag_help(config_class)
    with pytest.raises(SystemExit) as exit:
        common.parse_flags(config_class, ["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(config_class):
        assert len(comments[field.name]) > 5
        assert f"--{field.name}" in listed
        default = "" if field.default is None else f" [{field.default}]"
        assert " ".join(comments[field.name].split()) + default in listed


def test_a_scripts_own_comment_replaces_the_shared_one():
    assert common.flag_help(train_sft.Config)["lr"] != common.flag_help(common.Flags)["lr"]


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__module__)
def test_every_numeric_flag_has_a_domain(config_class):
    """NaN, infinity and whatever lies below the domain are refused."""
    numeric = [name for name, kind in get_type_hints(config_class).items()
               if {int, float} & {kind, *get_args(kind)}]
    assert len(numeric) >= 4
    for name in numeric:
        for value in (math.nan, math.inf, -math.inf, -1):
            with pytest.raises(UserError, match=rf"--{name}={value} must lie in "):
                common.check_domains(dataclasses.replace(config_class(), **{name: value}))
        common.check_domains(config_class())  # the defaults are allowed


@pytest.mark.parametrize("name, bad, good", [
    ("lam", 1.0001, 1.0), ("gamma", 1.0001, 0.0), ("clip", 1.0, 0.999), ("clip", 0.0, 1e-3),
    ("temperature", 0.0, 1e-3),
    ("grad_clip", 0.0, 1e-3), ("batch_size", 0, 1), ("kl_target", 0.0, 1e-3), ("block_size", 1, 2),
    ("device", "gpu", "cuda"), ("dtype", "float16", "bfloat16"), ("kl_in", "both", "loss"),
    ("critic", "own", "separate")])
def test_the_ends_of_a_domain(name, bad, good):
    common.check_domains(train_ppo.Config(**{name: good}))
    with pytest.raises(UserError, match=f"--{name}={bad} must "):
        common.check_domains(train_ppo.Config(**{name: bad}))


def test_resume_and_overwrite_together_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        Config(max_iters=1, batch_size=1, resume=True, overwrite=True).check()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_asked_for_and_missing_is_said_in_a_sentence(package, monkeypatch):
    Config(max_iters=1, batch_size=1).check()  # nobody needs it who did not ask
    monkeypatch.setitem(sys.modules, package, None)
    Config(max_iters=1, batch_size=1).check()
    with pytest.raises(UserError, match=f"--{package} needs the package {package}: pip install {package}, or leave"):
        Config(max_iters=1, batch_size=1, **{package: True}).check()


@pytest.mark.parametrize("data, folder",
                         [("atlas", "out/atlas"), ("a/pairs.jsonl", "out/pairs"), ("hh.jsonl.gz", "out/hh")])
def test_out_dir_is_named_after_the_data(data, folder):
    assert Config(data=data).folder == Path(folder)
    assert Config(data=data, out_dir="x").folder == Path("x")


class DataProblem(ValueError):
    pass


@pytest.mark.parametrize("error", [UserError("bad value"), DataProblem("bad value")])
def test_main_turns_the_named_errors_into_a_sentence_and_code_2(error, monkeypatch, capsys):
    def train(config):
        raise error
    monkeypatch.setattr("sys.argv", ["dir/train_x.py"])
    with pytest.raises(SystemExit) as exit:
        common.main(train, Config, "doc", DataProblem)
    assert exit.value.code == 2 and capsys.readouterr().err == "train_x.py: bad value\n"


@pytest.mark.parametrize("error", [OSError("could not write a.pt (disk full)"), FloatingPointError("bad")])
def test_main_turns_a_full_disk_and_bad_numbers_into_a_sentence_and_code_1(error, monkeypatch, capsys):
    def train(config):
        raise error
    monkeypatch.setattr("sys.argv", ["train_x.py"])
    with pytest.raises(SystemExit) as exit:
        common.main(train, Config, "doc", DataProblem)
    assert exit.value.code == 1 and capsys.readouterr().err == f"train_x.py: {error}\n"


def test_main_lets_a_bug_show_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_x.py"])
    with pytest.raises(ZeroDivisionError):
        common.main(lambda config: 1 / 0, Config, "doc", DataProblem)


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size"])
def test_sizes_come_from_the_flag_the_default_or_the_checkpoint(name):
    """No flag may contradict the checkpoint."""
    model = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 9}
    defaults = common.resolve_sizes(Config())
    assert common.resolve_sizes(Config(**{name: 8})) == defaults | {name: 8}
    assert common.resolve_sizes(Config(**{name: model[name]}), model) == {k: model[k] for k in defaults}
    with pytest.raises(UserError, match=f"--{name}=8 does not match the checkpoint's {name}={model[name]}"):
        common.resolve_sizes(Config(**{name: 8}), model)


# ----------------------------------------------------------------------------------------------------------
# device, compile, generators

def test_cuda_that_is_not_there_is_refused_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device(Config()).type == "cpu"
    with pytest.raises(UserError, match="--device=cuda"):
        common.pick_device(Config(device="cuda"))


@pytest.mark.parametrize("dtype, expected",
                         [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_on_a_cpu_decides_what_a_matrix_product_computes_in(dtype, expected):
    device, autocast = common.setup(Config(device="cpu", dtype=dtype))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert ("bfloat16" in common.describe(device, autocast)) == (expected == torch.bfloat16)


def test_bfloat16_is_refused_on_a_gpu_without_it_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    with pytest.raises(UserError, match="--dtype=bfloat16 was asked for, but this GPU has none"):
        common.setup(Config(dtype="bfloat16"))
    asked = []
    monkeypatch.setattr(torch, "autocast",
                        lambda device, dtype, enabled: asked.append((device, enabled)) or nullcontext())
    device, autocast = common.setup(Config(dtype="auto"))
    with autocast():
        pass
    assert device.type == "cuda" and asked == [("cuda", False)]


FAULTS = """
import resource, torch, common, train_ppo
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.ones(10 ** 7)
    before = faults()
    for _ in range(10):
        torch.ones(10 ** 7)
    print(faults() - before)
    common.setup(train_ppo.Config(device="cpu"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide for themselves")
def test_on_a_cpu_freed_memory_is_used_again():
    """Fetched from the kernel each time, every page would cost a fault."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
                          cwd=Path(common.__file__).parent)
    before, after = map(int, done.stdout.split())
    assert after < before / 5  # of ten tensors' pages those of one at most, where the heap has holes


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])  # musl and macOS, no C library, Windows
def test_without_glibc_memory_is_left_to_the_allocator_that_there_is(error, monkeypatch):
    def no_mallopt(name):
        raise error
    monkeypatch.setattr(common.ctypes, "CDLL", no_mallopt)
    common.setup(Config(device="cpu"))


@pytest.mark.parametrize("error", [
    torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None),
    torch._dynamo.exc.TorchDynamoException("no compiler")])
def test_compile_without_a_compiler_says_so_once_and_runs_eagerly(error, monkeypatch, capsys):
    attempts = []

    def broken(*args):
        attempts.append(args)
        raise error
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    double = common.maybe_compile(lambda x: 2 * x, True)
    assert [double(3), double(4)] == [6, 8]
    assert len(attempts) == 1 and capsys.readouterr().out.count("torch.compile failed") == 1


def test_compile_says_how_long_the_first_calls_took(monkeypatch, capsys):
    """The first call without gradients and the first with them compile a graph each."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)

    def double(x, by=2):
        return by * x
    for function, name in ((double, "double"), (partial(double, by=2), "double"), (torch.nn.Identity(), "Identity")):
        compiled = common.maybe_compile(function, True)
        for grad in (False, True, False, True):
            with torch.set_grad_enabled(grad):
                assert compiled(3) == function(3)
        lines = capsys.readouterr().out.splitlines()
        assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == [
            f"torch.compile: {name} took N s at first", f"torch.compile: {name} with gradients took N s at first"]


def test_compile_hides_no_error_of_the_function_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with pytest.raises(ZeroDivisionError):
        common.maybe_compile(lambda x: x / 0, True)(1)
    assert common.maybe_compile(len, False) is len


def test_generators_differ_by_purpose_and_spare_the_global_one():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=common.generator("cpu", *seeds)).tolist()
             for seeds in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a1"), (0, "a", 11),
                           (0, "a", 1, 1))]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert torch.rand(4, generator=common.generator("cpu", 0, "a", 1)).tolist() == draws[0]
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------
# the optimizer step

def state_bytes(optimizer, params):
    return digest({"params": [p.detach() for p in params], "adamw": optimizer.adamw.state_dict()})


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_no_weight_and_no_moment(poison, capsys):
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    before = state_bytes(optimizer, params)
    _, norm = take_step(optimizer, params, 2, poison)
    assert not math.isfinite(norm) and state_bytes(optimizer, params) == before
    assert optimizer.skipped == 1 and "iteration 2" in capsys.readouterr().out
    assert all(p.grad is None or not p.grad.any() for p in params)
    take_step(optimizer, params, 3)
    assert state_bytes(optimizer, params) != before  # a bad step poisons nothing that comes after


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_non_finite_loss_is_no_step_either(loss, capsys):
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    before = state_bytes(optimizer, params)
    _, norm = take_step(optimizer, params, 2, loss=loss)
    assert math.isfinite(norm) and state_bytes(optimizer, params) == before and optimizer.skipped == 1
    assert f"iteration 2: loss {float(loss)}, gradient norm 0.67" in capsys.readouterr().out


def test_the_run_stops_after_max_bad_steps_in_a_row():
    """A good step resets the count."""
    optimizer, params = make_optimizer(max_bad_steps=3)
    for i, poison in enumerate([math.nan, math.nan, None, math.nan, math.nan]):
        take_step(optimizer, params, i, poison)
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        take_step(optimizer, params, 5, math.nan)
    assert optimizer.skipped == 5


def test_gradients_are_clipped_to_their_joint_norm():
    """The reported norm is the one before clipping. AdamW's first step does not depend on the gradient's size, but its
    first moment does."""
    optimizer, params = make_optimizer(grad_clip=0.1)
    lr, norm = take_step(optimizer, params)
    assert lr == 0.1 and norm == pytest.approx(0.3 * math.sqrt(5), rel=1e-6)
    moments = torch.cat([state["exp_avg"] for state in optimizer.adamw.state.values()]) / (1 - 0.9)
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm


def test_weights_without_a_gradient_do_not_decay():
    optimizer, params = make_optimizer()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(1, 0.5)
    assert params[0].tolist() == [0, 1, 2]


def test_frozen_parameters_are_not_the_optimizers():
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    assert len(common.Optimizer([torch.nn.Parameter(torch.ones(1)), frozen], Config(lr=0.1)).params) == 1


def test_optimizer_state_survives_a_checkpoint_bit_for_bit():
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    take_step(optimizer, params, 2, math.nan)
    other, twins = make_optimizer()
    other.load(optimizer.state())
    for p, twin in zip(params, twins):
        twin.data.copy_(p)
    take_step(optimizer, params, 3), take_step(other, twins, 3)
    assert state_bytes(optimizer, params) == state_bytes(other, twins)
    assert (other.skipped, other.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize("decay, iteration, lr", [
    (None, 10**6, 0.1), (4, 1, 0.1), (4, 2, 0.075), (4, 4, 0.025), (4, 5, 0.0), (4, 9, 0.0)])
def test_learning_rate_decays_over_its_own_horizon(decay, iteration, lr):
    config = Config(lr=0.1, lr_decay_iters=decay, max_iters=2)
    assert common.learning_rate(config, iteration) == pytest.approx(lr, rel=1e-15)


def test_the_decayed_rate_is_the_one_that_is_used():
    optimizer, params = make_optimizer(lr_decay_iters=2)
    assert take_step(optimizer, params, 2)[0] == 0.05
    # AdamW's first step is lr times the sign of the gradient
    assert params[1].tolist() == pytest.approx([0.95, 0.95])


@pytest.mark.parametrize("rows, given, logits, size", [
    (12, None, 1, 12), (12, 3, 10**12, 3), (12, None, 256e6 / 4 / 5, 4), (12, None, 10**12, 1),
    (7, None, 256e6 / 4 / 6, 1)])
def test_micro_batch_is_the_flag_or_the_largest_divisor_in_budget(rows, given, logits, size):
    assert common.micro_batch_size(rows, given, logits) == size


@pytest.mark.parametrize("rows, given, logits, size", [(128, None, 1, 32), (90, None, 1, 30), (24, None, 1, 24),
                                                        (512, None, 1, 128), (512, None, 1e6, 64), (128, 64, 1, 64)])
def test_many_rows_sorted_by_length_make_four_passes(rows, given, logits, size):
    assert common.micro_batch_size(rows, given, logits, by_length=True) == size


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_arithmetic():
    with pytest.raises(UserError,
                       match=r"--micro_batch_size=5 must divide the 12 rows of a step: 12 = 2 x 5 \+ 2"):
        common.micro_batch_size(12, 5, 1)
