"""
Tests of checkpoint.py: files that survive damage, full disks and kill -9, runs that are resumed to the last bit or
refused with the reason, one run per out_dir, signals. Where a process has to die, it is a child of its own.
"""

import fcntl
import io
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from paths import ROOT
from support import checkpoint, stages
from support.checkpoint import Damaged, digest, load_checkpoint, save_checkpoint
from support.flags import UserError
from support.metrics import Metrics
from support.optimizer import Optimizer
from tiny import (SIZES, Config, make_optimizer, metrics, pairs, run, shrink, take_step, tiny_flags, weights,
                  write_jsonl)


# ----------------------------------------------------------------------------------------------------------
# checkpoints

def tensors():
    return {"f32": torch.tensor([[1.0, -0.0], [math.nan, 3.0]]), "bf16": torch.ones(3, dtype=torch.bfloat16),
            "long": torch.arange(4), "bool": torch.tensor([True, False]), "scalar": torch.tensor(2.0),
            "empty": torch.empty(0)}


def contents(**changes):
    optimizer, params = make_optimizer()
    take_step(optimizer, params)
    return {"stage": "sft", "iter": 3, "finished": True, "none": None, "list": [1, 23, "a"],
            "model": tensors(),
            "optimizer": optimizer.state(), "rng": checkpoint.rng_state(), "flags": {"lr": 0.1}} | changes


def test_digest_notices_any_flipped_byte_of_any_tensor():
    original, seen = digest(tensors()), set()
    for name, tensor in tensors().items():
        for i in range(tensor.numel() * tensor.element_size()):
            if tensor.dtype == torch.bool and i:
                continue
            changed = tensors()
            changed[name].reshape(-1).view(torch.uint8)[i] ^= 1
            seen.add(digest(changed))
    assert original not in seen and len(seen) == 16 + 6 + 32 + 1 + 4


@pytest.mark.parametrize("a, b", [
    ({"x": 1}, {"x": 2}), ({"x": 1}, {"y": 1}), ({"x": 1}, {"x": 1.0}), ({"x": "1"}, {"x": 1}),
    ({"x": True}, {"x": False}),
    ({"x": [1, 23]}, {"x": [12, 3]}), ({"x": [1, 2]}, {"x": [2, 1]}), ({"x": None}, {"x": 0}),
    ({"x": 0.1}, {"x": 0.1 + 2e-17}),
    ({"x": {"y": 1}}, {"x": {"y": 2}}), ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}),
    ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int32)}),
    ({"x": torch.zeros(1)}, {"x": -torch.zeros(1)})])
def test_digest_notices_any_other_value(a, b):
    assert digest(a) != digest(b)


def test_digest_does_not_depend_on_the_order_of_keys_or_on_strides():
    a = {"x": {"p": 1, "q": torch.arange(6).view(2, 3)}, "y": 2}
    b = {"y": 2, "x": {"q": torch.arange(6).view(2, 3).t().contiguous().t(), "p": 1}}
    assert digest(a) == digest(b)


def test_a_checkpoint_comes_back_bit_for_bit_with_its_types(tmp_path):
    saved = contents()
    save_checkpoint(tmp_path / "sft.pt", saved)
    loaded = load_checkpoint(tmp_path / "sft.pt", "rm", "sft")
    assert loaded.pop("sha256") == digest(saved) == digest(loaded)
    assert loaded.keys() == saved.keys() and loaded["list"] == [1, 23, "a"] and loaded["finished"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["sft.pt"]


def corrupt(path, how):
    whole = path.read_bytes()
    if how == "flipped byte":
        # torch.save stores tensors uncompressed, so their bytes can be found, and torch loads one silently
        marker = torch.full((64,), 1.25).numpy().tobytes()
        at = whole.index(marker) + 17
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    elif how == "text":
        path.write_text("not a checkpoint\n")
    else:
        sizes = {"empty": 0, "10 bytes": 10, "half": len(whole) // 2, "all but one": len(whole) - 1}
        path.write_bytes(whole[:sizes[how]])


@pytest.mark.parametrize("how", ["empty", "10 bytes", "half", "all but one", "text", "flipped byte"])
def test_a_damaged_checkpoint_is_refused_by_name(how, tmp_path):
    path = tmp_path / "sft.pt"
    save_checkpoint(path, contents(marker=torch.full((64,), 1.25)))
    load_checkpoint(path, "sft")
    corrupt(path, how)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .*corrupt"):
        load_checkpoint(path, "sft")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_malicious_checkpoint_executes_nothing(how, tmp_path):
    path, victim = tmp_path / "sft.pt", tmp_path / "executed"
    evil = {"stage": "sft", "sha256": "", "model": Touch(victim)}
    path.write_bytes(pickle.dumps(evil, protocol=2)) if how == "pickle" else torch.save(evil, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(path, "sft")
    assert not victim.exists()
    pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert victim.exists()  # the file was a threat indeed


@pytest.mark.filterwarnings("ignore:Using a non-tuple")  # from indexing the tensor by a name
@pytest.mark.parametrize("content", [{"model": torch.ones(1)}, torch.ones(1), [1, 2]],
                         ids=["no sha256", "tensor", "list"])
def test_a_torch_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "x.pt", "sft")


def test_a_checkpoint_of_another_stage_or_a_missing_one_is_refused(tmp_path):
    save_checkpoint(tmp_path / "rm.pt", contents(stage="rm"))
    with pytest.raises(UserError,
                       match=r"rm\.pt was written by train_rm\.py, not by train_sft\.py or train_ppo\.py"):
        load_checkpoint(tmp_path / "rm.pt", "sft", "ppo")
    with pytest.raises(UserError, match=r"gone\.pt is not there: train it first with train_sft\.py"):
        load_checkpoint(tmp_path / "gone.pt", "sft")


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("write failed"), KeyboardInterrupt()],
                         ids=["disk full", "torch", "ctrl-c"])
