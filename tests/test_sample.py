"""Tests of sample.py: what a person sees who talks to a checkpoint."""

import builtins

import pytest
import torch

import common
import sample
import train_sft


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny SFT model of the built-in task."""
    folder = tmp_path_factory.mktemp("sample")
    train_sft.train(train_sft.Config(out_dir=str(folder), device="cpu", max_iters=60, batch_size=32, lr=3e-3, n_layer=1,
                                     n_head=2, n_embd=32, block_size=48))
    return str(folder / "sft.pt")


def ask(capsys, **flags):
    capsys.readouterr()
    sample.main(sample.Config(device="cpu", **{"max_new_tokens": 16} | flags))
    return capsys.readouterr().out


def test_n_answers_differ_and_the_same_seed_repeats_them(checkpoint, capsys):
    answers = ask(capsys, checkpoint=checkpoint, prompt="Where is Lima?", n=6)
    assert answers == ask(capsys, checkpoint=checkpoint, prompt="Where is Lima?", n=6)
    assert answers != ask(capsys, checkpoint=checkpoint, prompt="Where is Lima?", n=6, seed=1)
    assert len(answers.splitlines()) == 6 and len(set(answers.splitlines())) > 1


def test_an_answer_without_eos_is_marked_as_cut(checkpoint, capsys):
    answers = ask(capsys, checkpoint=checkpoint, prompt="Where is Lima?", max_new_tokens=1, n=4)
    assert answers.count("[cut at --max_new_tokens=1]") >= 3  # EOS itself may come first


def test_two_checkpoints_answer_side_by_side_with_the_same_random_numbers(checkpoint, capsys):
    first, second = ask(capsys, checkpoint=checkpoint, versus=checkpoint, prompt="Where is Lima?").splitlines()
    assert first == second and first.startswith(f"{checkpoint}:")


def test_a_character_of_several_tokens_is_printed_whole(checkpoint, capsys, monkeypatch):
    """The two bytes of é come as two tokens: printed one by one they would be two broken characters."""
    _, encoding = sample.load(checkpoint, torch.device("cpu"))
    ids = [*encoding.encode_ordinary("caf"), *"é".encode(), encoding.eot_token]
    monkeypatch.setattr(sample, "sample_tokens", lambda *args, **kwargs: ((torch.tensor([i]), None, None) for i in ids))
    assert ask(capsys, checkpoint=checkpoint, prompt="x") == " café\n"


def test_a_prompt_that_leaves_no_room_does_not_end_the_conversation(checkpoint, capsys, monkeypatch):
    with pytest.raises(common.UserError, match="leaves room for 32 in block_size=48: shorten one of them"):
        ask(capsys, checkpoint=checkpoint, prompt="Where is Lima? " * 20)
    lines = iter(["Where is Lima? " * 20, "Where is Lima?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    screen = ask(capsys, checkpoint=checkpoint)
    assert "shorten one of them" in screen and len(screen.strip().splitlines()) == 3
