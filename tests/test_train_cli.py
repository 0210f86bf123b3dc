"""Tests of the command line of the three train scripts: bad input ends with exit code 2 and one sentence."""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import atlas
import data
import tiny
from paths import ROOT
from support.flags import UserError
from tiny import STAGES, command, pairs, run, tiny_flags


def jsonl(text, compress=False, cut=None):
    def write(folder):
        raw = text if isinstance(text, bytes) else text.encode()
        raw = gzip.compress(raw * 50)[:cut] if compress else raw
        path = folder / ("bad.jsonl.gz" if compress else "bad.jsonl")
        path.write_bytes(raw)
        return {"data": str(path)}
    return write


GOOD = json.dumps(pairs()[0]) + "\n"
BAD_INPUT = [  # script, flags or a function that makes them, what the sentence says
    ("sft", {"lr": -1.0}, "--lr=-1.0 must lie in"), ("ppo", {"clip": 1.5}, "--clip=1.5 must lie in"),
    ("ppo", {"temperature": 0.0}, "--temperature=0.0"), ("ppo", {"lam": math.nan}, "--lam=nan"),
    ("ppo", {"batch_size": 10, "minibatches": 4}, "10 = 4 x 2 + 2"),
    ("sft", {"micro_batch_size": 5}, "12 = 2 x 5 + 2"),
    ("rm", {"micro_batch_size": 4}, "6 = 1 x 4 + 2"),
    ("sft", {"data": "gone.jsonl"}, "gone.jsonl: No such file"),
    ("sft", jsonl(""), "bad.jsonl: the file has 0 rows"),
    ("sft", jsonl(GOOD, compress=True, cut=-20), "the gzip data is cut short"),
    ("sft", jsonl(GOOD.encode() + b'{"prompt": "\xff"}\n'), "bad.jsonl:2: byte 13 of the line is not UTF-8"),
    ("sft", jsonl(GOOD + "{oops\n"), "bad.jsonl:2: malformed JSON"),
    ("sft", jsonl(GOOD + '{"prompt": "x"}\n'), 'bad.jsonl:2: missing key "response"'),
    ("rm", jsonl('{"prompt": "x", "chosen": 1, "rejected": "y"}\n'),
     'bad.jsonl:1: "chosen" must be a string, not int'),
    ("rm", jsonl('{"prompt": "x", "response": "y"}\n'), 'bad.jsonl:1: missing key "chosen"'),
    ("rm", jsonl('{"prompt": "x", "chosen": "y", "rejected": "y"}\n'), "0 usable rows in"),
    ("rm", {"max_new_tokens": 64}, "longer than block_size=64"),  # before training, not after it
    ("sft", {"tokenizer": "gpt22"}, "unknown tokenizer 'gpt22' (did you mean gpt2?)"),
    ("ppo", {"tokenizer": "atlas"}, "is not the one of the checkpoint (bytes, 257 ids)"),
    ("sft", {"n_head": 3}, "--n_embd=32 must be a multiple of --n_head=3"),
    ("rm", {"n_layer": 2}, "--n_layer=2 does not match the checkpoint's n_layer=1"),
    ("ppo", {"block_size": 32}, "--block_size=32 does not match"),
    ("sft", {"init_from": "nowhere"}, "--init_from=nowhere"),
    ("rm", {"init_from": "nowhere.pt"}, "nowhere.pt is not there: train it first with train_sft.py"),
    ("ppo", {"rm": "nowhere.pt"}, "nowhere.pt is not there"),
    ("ppo", {"reward": "nowhere.py:f"}, "nowhere.py is not there"),
    ("ppo", {"reward": "length"}, "must be rm or path/to/file.py:function"),
    ("ppo", {"reward": f"{tiny.__file__}:gone"}, "has no function gone"),
    ("sft", {"resume": True}, "sft.pt is not there, so there is nothing to resume: leave --resume out"),
    ("sft", {"out_dir": __file__}, "cannot be made")]


