"""Tests of --reward: a user's function gets texts, its wrong results and exceptions name the prompt."""

import json
import math

import pytest

from reward_model import RewardModel
from support.flags import UserError
from tiny import pairs, reward_file, run, write_jsonl


def test_the_reward_function_gets_texts_without_eos(world, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import json, pathlib\n"
        "def f(prompts, responses):\n"
        "    assert isinstance(prompts, list) and isinstance(responses, list)\n"
        "    file = pathlib.Path(__file__).with_name(f'{len(prompts)}.json')\n"
        "    file.write_text(json.dumps([prompts, responses]))\n"
        "    return [1] * len(prompts)\n")
    run("ppo", world("ppo"), max_iters=1, reward=f"{tmp_path / 'reward.py'}:f")
    # a rollout, and not a look at held-out rows
    prompts, responses = json.loads((tmp_path / "12.json").read_text())
    assert len(prompts) == len(responses) == 12
    assert set(prompts) <= {row["prompt"] for row in pairs()}
    assert all(isinstance(response, str) and "<|" not in response for response in responses)


@pytest.mark.parametrize("body, says", [
    ("[0.0] * (len(responses) - 1)", "returned 11 for 12 responses"),
    ("[float('nan')] * len(responses)", r"returned nan for the prompt '\w+ or "),
    ("[float('inf')] * len(responses)", r"returned inf for the prompt '\w+ or "),
    ("['1'] * len(responses)", r"returned '1' for the prompt '\w+ or "),
    ("[None] * len(responses)", r"returned None for the prompt '\w+ or ")])
def test_what_the_reward_function_may_not_return(body, says, world, tmp_path):
    with pytest.raises(UserError, match=says):
        run("ppo", world("ppo"), max_iters=1, reward=reward_file(tmp_path, body))


def test_an_exception_of_the_reward_function_comes_with_the_prompt(world, tmp_path):
    """The traceback points into the user's file, as no sentence of ours could. The prompt is the one at fault."""
    body = "[float('?' in prompt or {}['mine']) for prompt in prompts]"
    folder = world("ppo")
    rows = pairs()
    rows[7]["prompt"] = "no question mark"
    write_jsonl(folder / "pairs.jsonl", rows)
    with pytest.raises(RuntimeError, match=r"raised KeyError\('mine'\) for the prompt 'no question mark' and the "
                                           "response '") as raised:
        run("ppo", folder, batch_size=48, minibatches=2, reward=reward_file(tmp_path, body))
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_filename.endswith("reward.py")


def test_a_reward_function_that_fails_on_a_batch_only(world, tmp_path):
    """The message then names the first prompt of the batch."""
    with pytest.raises(RuntimeError, match="for 12 responses at once and for none of them alone; the first "
                                           "prompt is '"):
        run("ppo", world("ppo"), reward=reward_file(tmp_path, "[1.0] if len(prompts) == 1 else 1 / 0"))


def test_a_score_that_is_not_finite_is_an_error_with_its_prompt(world, monkeypatch):
    """Averaged into the advantages it would reach every token of the rollout."""
    forward = RewardModel.forward

    def poisoned(self, tokens, lens):
        scores = forward(self, tokens, lens)
        scores[-1] = math.nan
        return scores
    monkeypatch.setattr(RewardModel, "forward", poisoned)
    folder = world("ppo")
    with pytest.raises(FloatingPointError, match=r"the reward model's score is nan for the prompt '\w+ or \w+\?' and"):
        run("ppo", folder)
    assert not (folder / "ppo.pt").exists()


def test_with_a_reward_function_no_reward_model_is_trained_or_read(world, reward_e):
    folder = world("rm")
    run("ppo", folder, max_iters=1, reward=reward_e, critic="separate")
    assert not (folder / "rm.pt").exists() and (folder / "ppo.pt").exists()