def test_a_save_that_fails_half_way_leaves_the_old_file_whole_and_no_other(error, tmp_path, monkeypatch):
    path = tmp_path / "sft.pt"
    save_checkpoint(path, contents(iter=1))

    def half_a_save(checkpoint, file):
        file.write(b"half a check")
        raise error
    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(type(error)) as raised:
        save_checkpoint(path, contents(iter=2))
    if isinstance(error, OSError):
        assert str(path) in str(raised.value) and "No space left" in str(raised.value)
    assert load_checkpoint(path, "sft")["iter"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["sft.pt"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_old_ones_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    save_checkpoint(tmp_path / "sft.pt", contents())
    assert calls == ["fsync", "replace"]


# ----------------------------------------------------------------------------------------------------------
# the same run, or a refusal

@dataclass
class Shape:
    n_layer: int = 1
    vocab_size: int = 9


class Model(torch.nn.Linear):
    def __init__(self, **shape):
        super().__init__(2, 1)
        self.config = Shape(**shape)


TOKENIZER = {"name": "t", "source": "t", "n_vocab": 9, "sha256": "ab", "eos": [8], "special_tokens": {"e": 8},
             "chat": "plain"}


@contextmanager
def opened(folder, tokenizer=TOKENIZER, sources=(), shape=(), **flags):
    """(run, model, where it starts, the checkpoint's fields) of a stage sft in `folder`."""
    config = Config(**{"max_iters": 9, "batch_size": 1, "out_dir": str(folder)} | flags)
    with checkpoint.open_run(config, "sft") as run:
        model = Model(**dict(shape))
        optimizer = Optimizer(model.parameters(), config)
        yield run, model, *run.begin(optimizer, {"model": model}, tokenizer, sources)


def save_run(folder, *iterations, **flags):
    """Saves at these iterations, with weights equal to the iteration."""
    with opened(folder, **flags) as (run, model, _, _):
        for iteration in iterations:
            torch.nn.init.constant_(model.weight, iteration)
            run.save(iteration, kl_coef=0.5)


def stands_at(path):
    saved = load_checkpoint(path, "sft")
    assert (saved["model"]["weight"] == saved["iter"]).all()
    return saved["iter"]


@pytest.mark.parametrize("changes", [
    {"lr": 0.2}, {"seed": 1}, {"batch_size": 2}, {"dtype": "bfloat16"}, {"kl_coef": 0.1, "lr": 0.2},
    {"lr_decay_iters": 3}, {"grad_clip": 2.0}, {"skip_bad": True}], ids=str)
def test_resume_refuses_a_changed_flag_by_name(changes, tmp_path):
    save_run(tmp_path, 3)
    with pytest.raises(UserError) as error, opened(tmp_path, resume=True, **changes):
        pass
    for name, value in changes.items():
        assert f"--{name} was {getattr(Config(batch_size=1), name)} and is {value}" in str(error.value)


def test_resume_takes_flags_that_no_number_depends_on(tmp_path):
    save_run(tmp_path, 3)
    shutil.copytree(tmp_path, tmp_path / "moved")
    harmless = {"max_iters": 19, "log_interval": 1, "save_interval": 1, "max_bad_steps": 9}
    with opened(tmp_path / "moved", resume=True, **harmless) as (_, model, start, saved):
        assert start == 3 and (model.weight == 3).all() and saved["kl_coef"] == 0.5


@pytest.mark.parametrize("change, says", [({"micro_batch_size": 1}, "--micro_batch_size was None and is 1"),
                                          ({"recompute": True}, "--recompute was False and is True"),
                                          ({"compile": True}, "--compile was False and is True"), ({}, "threads was")])
def test_resume_says_what_moves_the_last_bits_and_goes_on(change, says, tmp_path, monkeypatch, capsys):
    """Who ran out of memory must be able to go on with a smaller micro-batch."""
    save_run(tmp_path, 3)
    with opened(tmp_path, resume=True):
        assert "note:" not in capsys.readouterr().out
    if not change:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with opened(tmp_path, resume=True, **change) as (_, _, start, _):
        assert start == 3
    out = capsys.readouterr().out
    assert says in out and "the same run, but not to the last bit" in out


@pytest.mark.parametrize("change, says", [
    ({"shape": {"n_layer": 2}}, "n_layer was 1 and is 2"),
    ({"shape": {"n_layer": 2, "vocab_size": 7}}, "n_layer was 1 and is 2, vocab_size was 9 and is 7"),
    ({"tokenizer": TOKENIZER | {"n_vocab": 7, "eos": [6]}}, r"n_vocab was 9 and is 7, eos was \[8\] and is \[6\]"),
    ({"tokenizer": TOKENIZER | {"sha256": "cd"}}, "sha256 was ab and is cd")], ids=str)
def test_another_model_or_tokenizer_is_refused_field_by_field(change, says, tmp_path, monkeypatch):
    """The refusal comes before a tensor is copied."""
    save_run(tmp_path, 3)
    monkeypatch.setattr(Model, "load_state_dict", lambda *args, **kwargs: pytest.fail("copied"))
    with pytest.raises(UserError, match=rf"another model or tokenizer: {says}$"), \
            opened(tmp_path, resume=True, **change):
        pass


OLD_TOKENIZER = {name: TOKENIZER[name] for name in ("name", "source", "n_vocab", "sha256")} | {"eos": 8}


def test_a_tokenizer_of_before_chat_and_several_eos_is_the_same_one(tmp_path):
    """Checkpoints from before these fields can still be loaded and resumed; with another EOS they cannot."""
    with opened(tmp_path, tokenizer=OLD_TOKENIZER) as (run, _, _, _):
        run.save(3)
    assert load_checkpoint(tmp_path / "sft.pt", "sft")["tokenizer"]["eos"] == [8]
    with opened(tmp_path, resume=True) as (_, _, start, _):
        assert start == 3
    with pytest.raises(UserError, match=r"eos was \[8\] and is \[7\]"), \
            opened(tmp_path, resume=True, tokenizer=TOKENIZER | {"eos": [7]}):
        pass


@pytest.mark.parametrize("saved, resumes", [("clip", True), ("reinforce", False)])
def test_a_rung_of_the_ladder_is_not_resumed_as_another(saved, resumes, tmp_path):
    """Earlier checkpoints hold --objective, which is a flag of experiments.ladder now; `clip` is PPO itself."""
    with opened(tmp_path) as (run, _, _, _):
        run.fields["flags"] = run.fields["flags"] | {"objective": saved}
        run.save(3)
    with nullcontext() if resumes else pytest.raises(UserError, match="--objective was reinforce, which python -m exp"):
        with opened(tmp_path, resume=True) as (_, _, start, _):
            assert start == 3


def test_resume_goes_by_the_content_of_its_sources(tmp_path):
    """The data and the checkpoints that a run began with may move. Their content may not change."""
    first, moved, other = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    first.write_text("rows"), moved.write_text("rows"), other.write_text("other rows")
    out = tmp_path / "out"
    save_run(out, 3, data=str(first), sources={"rm": "1", "sft": "2"})
    with opened(out, resume=True, data=str(moved), sources={"rm": "1", "sft": "2"}) as (_, _, start, _):
        assert start == 3
    with pytest.raises(UserError, match="this run began with another sft and --data: put it back"), \
            opened(out, resume=True, data=str(other), sources={"rm": "1", "sft": "3"}):
        pass
    with pytest.raises(UserError, match="this run began with another --data"), \
            opened(out, resume=True, sources={"rm": "1", "sft": "2"}):
        pass


def test_resume_takes_sources_that_only_moved(tmp_path, capsys):
    """The SFT model and the reward function may move to another path. Another function is refused. Another text of
    the same function, which may have been mended, gets a note."""
    first, moved, other = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    first.write_text("rule"), moved.write_text("rule"), other.write_text("another rule")
    save_run(tmp_path / "rm", 3, init_from="here.pt", reward=f"{first}:f", sources={"sft": "2"})
    again = {"resume": True, "init_from": "there.pt", "sources": {"sft": "2"}}
    with opened(tmp_path / "rm", **again, reward=f"{moved}:f") as (_, _, start, _):
        assert start == 3
    assert "note: the file of --reward" not in capsys.readouterr().out
    with opened(tmp_path / "rm", **again, reward=f"{other}:f") as (_, _, start, _):
        assert start == 3 and "note: the file of --reward has changed since the checkpoint" in capsys.readouterr().out
    with pytest.raises(UserError, match="this run began with another reward: put it back"), \
            opened(tmp_path / "rm", **again, reward=f"{moved}:g"):
        pass
    save_run(tmp_path / "sft", 3, init_from="gpt2")
    with pytest.raises(UserError, match="--init_from was gpt2 and is None"), opened(tmp_path / "sft", resume=True):
        pass


def test_resume_restores_torchs_generator(tmp_path):
    torch.manual_seed(1)
    with opened(tmp_path) as (run, *_):
        run.save(3)
    expected = torch.rand(3)
    torch.manual_seed(99)
    with opened(tmp_path, resume=True):
        assert torch.equal(torch.rand(3), expected)


def test_a_process_saves_and_restores_the_generator_of_its_own_gpu_only(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", put_back.append)
    for name in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("the GPUs of others"))
    state = checkpoint.rng_state()
    checkpoint.set_rng_state(state)
    checkpoint.set_rng_state(state | {"cuda": None})  # of a run without a GPU
    assert put_back == [torch.tensor([7])]


def test_resume_of_a_run_that_has_nothing_left_to_do_names_max_iters(tmp_path):
    save_run(tmp_path, 3)
    with pytest.raises(UserError, match="is at iteration 3 already: raise --max_iters=3"), \
            opened(tmp_path, resume=True, max_iters=3):
        pass


# ----------------------------------------------------------------------------------------------------------
# the previous checkpoint

def test_the_checkpoint_before_is_kept_and_the_first_one_stands_throughout(tmp_path, monkeypatch):
    replace, link, seen = os.replace, os.link, []
    for name, real in (("replace", replace), ("link", link)):
        monkeypatch.setattr(os, name, lambda *args, real=real: (seen.append((tmp_path / "sft.pt").exists()),
                                                                real(*args)))
    save_run(tmp_path, 1, 2, 3)
    assert stands_at(tmp_path / "sft.pt") == 3 and stands_at(tmp_path / "sft.prev.pt") == 2
    assert seen == [False, True, True, True, True]  # the first replace, then twice link and replace
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "sft.prev.pt", "sft.pt"]


def test_a_file_system_without_links_keeps_it_as_a_copy(tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_links)
    save_run(tmp_path, 1, 2, 3)
    assert stands_at(tmp_path / "sft.pt") == 3 and stands_at(tmp_path / "sft.prev.pt") == 2


@pytest.mark.parametrize("how", ["empty", "half", "all but one", "text", "missing"])
def test_resume_falls_back_to_the_previous_checkpoint(how, tmp_path, capsys):
    """A note says so. The next save must not move the damaged file over the good one."""
    save_run(tmp_path, 1, 2, 3)
    path = tmp_path / "sft.pt"
    path.unlink() if how == "missing" else corrupt(path, how)
    with opened(tmp_path, resume=True) as (run, _, start, _):
        assert start == 2
        out = capsys.readouterr().out
        assert re.search(rf"note: {re.escape(str(path))} .*\. Going back to .*sft\.prev\.pt\n", out)
        run.modules["model"].weight.data.fill_(3)
        run.save(3)
    assert stands_at(path) == 3 and stands_at(tmp_path / "sft.prev.pt") == 2


def test_with_both_damaged_or_none_there_resume_is_refused(tmp_path):
    with pytest.raises(Damaged, match="sft.pt is not there"), opened(tmp_path, resume=True):
        pass
    save_run(tmp_path, 1, 2)
    corrupt(tmp_path / "sft.pt", "half"), corrupt(tmp_path / "sft.prev.pt", "empty")
    with pytest.raises(Damaged, match="sft.prev.pt cannot be read as a checkpoint"), opened(tmp_path, resume=True):
        pass


def test_a_damaged_earlier_stage_points_at_the_one_before(tmp_path, capsys):
    """The message names it only where it is still there."""
    save_run(tmp_path, 1, 2)
    corrupt(tmp_path / "sft.pt", "half")
    with pytest.raises(Damaged, match=r"corrupt.*still there, as .*sft\.prev\.pt: train_sft\.py --resume goes back"):
        load_checkpoint(tmp_path / "sft.pt", "sft")
    with opened(tmp_path, resume=True):
        assert "still there" not in capsys.readouterr().out  # it goes back by itself, and says so
    (tmp_path / "sft.prev.pt").unlink()
    with pytest.raises(Damaged) as error:
        load_checkpoint(tmp_path / "sft.pt", "sft")
    assert "still there" not in str(error.value)


def test_a_checkpoint_of_another_stage_is_a_mistake_and_not_damage(tmp_path):
    save_run(tmp_path, 1, 2)
    saved = load_checkpoint(tmp_path / "sft.pt", "sft")
    del saved["sha256"]
    save_checkpoint(tmp_path / "sft.pt", saved | {"stage": "rm"})
    with pytest.raises(UserError, match="was written by train_rm.py"), opened(tmp_path, resume=True):
        pass


def test_overwrite_leaves_nothing_of_the_old_run_to_fall_back_to(tmp_path):
    save_run(tmp_path, 1, 2)
    save_run(tmp_path, overwrite=True)
    assert stands_at(tmp_path / "sft.pt") == 2 and stands_at(tmp_path / "sft.prev.pt") == 1  # until there is a new one
    save_run(tmp_path, 4, overwrite=True)
    assert stands_at(tmp_path / "sft.pt") == 4 and not (tmp_path / "sft.prev.pt").exists()


@pytest.mark.parametrize("where, name", [("weight", "model.weight"), ("moment", r"optimizer.adamw.state.0.exp_avg"),
                                         ("number", "kl_coef")])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_run_that_is_not_finite_is_never_saved_over_a_healthy_checkpoint(where, name, bad, tmp_path):
    save_run(tmp_path, 1, 2)
    with opened(tmp_path, resume=True) as (run, model, _, _):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        run.optimizer.step(3, 0.0)
        if where != "number":
            (model.weight.data if where == "weight" else run.optimizer.adamw.state[model.weight]["exp_avg"])[0, 1] = bad
        with pytest.raises(FloatingPointError, match=f"iteration 3: {name} is not finite, so nothing was saved"):
            run.save(3, kl_coef=bad if where == "number" else 0.5)
    assert stands_at(tmp_path / "sft.pt") == 2 and stands_at(tmp_path / "sft.prev.pt") == 1


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    """At every save_interval, at the last iteration, and once a signal has come."""
    with opened(tmp_path, save_interval=4, max_iters=9) as (run, *_):
        saved = []
        monkeypatch.setattr(run, "save", lambda iteration: saved.append(iteration))
        for iteration in range(1, 10):
            run.end(iteration)
        assert saved == [4, 8, 9]
        monkeypatch.setattr(checkpoint.Signals, "received", signal.SIGTERM)
        run.end(1)
        assert saved == [4, 8, 9, 1]
        monkeypatch.undo()


@pytest.mark.parametrize("stepped", [False, True])
def test_an_exception_leaves_the_last_iteration_behind(stepped, tmp_path, capsys):
    """As a signal does, unless the optimizer has taken a step since then."""
    with pytest.raises(ZeroDivisionError), opened(tmp_path, save_interval=100) as (run, model, *_):
        torch.nn.init.constant_(model.weight, 2)
        run.end(2, kl_coef=0.25)
        torch.rand(3)  # the generators are those of the iteration's end
        if stepped:
            model.weight.grad = torch.ones_like(model.weight)
            run.optimizer.step(3, 0.0)
        1 / 0
    assert (tmp_path / "sft.pt").exists() != stepped
    if not stepped:
        assert stands_at(tmp_path / "sft.pt") == 2 and load_checkpoint(tmp_path / "sft.pt", "sft")["kl_coef"] == 0.25
        assert "saved iteration 2, the last one before the error" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["1 / 0", "exit()"])
