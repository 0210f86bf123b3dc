"""Tests of rows of messages in data.py: which shapes are read, what they become, and what is refused."""

import pytest

from data import DataError, load_comparisons, load_demonstrations, load_prompts, to_row
from files import write
from tokenizer import get_tokenizer, render_messages

BYTES = get_tokenizer("bytes")


def messages(*texts, first=0):
    return [{"role": ("user", "assistant")[(i + first) % 2], "content": text} for i, text in enumerate(texts)]


HI, YES, NO = messages("hi"), messages("yes", first=1), messages("no", first=1)
ASKED = (("user", "hi"),)


@pytest.mark.parametrize("row, prompt, responses", [
    ({"prompt": HI}, ASKED, ()),
    ({"prompt": HI, "response": "yes"}, ASKED, ("yes",)),
    ({"prompt": HI, "response": YES}, ASKED, ("yes",)),
    ({"messages": HI + YES}, ASKED, ("yes",)),
    ({"messages": messages("hi", "yes", "so", "no")}, (*ASKED, ("assistant", "yes"), ("user", "so")), ("no",)),
    ({"prompt": HI, "chosen": YES, "rejected": NO}, ASKED, ("yes", "no")),
    ({"prompt": HI, "chosen": "yes", "rejected": NO}, ASKED, ("yes", "no")),
    ({"prompt": "hi", "chosen": YES, "rejected": NO}, "hi", ("yes", "no")),
    ({"chosen": HI + YES, "rejected": HI + NO}, ASKED, ("yes", "no")),
    ({"prompt": "hi", "chosen": HI + YES, "rejected": HI + NO}, ASKED, ("yes", "no")),
    ({"prompt": HI, "chosen": HI + YES, "rejected": HI + NO, "messages": HI + YES}, ASKED, ("yes", "no"))])
def test_each_kind_of_row_may_hold_messages(row, prompt, responses):
    read = to_row(row, 0, "plain")
    assert (read.prompt, read.responses, read.problem, read.has_prompt) == (prompt, responses, "", True)


@pytest.mark.parametrize("row", [
    {"chosen": HI + YES, "rejected": messages("so", "no")}, {"prompt": "so", "chosen": HI + YES, "rejected": HI + NO},
    {"prompt": messages("so"), "chosen": HI + YES, "rejected": HI + NO}])
def test_answers_to_different_prompts_are_no_pair(row):
    assert to_row(row, 2, "plain").problem == "the prompts differ"


@pytest.mark.parametrize("row, reason", [
    ({"prompt": []}, '"prompt" has no messages'), ({"messages": HI}, '"messages" must end with a message of the assi'),
    ({"prompt": HI, "response": HI}, '"response" must end with a message of the assistant, not of "user"'),
    ({"messages": YES}, 'missing key "prompt"'), ({"prompt": HI + YES}, "the prompt ends with a message of the assist"),
    ({"prompt": [{"role": "tool", "content": ""}]},
     'message 1 of "prompt" has the role "tool"; known are system, user'),
    ({"prompt": [{"content": ""}]}, 'message 1 of "prompt" has no "role" or no "content"'),
    ({"prompt": [*HI, {"role": "user", "content": 3}]}, '"content" of message 2 of "prompt" must be a string, not int'),
    ({"prompt": [{"role": "user", "content": "\ud800"}]}, 'message 1 of "prompt" has a lone surrogate'),
    ({"prompt": ["hi"]}, '"prompt" must be a string, not list'), ({"chosen": HI + YES}, 'missing key "rejected"')])
def test_a_shape_that_is_unknown_is_refused_with_its_place(tmp_path, row, reason):
    path = write(tmp_path / "x.jsonl", {"prompt": "q"}, row)
    with pytest.raises(DataError) as error:
        load_prompts(path, BYTES, 64, 8, chat="plain")
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


def test_chat_none_refuses_messages(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": HI})
    with pytest.raises(DataError, match='x.jsonl:1: "prompt" is a list of messages, which --chat=none refuses'):
        load_prompts(path, BYTES, 64, 8)


def test_messages_are_rendered_and_a_string_is_never_wrapped(tmp_path):
    path = write(tmp_path / "x.jsonl", *({"prompt": prompt, "chosen": YES, "rejected": "no"} for prompt in (
        "hi", HI, messages("hey", "yes", "so"))))
    rendered = [render_messages(BYTES, prompt, "plain") for prompt in (HI, messages("hey", "yes", "so"))]
    expected = [BYTES.encode_ordinary("hi"), *rendered]
    yes, no = [*b"yes", 256], [*b"no", 256]
    for split in (load_prompts(path, BYTES, 64, 8, chat="plain"), load_demonstrations(path, BYTES, 64, chat="plain"),
                  load_comparisons(path, BYTES, 64, chat="plain")):
        records = split.train + split.heldout
        assert sorted(getattr(record, "prompt", record) for record in records) == sorted(expected)
        for record in records:
            assert getattr(record, "response", yes) == yes and getattr(record, "responses", [yes, no]) == [yes, no]
    assert bytes(rendered[1]) == b"User:\nhey\n\nAssistant:\nyes\n\nUser:\nso\n\nAssistant:\n"


def test_an_equal_conversation_is_kept_once(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": HI}, {"messages": HI + YES}, {"prompt": "hi"},
                 {"prompt": messages("so")})
    split = load_prompts(path, BYTES, 64, 8, chat="plain")
    assert len(split.train + split.heldout) == 3 and "dropped 1: the same prompt again" in split.report