@pytest.mark.parametrize("stage, flags, says", BAD_INPUT,
                         ids=[f"{s}-{says[:30]}" for s, _, says in BAD_INPUT])
def test_bad_input_exits_2_with_one_sentence_and_writes_nothing(stage, flags, says, world, capsys):
    folder = world(stage)
    flags = flags(folder) if callable(flags) else flags
    before = sorted(p.name for p in folder.iterdir())
    assert command(f"train_{stage}.py", *tiny_flags(stage, folder, **flags)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and err.startswith(f"train_{stage}.py: ")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_cuda_that_is_not_there_exits_2(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("train_sft.py", *tiny_flags("sft", world("sft"), device="cuda")) == 2
    assert "--device=cuda was asked for" in capsys.readouterr().err


def test_reward_model_and_policy_with_different_tokenizers_are_refused(world, worlds, capsys):
    folder = world("ppo")
    assert command("train_ppo.py", *tiny_flags("ppo", folder, rm=str(worlds["atlas"] / "rm.pt"))) == 2
    sentence = (f"the reward model's tokenizer is atlas ({atlas.tokenizer().n_vocab} ids) and the policy's "
                "bytes (257 ids)")
    assert sentence in capsys.readouterr().err
    assert not (folder / "ppo.pt").exists()


def test_a_reward_model_must_read_all_that_the_policy_writes(world):
    """One that reads less is refused before training."""
    folder, small = world("ppo"), world("sft")
    run("sft", small, block_size=32)
    run("rm", small)
    with pytest.raises(UserError, match="reward model reads 32 tokens and the policy may write 64"):
        run("ppo", folder, rm=str(small / "rm.pt"))
    shutil.copy(small / "rm.pt", folder), (folder / "sft.pt").unlink()
    with pytest.raises(UserError, match="reward model reads 32 tokens and the policy may write 64"):
        run("ppo", folder, block_size=64)
    assert not (folder / "sft.pt").exists()


def test_a_reward_model_calibrated_on_other_answers_is_said(world, capsys):
    run("ppo", world("ppo"), max_iters=1)
    assert "calibrated at" not in capsys.readouterr().out
    folder = world("ppo")
    run("ppo", folder, rm=str(folder / "rm.pt"), max_iters=1, max_new_tokens=4, temperature=0.7)
    screen = capsys.readouterr().out
    assert screen.count("calibrated at --max_new_tokens=8, and this run has 4") == 1 and "--temperature=1.0" in screen


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_input_leaves_no_new_out_dir_behind(stage, world, tmp_path):
    folder = world("ppo")
    for flags in {"data": "nope.jsonl"}, {"data": str(folder / "pairs.jsonl"), "tokenizer": "nope"}:
        with pytest.raises((UserError, data.DataError)):
            STAGES[stage].train(STAGES[stage].Config(**{"out_dir": str(tmp_path / "new"), "device": "cpu"} | flags | (
                {"init_from": str(folder / "sft.pt")} if stage != "sft" else {})))
        assert not (tmp_path / "new").exists()


def test_a_corrupt_sft_model_is_refused_by_every_script_that_reads_it(world, capsys):
    for stage in ("rm", "ppo"):
        folder = world(stage)
        (folder / "sft.pt").write_bytes((folder / "sft.pt").read_bytes()[:-1])
        assert command(f"train_{stage}.py", *tiny_flags(stage, folder)) == 2
        assert "sft.pt cannot be read as a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("argv, code, says", [
    (["train_sft.py", "--lrr=1"], 2, "did you mean --lr?"),
    (["train_rm.py", "--lr=fast"], 2, "'fast' is not a number"),
    (["train_ppo.py", "--gamma=2"], 2, "--gamma=2.0 must lie in [0, 1]"),
    (["train_ppo.py", "--help"], 0, "--kl_coef")])
def test_a_process_of_its_own_says_it_without_a_traceback(argv, code, says, tmp_path):
    process = subprocess.run([sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=tmp_path,
                             capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == code and says in process.stdout + process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())