def test_a_reward_function_that_raises_loses_no_iteration(ends, fresh, tmp_path):
    """The run that is resumed from there with a mended function equals one that was never interrupted."""
    body = "calls = []\ndef f(prompts, responses):\n    calls.extend([1] * (len(prompts) == 12))\n{}" \
           "    return [float(response.count('e')) for response in responses]\n"
    for name, bug in (("a", ""), ("b", f"    if len(calls) == 3:\n        {ends}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(body.format(bug))
    whole, folder = fresh("ppo"), fresh("ppo")
    run("ppo", whole, reward=f"{tmp_path}/a/reward.py:f", max_iters=4)
    with pytest.raises((RuntimeError, SystemExit)):
        run("ppo", folder, reward=f"{tmp_path}/b/reward.py:f", max_iters=4)
    assert load_checkpoint(folder / "ppo.pt", "ppo")["iter"] == 2
    (tmp_path / "b" / "reward.py").write_text(body.format(""))
    run("ppo", folder, reward=f"{tmp_path}/b/reward.py:f", max_iters=4, resume=True)
    assert digest(weights(folder, "ppo", "optimizer", "rng")) == digest(weights(whole, "ppo", "optimizer", "rng"))
    assert metrics(folder, "ppo") == metrics(whole, "ppo")


def test_a_look_at_samples_ends_no_run(fresh, tmp_path, capsys):
    """A reward function that fails on held-out questions changes nothing but what is shown of them."""
    body = "def f(prompts, responses):\n{}    return [float(response.count('e')) for response in responses]\n"
    runs = {}
    for name, bug in (("whole", ""), ("fails", "    if len(prompts) < 12:\n        raise KeyError('odd')\n")):
        (tmp_path / f"{name}.py").write_text(body.format(bug))
        runs[name] = folder = fresh("ppo")
        run("ppo", folder, reward=f"{tmp_path}/{name}.py:f", max_iters=2, sample_interval=1)
        notes = capsys.readouterr().out.count("note: no samples are shown: the reward function f raised")
        assert notes == 3 * bool(bug)  # at both iterations and for the table
    assert digest(weights(runs["whole"], "ppo")) == digest(weights(runs["fails"], "ppo"))
    assert metrics(runs["whole"], "ppo", "score_heldout", "kl_heldout") == metrics(runs["fails"], "ppo")


# ----------------------------------------------------------------------------------------------------------
# out_dir

def test_an_occupied_out_dir_needs_resume_or_overwrite(tmp_path):
    path = tmp_path / "new" / "sft.pt"
    checkpoint.claim_out_dir(Config(), path)
    assert path.parent.is_dir()
    path.touch()
    checkpoint.claim_out_dir(Config(), path.with_name("rm.pt"))  # another stage's file is in nobody's way
    checkpoint.claim_out_dir(Config(resume=True), path), checkpoint.claim_out_dir(Config(overwrite=True), path)
    with pytest.raises(UserError, match=r"sft\.pt is there already: --resume .* --overwrite"):
        checkpoint.claim_out_dir(Config(), path)
    with pytest.raises(UserError, match=r"--out_dir=.*sft\.pt cannot be made"):
        checkpoint.claim_out_dir(Config(), path / "rm.pt")


@pytest.mark.parametrize("modes, says", [
    ({"": 0o555}, r"--out_dir=.*run is not writable: "), ({"": 0o600}, r"--out_dir=.*run is not writable: "),
    ({"..": 0o600}, r"--out_dir=.*run cannot be made \(Permission denied\): "),
    ({".lock": 0o444}, r"run/\.lock cannot be written \(Permission denied\): remove it if no other run is at work "),
    ({"metrics.jsonl": 0o000}, r"run/metrics\.jsonl cannot be read, ")], ids=str)
def test_an_out_dir_that_cannot_be_written_is_refused(modes, says):
    """In a child that is not root, who may write anywhere, and in a folder of the system's, which it can reach."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "run"
        folder.mkdir()
        for name, mode in modes.items():
            if name.strip("."):
                (folder / name).touch()
            for path in (Path(top), folder, folder / name):
                if os.geteuid() == 0:
                    os.chown(path, 65534, 65534)
            (folder / name).resolve().chmod(mode)

        def body():
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            with pytest.raises(UserError, match=f"{says}.*give another --out_dir$"):
                save_run(folder, 1)
        assert Child(body).wait() == 0
        Path(top).chmod(0o700), folder.chmod(0o700)


def test_a_metrics_file_and_a_lock_that_are_folders_are_refused(tmp_path):
    for name, says in (("metrics.jsonl", "cannot be read"), ("samples.jsonl", "cannot be read"),
                       (".lock", r"cannot be written \(Is a directory\)")):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} {says}"):
            save_run(tmp_path, 1)
        (tmp_path / name).rmdir()


# ----------------------------------------------------------------------------------------------------------
# runs of all three stages, in children that are killed, stopped and starved

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with forty pairs and the sft.pt and rm.pt of four iterations each."""
    folder = tmp_path_factory.mktemp("base")
    write_jsonl(folder / "pairs.jsonl", pairs())
    train_stage("sft", folder), train_stage("rm", folder)
    return folder


@pytest.fixture
def fresh(base, tmp_path):
    """Makes folders with what the stage needs, and of the stage itself nothing."""
    count = iter(range(10**6))

    def make(stage):
        folder = tmp_path / f"run{next(count)}"
        gone = {"sft": "sft.*", "rm": "rm.*", "ppo": "-"}[stage]
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns(gone, "metrics.jsonl"))
        return folder
    return make


SMALL = {"sft": dict(dropout=0.1), "rm": {},
         "ppo": dict(critic="separate", kl_target=0.01, minibatches=3, batch_size=6)}
INTERVAL = {"max_iters": 4, "save_interval": 1, "log_interval": 1}


def train_stage(stage, folder, **flags):
    return run(stage, folder, **SMALL[stage] | INTERVAL | flags)


def outcome(folder, stage):
    """All that the promise is about: weights, optimizer, generators, KL coefficient and every metric but the clocks."""
    return digest(weights(folder, stage, "optimizer", "rng", "kl_coef")), metrics(folder, stage)


def go_on(folder, stage, **flags):
    """What a person does after a crash: --resume if there is a checkpoint, else the same command again."""
    return train_stage(stage, folder, resume=(folder / f"{stage}.pt").exists(), **flags)


class Child:
    """A process that runs `body`, forked from this one, so that it starts at once however busy the machine is."""

    def __init__(self, body):
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            signal.signal(signal.SIGINT, signal.default_int_handler)  # or a suite behind an ampersand would ignore it
            try:
                body()
                code = 0
            except SystemExit as exit:
                code = exit.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self):
        """The exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def after_metrics(act):
    """In a child: calls act(iteration) whenever a line of metrics is written, which is before the checkpoint."""
    real = Metrics.write

    def write(self, iteration, *args, **kwargs):
        row = real(self, iteration, *args, **kwargs)
        act(iteration)
        return row
    Metrics.write = write


def send(number, iteration, times=1):
    """In a child: sends itself the signal in that iteration."""
    after_metrics(lambda i: [os.kill(os.getpid(), number) for _ in range(times) if i == iteration])


CHECKPOINT_SOURCE = (ROOT / "support" / "checkpoint.py").read_text()


def kill_at_line(n):
    """In a child: kill -9 before the nth line that runs in the functions which write files."""
    functions, count = {"atomic_write", "save_checkpoint", "save", "write"}, itertools.count()
    assert all(f"def {name}(" in CHECKPOINT_SOURCE for name in functions)

    def on_line(frame, event, arg):
        if event == "line" and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame, event, arg):
        in_support = Path(frame.f_code.co_filename).name in ("metrics.py", "checkpoint.py")
        return on_line if in_support and frame.f_code.co_name in functions else None
    sys.settrace(on_call)


def kill_in_save(n, share):
    """In a child: kill -9 when that share of the nth checkpoint's bytes is in the temporary file."""
    real, count = torch.save, itertools.count(1)

    def save(contents, file):
        if next(count) < n:
            return real(contents, file)
        buffer = io.BytesIO()
        real(contents, buffer)
        file.write(buffer.getvalue()[:int(share * buffer.tell())])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save


