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


def test_two_checkpoints_answer_in_columns_with_the_same_random_numbers(sft, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(2 * len(sft) + 10))
    lines = ask(capsys, checkpoint=sft, versus=sft, prompt="Where is Lima?").splitlines()
    paths, answers = ([column.strip() for column in lines[n].split(" | ")] for n in (0, 2))
    assert paths == [sft, sft] and answers[0] == answers[1] != ""


def test_columns_wrap_and_stay_apart_when_one_text_is_longer(monkeypatch):
    monkeypatch.setenv("COLUMNS", "26")
    expected = ["one two    |   four", "three      |", "           | five"]
    assert sample.side_by_side(["one two three", "  four\n\nfive"]).splitlines() == expected


def test_a_character_of_several_tokens_is_printed_whole(sft, capsys, monkeypatch):
    """The two bytes of é come as two tokens: printed one by one they would be two broken characters."""
    _, encoding, _ = sample.load(sft, torch.device("cpu"))
    ids = [*encoding.encode_ordinary("caf"), *"é".encode(), encoding.eot_token]
    monkeypatch.setattr(sample, "sample_tokens", lambda *args, **kwargs: ((torch.tensor([i]), None, None) for i in ids))
    assert ask(capsys, checkpoint=sft, prompt="x") == " café\n"


def test_a_prompt_that_leaves_no_room_does_not_end_the_conversation(sft, capsys, monkeypatch):
    with pytest.raises(UserError, match="leaves room for 112 in block_size=128: shorten one of them"):
        ask(capsys, checkpoint=sft, prompt="Where is Lima? " * 40)
    screen = talk(capsys, monkeypatch, "Where is Lima? " * 40, "Where is Lima?", checkpoint=sft)
    assert "shorten one of them" in screen and len(screen.strip().splitlines()) == 3


# ---------------------------------------------------------------------------------------------------------------------
# a chat: the built-in model answers messages whose roles are text

def talk(capsys, monkeypatch, *lines, **flags):
    """The screen of a person who types these lines and then Ctrl-D."""
    typed = iter(lines)

    def read(prompt):
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    return ask(capsys, **flags)


@pytest.fixture
def contexts(sft, monkeypatch):
    """The text of each context that a model was asked to answer, in order. The model says " Yes." whatever it is."""
    _, encoding, _ = sample.load(sft, torch.device("cpu"))
    seen, answers = [], encoding.encode_ordinary(" Yes.") + [encoding.eot_token]

    def tokens(model, ids, *args, **kwargs):
        seen.append(encoding.decode(ids[0].tolist()))
        return ((torch.tensor([i]), None, None) for i in answers)

    monkeypatch.setattr(sample, "sample_tokens", tokens)
    return seen


CHAT = {"chat": "plain"}
A, B = "User:\nA?\n\nAssistant:\n", "User:\nB?\n\nAssistant:\n"


def test_a_chat_keeps_its_messages_until_a_new_one_begins(sft, contexts, capsys, monkeypatch):
    screen = talk(capsys, monkeypatch, "A?", "", "B?", "/new", "B?", checkpoint=sft, **CHAT)
    assert contexts == [A, A + " Yes.\n\n" + B, B]
    assert screen.count(" Yes.") == 3 and "Ctrl-D" in screen and "a new conversation" in screen


def test_without_a_chat_every_prompt_is_a_fresh_context(sft, contexts, capsys, monkeypatch):
    talk(capsys, monkeypatch, "A?", "/new", checkpoint=sft)
    assert contexts == ["A?", "/new"]


def test_a_system_message_begins_each_conversation(sft, contexts, capsys, monkeypatch):
    talk(capsys, monkeypatch, "A?", "/new", "B?", checkpoint=sft, system="Be brief.", **CHAT)
    assert contexts == ["System:\nBe brief.\n\n" + A, "System:\nBe brief.\n\n" + B]
    ask(capsys, checkpoint=sft, system="Be brief.", prompt="A?", **CHAT)
    assert contexts[2] == contexts[0]
    with pytest.raises(UserError, match="--system begins a conversation"):
        ask(capsys, checkpoint=sft, system="Be brief.", prompt="A?")


def test_each_policy_keeps_the_answers_that_it_gave(sft, capsys, monkeypatch):
    _, encoding, _ = sample.load(sft, torch.device("cpu"))
    seen, answers = [], iter([" Yes.", " No.", " Yes.", " No."])

    def tokens(model, ids, *args, **kwargs):
        seen.append(encoding.decode(ids[0].tolist()))
        return ((torch.tensor([i]), None, None) for i in [*encoding.encode_ordinary(next(answers)), encoding.eot_token])

    monkeypatch.setattr(sample, "sample_tokens", tokens)
    talk(capsys, monkeypatch, "A?", "B?", checkpoint=sft, versus=sft, **CHAT)
    assert seen == [A, A, A + " Yes.\n\n" + B, A + " No.\n\n" + B]


def test_a_conversation_that_fills_the_context_is_said_and_not_cropped(sft, contexts, capsys, monkeypatch):
    long = "Where is Lima? " * 12
    screen = talk(capsys, monkeypatch, long, long, "A?", "/new", long, checkpoint=sft, **CHAT)
    assert screen.count("the conversation has") == screen.count("/new begins another\n") == 1
    assert [context.count("Lima") for context in contexts] == [12, 12, 12]
    assert contexts[1].endswith(A) and contexts[2] == contexts[0]


def test_an_answer_that_was_cut_is_kept_without_the_note(sft, contexts, capsys, monkeypatch):
    monkeypatch.setattr(sample, "eos_ids", lambda encoding: [])
    talk(capsys, monkeypatch, "A?", "B?", checkpoint=sft, **CHAT)
    assert "[cut" not in contexts[1] and contexts[1].startswith(A + " Yes.")


def test_the_longest_answer_is_a_quarter_of_the_context_by_default(sft, capsys):
    with pytest.raises(UserError, match="--max_new_tokens=32 leaves room for 96 in block_size=128"):
        ask(capsys, checkpoint=sft, prompt="Where is Lima? " * 40, max_new_tokens=None)
