"""Tests of looks at held-out prompts: --eval, the held-out score and KL, and samples.jsonl."""

import json
import math

import pytest
import torch

import data
import experience
from experience import HeldOut, RewardFunction
from support import distributed
from support.checkpoint import digest, load_checkpoint
from support.flags import UserError
from support.metrics import Metrics
from tiny import Config, metrics, pairs, reward_file, run, weights, write_jsonl

KEYS = "iter prompt response score kl tokens ended".split()


def eval_file(folder, body, rows=""):
    (folder / "judge.py").write_text(f"def g(prompts, responses{rows}):\n    return {body}\n")
    return f"{folder / 'judge.py'}:g"


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_reward_rises_while_the_evaluation_falls(world, tmp_path):
    """The case that --eval is there for: the policy learns what is paid for, and that is not what was wanted."""
    folder = world("ppo")
    write_jsonl(folder / "pairs.jsonl", [row for offset in range(0, 400, 40) for row in pairs(offset)])
    run("ppo", folder, max_iters=12, kl_coef=0.0, sample_interval=4, batch_size=48, minibatches=4, lr=1e-2,
        eos_penalty=0.0, reward=reward_file(tmp_path, "[len(r) for r in responses]"),
        eval=eval_file(tmp_path, "[-len(r) for r in responses]"))
    looks = [row for row in metrics(folder, "ppo") if "eval" in row]
    assert [row["iter"] for row in looks] == [1, 4, 8, 12]
    assert looks[-1]["score_heldout"] > looks[0]["score_heldout"] + 1 and looks[-1]["eval"] < looks[0]["eval"] - 1
    assert looks[0]["kl_heldout"] == 0 < 0.01 < looks[-1]["kl_heldout"]


def test_an_evaluation_by_hand(monkeypatch):
    """Mean and standard error over the prompts, each once, also where processes need more rows to get as many."""
    monkeypatch.setattr(distributed, "fill_up", lambda rows: rows + rows[:1])
    prompts = [data.Prompt([i], {"n": n}) for i, n in enumerate((1, 2, 6))]
    function = RewardFunction(lambda prompts, responses, rows: {"n": [row["n"] for row in rows],
                                                                "k": [1.0] * len(rows)}, "eval")
    made = experience.Experience.__new__(experience.Experience)
    made.device = "cpu"
    heldout = HeldOut(made, data.Split([], prompts, []), None, None, function)
    found = heldout.measure([{"prompt": "p", "response": "r", "score": s, "kl": s / 2} for s in (1.0, 2.0, 4.5)])
    expected = {"score_heldout": 2.5, "kl_heldout": 1.25, "eval": 4, "eval_n": 3, "eval_k": 1,
                "eval_se": math.sqrt((4 + 1 + 9) / 2 / 3)}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-6)
    heldout = HeldOut(made, data.Split([], prompts[:1], []), None, None, function)
    assert heldout.measure([{"prompt": "p", "response": "r", "score": 1.0, "kl": 0.0}])["eval_se"] is None


def test_looking_does_not_change_the_run(world, tmp_path):
    """Though an evaluation that takes rows sees two tasks in a held-out prompt that the file has with two answers."""
    plain, looked, rows = world("ppo"), world("ppo"), world("ppo")
    for folder in (plain, looked, rows):
        write_jsonl(folder / "pairs.jsonl", pairs() + [row | {"answer": 2} for row in pairs()])
    run("ppo", plain)
    run("ppo", looked, sample_interval=1, eval=eval_file(tmp_path, "[len(r) for r in responses]"))
    run("ppo", rows, eval=eval_file(tmp_path, "[row.get('answer', 1) for row in rows]", ", rows"))
    assert digest(weights(plain, "ppo")) == digest(weights(looked, "ppo")) == digest(weights(rows, "ppo"))
    assert metrics(rows, "ppo")[0]["eval"] == 1.5
    ours = [name for name in metrics(looked, "ppo")[0] if name.startswith("eval") or name.endswith("heldout")]
    assert metrics(plain, "ppo", *ours) == metrics(looked, "ppo", *ours)


@pytest.mark.parametrize("name", ["pairs", "atlas"])
def test_without_an_evaluation_the_heldout_score_and_kl_are_logged(name, world):
    folder = world("ppo", name)
    run("ppo", folder, max_iters=4, sample_interval=3)
    for row in metrics(folder, "ppo"):
        looked = row["iter"] in (1, 3, 4)
        assert ("score_heldout" in row) == ("kl_heldout" in row) == looked and "eval" not in row
        assert ("gold_heldout" in row) == (looked and name == "atlas")