def check_kill(stage, folder, moment, expected):
    """Kills a run at the moment, then looks at what is there, goes on, and compares with the run that was let be."""
    def body():
        moment()
        train_stage(stage, folder)
    code = Child(body).wait()
    assert code in (-signal.SIGKILL, 0)
    if (folder / f"{stage}.pt").exists():
        saved = load_checkpoint(folder / f"{stage}.pt", stage)  # whole, the old or the new one
        assert len(metrics(folder, stage)) >= saved["iter"]
    if (folder / f"{stage}.prev.pt").exists():
        assert load_checkpoint(folder / f"{stage}.prev.pt", stage)["iter"] == saved["iter"] - 1 or code == -9
    if code:
        go_on(folder, stage)
    assert outcome(folder, stage) == expected
    assert not list(folder.glob("*.tmp"))
    return code


def test_kill_9_in_a_write_leaves_the_old_file_and_resume_is_exact(fresh):
    whole = fresh("sft")
    train_stage("sft", whole)
    for n, share in ((1, 0.5), (3, 0.0), (3, 0.5), (3, 1.0)):
        assert check_kill("sft", fresh("sft"), lambda: kill_in_save(n, share), outcome(whole, "sft")) == -9


def test_the_next_run_removes_a_half_written_file(tmp_path):
    (tmp_path / "sft.pt.tmp").write_bytes(b"half a check")
    with opened(tmp_path):
        assert not (tmp_path / "sft.pt.tmp").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_kill_9_at_every_line_leaves_the_old_or_the_new_file(stage, fresh):
    """The lines of the first two checkpoints, and of every metric in between, each in a run of its own."""
    whole, killed = fresh(stage), 0
    train_stage(stage, whole)
    for n in range(0, 70 if stage == "sft" else 60, 1 if stage == "sft" else 3):
        killed += check_kill(stage, fresh(stage), lambda: kill_at_line(n), outcome(whole, stage)) == -9
    assert killed >= 20


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_of_one_run_changes_nothing(fresh):
    """Each life is ended at most 0.15 seconds after its first iteration."""
    whole, folder, rng = fresh("ppo"), fresh("ppo"), random.Random(0)
    train_stage("ppo", whole, max_iters=80)
    for n in range(20):
        reader, writer = os.pipe()

        def body():
            after_metrics(lambda i: os.write(writer, b"x"))
            go_on(folder, "ppo", max_iters=80)
        child = Child(body)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(0.15 * rng.random())
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL  # or the run was over before it could be killed twenty times
        os.close(reader)
        if (folder / "ppo.pt").exists():
            load_checkpoint(folder / "ppo.pt", "ppo")
    go_on(folder, "ppo", max_iters=80)
    assert outcome(folder, "ppo") == outcome(whole, "ppo")


