"""Tests of experiments/chain.py: what a right answer is, and the rows."""

import json
import random

import pytest

from data import load_demonstrations
from experiments import chain
from support.flags import parse_flags
from tokenizer import get_tokenizer

UP, DOWN = ">".join("789012345678901234"), ">".join("321098765432109876")


@pytest.mark.parametrize("prompt, response, n", [
    ("a7+=", UP, 18), ("k3-=", DOWN, 18), ("a7+=", UP.replace("9>0>1", "9>5>6", 1), 16), ("a8+=", UP, 17),
    ("a7-=", UP, 1), ("a7+=", UP + ">5", 0), ("a7+=", UP[:-2], 0), ("a7+=", "", 0),
    ("a7+=", UP.replace("7", "77", 1), 0), ("a7+=", UP.replace("7", "²", 1), 0)])
def test_right_steps_are_counted(prompt, response, n):
    assert chain.n_right(prompt, response) == n
    assert chain.right_steps([prompt], [response]) == [n / 18] and chain.all_right([prompt], [response]) == [n == 18]


def test_the_demonstrations_are_right_as_often_as_they_say(tmp_path):
    chain.main(parse_flags(chain.Config, [f"--to={tmp_path / 'x' / 'chain.jsonl'}"]))
    rows = [json.loads(line) for line in (tmp_path / "x" / "chain.jsonl").read_text().splitlines()]
    assert rows == chain.demonstrations(random.Random(0)) and len({row["prompt"] for row in rows}) == 520
    # A step goes wrong with probability 0.15 on average, and a random digit is the right one in one of ten.
    share = sum(chain.n_right(*row.values()) for row in rows) / len(rows) / 18
    assert share == pytest.approx(1 - 0.135 * 17 / 18, abs=0.005)
    split = load_demonstrations(str(tmp_path / "x" / "chain.jsonl"), get_tokenizer("bytes"), 48)
    assert {len(row.response) for row in split.train} == {36}
