"""Tests of sample.py: what a person sees who talks to a checkpoint."""

import builtins

import pytest
import torch

import sample
from support.flags import UserError


def ask(capsys, **flags):
    capsys.readouterr()
    sample.main(sample.Config(device="cpu", **{"max_new_tokens": 16} | flags))
    return capsys.readouterr().out


def test_n_answers_differ_and_the_same_seed_repeats_them(sft, capsys):
    answers = ask(capsys, checkpoint=sft, prompt="Where is Lima?", n=6)
    assert answers == ask(capsys, checkpoint=sft, prompt="Where is Lima?", n=6)
    assert answers != ask(capsys, checkpoint=sft, prompt="Where is Lima?", n=6, seed=1)
    assert len(answers.splitlines()) == 6 and len(set(answers.splitlines())) > 1


def test_an_answer_without_eos_is_marked_as_cut(sft, capsys):
    answers = ask(capsys, checkpoint=sft, prompt="Where is Lima?", max_new_tokens=1, n=4)
    assert answers.count("[cut at --max_new_tokens=1]") >= 3  # EOS itself may come first


def test_two_checkpoints_answer_side_by_side_with_the_same_random_numbers(sft, capsys):
    first, second = ask(capsys, checkpoint=sft, versus=sft, prompt="Where is Lima?").splitlines()
    assert first == second and first.startswith(f"{sft}:")


def test_a_character_of_several_tokens_is_printed_whole(sft, capsys, monkeypatch):
    """The two bytes of é come as two tokens: printed one by one they would be two broken characters."""
    _, encoding, _ = sample.load(sft, torch.device("cpu"))
    ids = [*encoding.encode_ordinary("caf"), *"é".encode(), encoding.eot_token]
    monkeypatch.setattr(sample, "sample_tokens", lambda *args, **kwargs: ((torch.tensor([i]), None, None) for i in ids))
    assert ask(capsys, checkpoint=sft, prompt="x") == " café\n"


def test_a_prompt_that_leaves_no_room_does_not_end_the_conversation(sft, capsys, monkeypatch):
    with pytest.raises(UserError, match="leaves room for 112 in block_size=128: shorten one of them"):
        ask(capsys, checkpoint=sft, prompt="Where is Lima? " * 40)
    lines = iter(["Where is Lima? " * 40, "Where is Lima?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    screen = ask(capsys, checkpoint=sft)
    assert "shorten one of them" in screen and len(screen.strip().splitlines()) == 3