@pytest.mark.parametrize("stage, number, code", [("sft", signal.SIGTERM, 143), ("rm", signal.SIGINT, 130),
                                                 ("ppo", signal.SIGINT, 130), ("ppo", signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_one_checkpoint_and_resume_is_exact(stage, number, code, fresh):
    """The iteration in which the signal comes is finished first."""
    whole, folder = fresh(stage), fresh(stage)
    train_stage(stage, whole, save_interval=9)

    def body():
        send(number, 2)
        after_save(lambda path: os.write(writer, b"x"))
        train_stage(stage, folder, save_interval=9)
    reader, writer = os.pipe()
    assert Child(body).wait() == code
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"x"  # one save
    saved = load_checkpoint(folder / f"{stage}.pt", stage)
    assert saved["iter"] == 2 == len(metrics(folder, stage)) and not saved["finished"]
    train_stage(stage, folder, save_interval=9, resume=True)
    assert outcome(folder, stage) == outcome(whole, stage)


def after_save(act):
    """In a child: calls act(path) whenever a checkpoint has been saved."""
    real = checkpoint.save_checkpoint
    checkpoint.save_checkpoint = lambda path, *args: (real(path, *args), act(path))


def test_a_signal_in_a_write_lets_it_finish_and_saves_no_second_one(fresh, capfd):
    folder = fresh("sft")

    def body():
        real = torch.save
        torch.save = lambda contents, file: (real(contents, file), os.kill(os.getpid(), signal.SIGTERM))
        train_stage("sft", folder)
    assert Child(body).wait() == 143
    assert load_checkpoint(folder / "sft.pt", "sft")["iter"] == 1
    assert "saved iteration 1; train_sft.py --resume continues it, and train_ppo.py" in capfd.readouterr().out


def test_a_second_signal_ends_the_run_at_once(fresh):
    """The old checkpoint stays whole."""
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = fresh("sft")

        def body():
            send(number, 3, times=2)
            train_stage("sft", folder)
        assert Child(body).wait() == -number
        assert load_checkpoint(folder / "sft.pt", "sft")["iter"] == 2


def test_a_signal_in_an_earlier_stage_stops_it_and_the_command_resumes(fresh, monkeypatch):
    """The same command continues the stage that was stopped."""
    shrink(monkeypatch)
    whole, folder = fresh("sft"), fresh("sft")
    for each in (whole, folder):
        (each / "rm.pt").unlink()
    train_stage("ppo", whole, **SIZES)

    def body():
        send(signal.SIGTERM, 2)
        train_stage("ppo", folder, **SIZES)
    assert Child(body).wait() == 143
    assert load_checkpoint(folder / "sft.pt", "sft")["iter"] == 2 and not (folder / "rm.pt").exists()
    train_stage("ppo", folder, **SIZES)
    assert [outcome(folder, stage) for stage in SMALL] == [outcome(whole, stage) for stage in SMALL]


@pytest.mark.parametrize("second, code", [(False, 143), (True, -signal.SIGTERM)])
def test_a_signal_before_the_first_stage(second, code, fresh, monkeypatch):
    """The first stage then ends after one iteration. A second signal ends it at once."""
    shrink(monkeypatch)
    folder = fresh("sft")

    def body():
        real = stages.train_missing
        stages.train_missing = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), real(*args))
        send(signal.SIGTERM, 1, times=int(second))
        train_stage("ppo", folder, **SIZES)
    assert Child(body).wait() == code
    assert second != (folder / "sft.pt").exists() and not (folder / "ppo.pt").exists()


def test_signal_handlers_are_restored_and_ignored_ones_stay_ignored(fresh):
    """A shell ignores SIGINT for a run behind nohup or an ampersand."""
    def body():
        signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, callers)
        send(signal.SIGINT, 2)
        train_stage("sft", folder)
        assert signal.getsignal(signal.SIGTERM) is callers and signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def callers(number, frame):
        pass
    folder = fresh("sft")
    assert Child(body).wait() == 0
    assert load_checkpoint(folder / "sft.pt", "sft")["finished"]


