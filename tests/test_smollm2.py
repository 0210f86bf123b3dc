"""Tests of experiments/smollm2.py, on a tiny random Llama: the task, the reward, and a run from end to end."""

import json

import pytest

from experiments import smollm2
from model import GPT, GPTConfig
from pretrained import LLAMA, save_pretrained
from tokenizer import get_tokenizer


@pytest.mark.parametrize("task, n", [("sums", 2), ("steps", 3), ("chains", 3), ("parity", 1)])
def test_held_out_questions_share_no_numbers_with_training(task, n):
    training, heldout = smollm2.problems(task)
    assert not {tuple(sorted(row)) for row, *_ in training} & {tuple(sorted(row)) for row, *_ in heldout}
    assert 0.2 < len(heldout) / len(training + heldout) < 0.3 and {len(row) for row, *_ in training + heldout} == {n}
    for row, question, answer in training:
        asked, expected = (f"What is {' + '.join(map(str, row))}?", str(sum(row))) if n > 1 else \
            (f"Is {row[0]} an even number?", "odd" if row[0] % 2 else "even")
        assert (question, answer) == (asked, expected)


def test_steps_has_a_worked_example_that_no_question_repeats():
    (asked, question, answer), *_ = smollm2.problems("steps")[1]
    example, worked, turn = smollm2.messages(question, "steps")
    assert [turn] == smollm2.messages(question, "chains") and turn["content"] == question
    assert [example["role"], worked["role"]] == ["user", "assistant"] and worked["content"].endswith(" 13.")
    assert example["content"] not in {text for part in smollm2.problems("steps") for _, text, _ in part}


@pytest.mark.parametrize("response, score", [("3 + 4 = 7.", 1), ("7", 1), ("It is 17.", 0), ("7 is not 8", 0), ("", 0),
                                             ("seven", 0)])
def test_the_last_number_counts(response, score):
    assert smollm2.right(["What is 3 + 4?"], [response], [{"answer": "7"}]) == [score]


@pytest.mark.parametrize("response, score", [("7 is odd.", 1), ("Odd", 1), ("No: 7 is an odd number, 7.", 1),
                                             ("even", 0), ("It is even or odd", 0), ("oddly", 0), ("", 0)])
def test_one_of_the_two_words_counts(response, score):
    assert smollm2.right(["Is 7 an even number?"], [response], [{"answer": "odd"}]) == [score]


def test_a_run_is_measured_drawn_and_not_repeated(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model = GPT(GPTConfig(vocab_size=257, block_size=96, n_layer=1, n_head=2, n_embd=16, **LLAMA.kind))
    save_pretrained(model, get_tokenizer("bytes"), tmp_path / "model")
    monkeypatch.setattr(smollm2, "N_EVAL", 45)
    for name in ("before", "group_0", "critic_0"):
        (tmp_path / name).mkdir()
    smollm2.before(tmp_path / "before", str(tmp_path / "model"), "sums")
    runs = [("group", 0, "group_0"), ("critic", 0, "critic_0")]
    for method, seed, name in runs * 2:
        smollm2.train(tmp_path / name, str(tmp_path / "model"), "sums", method, seed, 6)
    assert capsys.readouterr().out.count("train_ppo: wrote") == 2  # the second time there is nothing to do
    assert not [*tmp_path.glob("*/ppo*.pt")]
    results = smollm2.collect(tmp_path, runs)
    assert results.keys() == {"before", "group", "critic"} and len(results["group"][0]["curves"]["score"]) == 6
    assert results["before"][0]["samples"] == 45 and 0 <= results["critic"][0]["accuracy"] <= 1
    smollm2.print_table(results)
    assert "| group | " in (screen := capsys.readouterr().out) and "before  '" in screen
    smollm2.draw(results, str(tmp_path / "figure"))
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert json.loads((tmp_path / "group_0" / "data.jsonl").read_text().splitlines()[0])["prompt"][0]["role"] == "user"


@pytest.mark.slow
def test_the_command_writes_a_figure_and_its_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=1, n_head=2, n_embd=16, **LLAMA.kind))
    save_pretrained(model, get_tokenizer("bytes"), tmp_path / "model")
    config = smollm2.Config(model=str(tmp_path / "model"), task="steps", out_dir=str(tmp_path / "out"), seeds=1,
                            seeds_no_kl=0, critics=False, max_iters=6, workers=1, save=str(tmp_path / "figure"))
    results = smollm2.main(config)
    assert results.keys() == {"before", "group"} and results["before"][0]["questions"] == 130
    assert json.loads((tmp_path / "figure.json").read_text())["runs"] == json.loads(json.dumps(results))
    prompt = json.loads((tmp_path / "out" / "steps" / "group_0" / "data.jsonl").read_text().splitlines()[0])["prompt"]
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    assert "2/2  group_0 run" in capsys.readouterr().out