def test_a_look_reads_a_capped_number_of_heldout_prompts(world, tmp_path, monkeypatch, capsys):
    """They are spread over those that are held out, and said on the screen."""
    monkeypatch.setattr(experience, "HELDOUT_PROMPTS", 3), monkeypatch.setattr(experience, "SHOWN_SAMPLES", 2)
    folder, names = world("ppo", "atlas"), tmp_path / "names.json"
    body = f"__import__('pathlib').Path({str(names)!r}).write_text(__import__('json').dumps(prompts)) and " \
           "[1.0] * len(prompts)"
    run("ppo", folder, max_iters=1, eval=eval_file(tmp_path, body))
    heldout = data.atlas.prompts("heldout")
    assert json.loads(names.read_text()) == [heldout[0], heldout[len(heldout) // 3], heldout[2 * len(heldout) // 3]]
    assert "; a look at held-out prompts samples 3 of them" in capsys.readouterr().out
    assert [row["prompt"] for row in samples(folder)] == [heldout[0], heldout[len(heldout) // 3]]


def test_the_screen_shows_each_evaluation_and_its_error(world, tmp_path, capsys):
    """Whatever log_interval says of that iteration."""
    run("ppo", world("ppo"), sample_interval=2, log_interval=100, eval=eval_file(tmp_path, "[-0.25] * len(responses)"))
    assert capsys.readouterr().out.count("  eval -0.250  se 0.000\n") == 3


def test_an_evaluation_needs_heldout_prompts(world, tmp_path):
    """That is said before anything is trained. Without --eval such a file is fine, and shows samples."""
    folder = world("sft")
    write_jsonl(folder / "pairs.jsonl", pairs()[:1])
    with pytest.raises(UserError, match="--eval is measured on held-out prompts, and .*pairs.jsonl has none: give two"):
        run("ppo", folder, eval=eval_file(tmp_path, "[1] * len(prompts)"))
    assert not (folder / "sft.pt").exists()
    folder = world("ppo")
    write_jsonl(folder / "pairs.jsonl", pairs()[:1])
    run("ppo", folder, max_iters=1)
    assert len(samples(folder)) == 1 and "score_heldout" not in metrics(folder, "ppo")[0]


def test_the_reward_model_is_no_evaluation(world):
    with pytest.raises(UserError, match="--eval=rm: the reward model's score on held-out prompts is always logged"):
        run("ppo", world("ppo"), eval="rm")


def test_a_resumed_run_may_be_evaluated_in_another_way(world, tmp_path):
    folder = world("ppo")
    for n, body in enumerate((None, "[1.5] * len(prompts)", "[2.5] * len(prompts)"), 1):
        run("ppo", folder, max_iters=n, resume=n > 1, eval=body and eval_file(tmp_path, body))
    assert [row.get("eval") for row in metrics(folder, "ppo")] == [None, 1.5, 2.5]


def test_an_error_of_the_evaluation_ends_the_run_and_loses_no_iteration(world, tmp_path):
    """It is a part of what was asked for. The mended function goes on from there, and the run is the same."""
    folder, whole = world("ppo"), world("ppo")
    body = "CALLS = []\ndef g(prompts, responses):\n    CALLS.append(1)\n    return [{}] * len(prompts)\n"
    (tmp_path / "judge.py").write_text(body.format("float('nan') if len(CALLS) > 1 else 1.0"))
    with pytest.raises(UserError, match=r"^the eval function g returned nan for the prompt '.*' and the response '.*': "
                                        "it must be a finite number$"):
        run("ppo", folder, eval=f"{tmp_path / 'judge.py'}:g", sample_interval=2, max_iters=4)
    assert load_checkpoint(folder / "ppo.pt", "ppo")["iter"] == 1
    (tmp_path / "judge.py").write_text(body.format(1.0))
    for place, resume in ((folder, True), (whole, False)):
        run("ppo", place, eval=f"{tmp_path / 'judge.py'}:g", sample_interval=2, max_iters=4, resume=resume)
    assert metrics(folder, "ppo") == metrics(whole, "ppo") and samples(folder) == samples(whole)


# ---------------------------------------------------------------------------------------------------------------------
# samples.jsonl

def test_samples_hold_what_was_sampled_and_how_it_scored(world, tmp_path):
    folder = world("ppo")
    (tmp_path / "reward.py").write_text("def f(prompts, responses):\n    return {'long': list(map(len, responses)), "
                                        "'one': [1] * len(prompts)}\n")
    run("ppo", folder, sample_interval=2, reward=f"{tmp_path / 'reward.py'}:f")
    rows, encoding = samples(folder), data.get_tokenizer("bytes")
    heldout = data.load_prompts(folder / "pairs.jsonl", encoding, 64, 8).heldout
    assert [row["iter"] for row in rows] == [1] * len(heldout) + [2] * len(heldout) + [3] * len(heldout)
    for row in rows:
        assert [*row] == [*KEYS, "reward_long", "reward_one"]
        assert row["score"] == row["reward_long"] + row["reward_one"] == len(row["response"]) + 1
        assert [*row["prompt"].encode()] in heldout and 1 <= row["tokens"] <= 8
        assert row["ended"] or row["tokens"] == 8
        assert (row["kl"] == 0) == (row["iter"] == 1)
    last = metrics(folder, "ppo")[-1]
    assert last["score_heldout"] == pytest.approx(sum(row["score"] for row in rows[-2:]) / 2)
    assert last["kl_heldout"] == pytest.approx(sum(row["kl"] for row in rows[-2:]) / 2)


def test_samples_are_resumed_and_replaced_as_the_metrics_are(world):
    whole, parts, flags = world("ppo"), world("ppo"), {"sample_interval": 1}
    run("ppo", whole, max_iters=5, **flags)
    run("ppo", parts, max_iters=2, **flags)
    with open(parts / "samples.jsonl", "a") as file:  # of iterations that no checkpoint has, and a line half written
        file.write('{"iter": 3, "prompt": "p"}\n{"iter": 9}\n{"iter": 4, "pro')
    run("ppo", parts, max_iters=5, resume=True, **flags)
    assert samples(parts) == samples(whole) and {row["iter"] for row in samples(whole)} == {1, 2, 3, 4, 5}
    run("ppo", parts, max_iters=1, overwrite=True, seed=1)
    assert {row["iter"] for row in samples(parts)} == {1} and samples(parts) != samples(whole)[:len(samples(parts))]
    run("sft", parts, overwrite=True)
    assert samples(parts)  # they are of another stage


def test_a_stage_without_samples_makes_no_file(tmp_path):
    Metrics(Config(out_dir=str(tmp_path), max_iters=1), "ppo").write(1, {"loss": torch.tensor(1.0)})
    assert not (tmp_path / "samples.jsonl").exists()