def test_train_works_outside_the_main_thread_where_python_hears_no_signals(fresh):
    folder = fresh("sft")
    thread = threading.Thread(target=train_stage, args=("sft", folder))
    thread.start(), thread.join()
    assert load_checkpoint(folder / "sft.pt", "sft")["finished"]


@pytest.mark.parametrize("first, second", [("sft", "sft"), ("ppo", "ppo"), ("rm", "ppo")])
def test_a_second_run_in_an_out_dir_is_refused_until_the_first_is_dead(first, second, fresh):
    folder, (reader, writer) = fresh(first), os.pipe()

    def body():
        after_metrics(lambda i: (os.write(writer, b"x"), signal.pause()))
        train_stage(first, folder)
    child = Child(body)
    os.read(reader, 1)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(UserError, match="another run is at work in .*: wait for it, or give another --out_dir"):
        train_stage(second, folder)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    train_stage(first, folder)


def test_every_run_of_a_process_takes_the_lock(tmp_path):
    for _ in range(2):
        with opened(tmp_path), open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_run_gives_its_out_dir_back(fresh):
    folder = fresh("sft")
    with pytest.raises(UserError):
        train_stage("sft", folder, n_head=3)
    Child(lambda: train_stage("sft", folder)).wait()
    assert load_checkpoint(folder / "sft.pt", "sft")["finished"]


