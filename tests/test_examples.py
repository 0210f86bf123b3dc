"""Tests of examples/: each reward function does what it says, and trains."""

import pytest

from examples import rewards
from paths import ROOT
from tiny import metrics, run, write_jsonl


def test_exact_match_and_its_parts_by_hand():
    rows = [{"answer": "42"}, {"answer": 42}, {"answer": "42"}, {"answer": "x"}]
    responses = [" 42", "42\n", "43", "x"]
    assert rewards.exact([""] * 4, responses, rows) == [1, 1, 0, 1]
    parts = rewards.graded([""] * 4, responses, rows)
    assert parts == {"format": [0.2, 0.2, 0.2, 0], "correct": [0.8, 0.8, 0, 0.8]}


def test_the_last_numbers_of_answer_and_response_are_compared():
    rows = [{"answer": "5 + 1,200 = 1,205\n#### 1,205"}] * 4 + [{"answer": 7}]
    responses = ["so 1205", "1,205.0 in all", "1205 or 5", "none", "It is 7."]
    assert rewards.last_number([""] * 5, responses, rows) == [1, 1, 0, 0, 1]


def test_the_ramp_by_hand():
    responses = ["", "x" * 50, "x" * 200, "x" * 300, "x" * 900]
    assert rewards.length_ramp([""] * 5, responses) == [0, 0.25, 1, 0.5, 0]


@pytest.mark.parametrize("name", ["exact", "last_number", "length_ramp", "graded"])
def test_an_example_is_a_reward_and_an_evaluation(name, world):
    folder = world("ppo")
    write_jsonl(folder / "pairs.jsonl", [{"prompt": f"{i} + 1 = ", "answer": str(i + 1)} for i in range(40)])
    spec = f"{ROOT / 'examples' / 'rewards.py'}:{name}"
    run("ppo", folder, max_iters=1, reward=spec, eval=spec)
    row, = metrics(folder, "ppo")
    assert row["eval"] == pytest.approx(row["score_heldout"])
    assert ("reward_correct" in row) == ("eval_correct" in row) == (name == "graded")