def test_a_drive_without_locks_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    save_run(tmp_path, 1)
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_system_without_locks_is_used_with_one_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "fcntl", None)
    tmp_path.mkdir(exist_ok=True)
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):  # as in an earlier stage that train_ppo.py runs
        pass
    assert capsys.readouterr().out == f"note: this system has no locks: do not start a second run in {tmp_path}\n"
    with checkpoint.locked(tmp_path):
        assert "no locks" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# a full disk, no memory, bad numbers

def test_a_run_whose_screen_is_closed_is_finished_and_saved(fresh):
    """As in `python train_sft.py | head -1`."""
    folder = fresh("sft")
    process = subprocess.Popen([sys.executable, str(ROOT / "train_sft.py"), *tiny_flags("sft", folder, log_interval=1)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "writing to" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "note: stdout cannot be written any more (Broken pipe): continuing without it\n"
    assert process.wait() == 0 and load_checkpoint(folder / "sft.pt", "sft")["finished"]


def fill_disk(path):
    """The next file that is written for `path` finds the disk full, as the kernel says it."""
    os.symlink("/dev/full", path)


@pytest.mark.parametrize("full, name", [("sft.pt.tmp", "sft.pt"), ("metrics.jsonl", "metrics.jsonl")])
def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_file(full, name, fresh, monkeypatch):
    folder, step = fresh("sft"), Optimizer.step

    def step_and_fill(self, iteration, loss):
        if iteration == 3:
            (folder / full).unlink(missing_ok=True)
            fill_disk(folder / full)
        return step(self, iteration, loss)
    monkeypatch.setattr(Optimizer, "step", step_and_fill)
    with pytest.raises(OSError, match=rf"could not write {re.escape(str(folder / name))} \(No space left on device"):
        train_stage("sft", folder)
    assert load_checkpoint(folder / "sft.pt", "sft")["iter"] == 2
    monkeypatch.undo()
    if full == "metrics.jsonl":
        (folder / full).unlink()
    train_stage("sft", folder, resume=True)
    assert load_checkpoint(folder / "sft.pt", "sft")["finished"]


def allocate_too_much():
    torch.empty(2**60)  # the CPU's own message


def gpu_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


@pytest.mark.parametrize("stage, flags", [("sft", "--batch_size=12"), ("rm", "--max_new_tokens=8, --batch_size=6"),
                                          ("ppo", "--max_new_tokens=8, --batch_size=6")])
@pytest.mark.parametrize("fail", [allocate_too_much, gpu_is_full])
def test_out_of_memory_says_which_flags_to_lower(stage, flags, fail, fresh, monkeypatch):
    """The last checkpoint stays intact."""
    folder, step = fresh(stage), Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, i, loss: fail() if i == 3 else step(self, i, loss))
    with pytest.raises(UserError, match=f"train_{stage}.py: out of memory .*memory.* the first that is enough: "
                       "--micro_batch_size below what is printed above, --recompute. "
                       f"In a new run, lower {flags}") as error:
        train_stage(stage, folder)
    assert "\n" not in str(error.value) and load_checkpoint(folder / f"{stage}.pt", stage)["iter"] == 2
    monkeypatch.undo()
    train_stage(stage, folder, resume=True, micro_batch_size=1)
    assert load_checkpoint(folder / f"{stage}.pt", stage)["finished"]


@pytest.mark.parametrize("flags, size, says", [
    ({}, 2, "enough: --micro_batch_size below what is printed above, --recompute, --fsdp. In a new run, lower"),
    ({"micro_batch_size": 1}, 2, "enough: --recompute, --fsdp. In"),
    ({"micro_batch_size": 4, "recompute": True, "fsdp": True}, 2,
     "enough: --micro_batch_size below what is printed above. In"),
    ({"micro_batch_size": 1, "recompute": True}, 1,
     "memory (CUDA out of memory. Tried to allocate 2.00 GiB.). In a new")])
def test_out_of_memory_names_no_flag_that_is_set_or_would_not_help(flags, size, says, monkeypatch):
    monkeypatch.setattr(checkpoint.distributed, "size", lambda: size)
    with pytest.raises(UserError) as error, checkpoint.memory_advice(Config(**flags), "sft"):
        gpu_is_full()
    assert says in str(error.value)


def test_another_error_of_torch_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), checkpoint.memory_advice(Config(), "sft"):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_loss_that_is_not_finite_skips_the_step(stage, fresh, monkeypatch):
    """An infinite constant in the loss has no gradient at all."""
    module, name = {"sft": (train_sft, "masked_mean"), "rm": (train_rm, "bradley_terry_loss"),
                    "ppo": (train_ppo, "value_loss")}[stage]
    real, folder = getattr(module, name), fresh(stage)

    def infinite(*args):
        result = real(*args)
        return result + math.inf if stage == "sft" else (result[0] + math.inf, result[1])
    monkeypatch.setattr(module, name, infinite)
    steps = {"sft": 1, "rm": 1, "ppo": 6}[stage]
    with pytest.raises(FloatingPointError, match="in a row had a loss or a gradient that is not finite: lower --lr"):
        train_stage(stage, folder, max_bad_steps=2 * steps + 1)
    saved = load_checkpoint(folder / f"{stage}.pt", stage)
    assert saved["iter"] == 2 and [row["skipped_steps"] for row in metrics(folder, stage)] == [steps, 2 * steps]
    assert all(not state for state in saved["optimizer"]["adamw"]["state"].values())  # AdamW has never stepped


def test_no_file_loads_a_pickle_that_could_execute_something():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("experiments/*.py")]:
        text = path.read_text()
        assert not re.search(r"weights_only\s*=\s*False|pickle\.load|torch\.load\((?!.*weights_only=True)", text), path


# ----------------------------------------------------------------------------------------------------------
# slow: processes of their own

def start(stage, folder, *more, **env):
    argv = tiny_flags(stage, folder, **SMALL[stage] | INTERVAL)
    return subprocess.Popen([sys.executable, str(ROOT / f"train_{stage}.py"), *argv, *more], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@pytest.mark.slow
def test_hash_seeds_and_ctrl_c_from_outside_change_nothing(fresh, tmp_path):
    """The reward function holds the second iteration until the signal has been sent. The first one calls it twice, as
    it looks at held-out prompts."""
    (tmp_path / "reward.py").write_text(
        "import os, time\n"
        "def f(prompts, responses):\n"
        "    f.calls = getattr(f, 'calls', 0) + 1\n"
        "    if 'HOLD' in os.environ and f.calls == 3:\n"
        "        print('held', flush=True)\n"
        "        while not os.path.exists(os.environ['HOLD']):\n"
        "            time.sleep(0.01)\n"
        "    return [float(response.count('e')) for response in responses]\n")
    reward, whole, folder = f"--reward={tmp_path / 'reward.py'}:f", fresh("ppo"), fresh("ppo")
    process = start("ppo", whole, reward, PYTHONHASHSEED="1")
    assert process.wait() == 0, process.stderr.read()
    process = start("ppo", folder, reward, PYTHONHASHSEED="2", HOLD=str(tmp_path / "go"))
    assert any(line == "held\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert "this iteration is the last" in process.stderr.readline() + process.stderr.readline()
    (tmp_path / "go").touch()
    assert process.wait() == 130
    assert load_checkpoint(folder / "ppo.pt", "ppo")["iter"] == 2
    process = start("ppo", folder, reward, "--resume", PYTHONHASHSEED="3")
    assert process.wait() == 0, process.stderr.read()
    assert outcome(folder, "ppo") == outcome(whole, "ppo")


@pytest.mark.slow
def test_compile_on_a_machine_without_a_compiler_trains_all_the_same(fresh, tmp_path):
    folder = fresh("sft")
    process = start("sft", folder, "--compile", CXX="/no/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("torch.compile failed (") == 1 and "No working C++ compiler" in out
    assert load_checkpoint(folder / "sft.pt", "sft")["finished"]
