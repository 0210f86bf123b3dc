"""Tests of docs/recipes: each patch applies to the code, trains, and does what it says."""

import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from paths import ROOT
from ppo import masked_mean
from support.checkpoint import save_checkpoint
from tiny import TINY, metrics, reward_file

FOLDER = ROOT / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.patch"))
PAGE = (FOLDER / "README.md").read_text()
GROUPS = {"advantage": "group", "samples_per_prompt": 2}


def patched(recipe, folder):
    """A copy of the project's code with a recipe applied to it."""
    if not folder.exists():
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("out", "docs", "tests", ".*", "__pycache__"))
    applied = subprocess.run(["git", "apply", "--verbose", str(recipe)], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    return folder


def trained(code, folder, **flags):
    """The metrics of three iterations of PPO with the code of that folder."""
    flags = TINY["ppo"] | {"data": folder / "pairs.jsonl", "tokenizer": "bytes", "out_dir": folder,
                           "device": "cpu"} | flags
    run = subprocess.run([sys.executable, "train_ppo.py", *(f"--{name}={value}" for name, value in flags.items())],
                         cwd=code, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return metrics(folder, "ppo")


def changed(recipe):
    """The lines that a patch takes away or adds, with their signs."""
    return [line for line in recipe.read_text().splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]


def added(name):
    """The lines of code that a recipe adds, without indentation and comments."""
    lines = [line[1:].partition("#")[0].strip() for line in changed(FOLDER / f"{name}.patch") if line[0] == "+"]
    return [line for line in lines if line]


def ppo_with(name, folder):
    """The module ppo.py with a recipe applied to it."""
    path = patched(FOLDER / f"{name}.patch", folder / "code") / "ppo.py"
    spec = importlib.util.spec_from_file_location("patched_ppo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slope(ppo, ratio, advantage):
    """Minus the derivative of the policy's loss by the log-prob of one token whose ratio is given."""
    logprob = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    advantages, mask = torch.full_like(logprob, advantage), torch.ones_like(logprob, dtype=torch.bool)
    ppo.policy_loss(logprob, torch.zeros_like(logprob), advantages, mask, 0.2)[0].backward()
    return -logprob.grad.item()


# ---------------------------------------------------------------------------------------------------------------------
# all of them

@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_changes_at_most_ten_lines_and_applies(recipe, tmp_path):
    assert 1 <= len(changed(recipe)) <= 10
    code = patched(recipe, tmp_path / "code")
    files = [path.name for path in sorted(code.glob("*.py")) if path.read_text() != (ROOT / path.name).read_text()]
    assert files and set(files) <= {"train_ppo.py", "ppo.py", "experience.py"}
    for name in files:
        text = (code / name).read_text()
        compile(text, name, "exec")
        assert max(map(len, text.splitlines())) <= 120


def test_the_page_lists_every_recipe_once_and_no_other():
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1\.patch\)", PAGE, re.MULTILINE)) == [path.stem for path in RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, world, tmp_path):
    rows = trained(patched(recipe, tmp_path / "code"), world("ppo"), **GROUPS if recipe.stem == "group_std" else {})
    assert [row["iter"] for row in rows] == [1, 2, 3]
    if recipe.stem == "critic_warmup":  # the policy has not moved, and the critic has
        assert [row["kl"] for row in rows] == [0.0] * 3 and rows[0]["value_loss"] != rows[1]["value_loss"]
    if recipe.stem == "lam_value":
        plain = trained(ROOT, world("ppo"))
        assert rows[0]["policy_loss"] == plain[0]["policy_loss"] and rows[0]["value_loss"] != plain[0]["value_loss"]


@pytest.mark.parametrize("together", re.findall(r"\*\*[\w. ]+\*\*: ([^.\n]*)", PAGE))
def test_the_recipes_of_a_method_apply_together(together, tmp_path):
    names = re.findall(r"`(\w+)`", together)
    assert len(names) == 2
    for name in names:
        patched(FOLDER / f"{name}.patch", tmp_path / "code")


# ---------------------------------------------------------------------------------------------------------------------
# each of them

def test_clip_higher_moves_the_upper_clip_alone(tmp_path):
    ppo = ppo_with("clip_higher", tmp_path)
    assert slope(ppo, 1.27, 1.0) == pytest.approx(1.27) and slope(ppo, 1.29, 1.0) == 0
    assert slope(ppo, 0.81, -1.0) == pytest.approx(-0.81) and slope(ppo, 0.79, -1.0) == 0


def test_cispo_truncates_the_weight_and_no_token_loses_its_gradient(tmp_path):
    ppo = ppo_with("cispo", tmp_path)
    for ratio, weight in (0.1, 0.1), (1.0, 1.0), (1.19, 1.19), (1.3, 1.2), (5.0, 1.2):
        for advantage in 1.0, -2.0:
            assert slope(ppo, ratio, advantage) == pytest.approx(weight * advantage)


def test_group_std_gives_every_group_the_same_spread(tmp_path):
    scores, mask = torch.tensor([0.0, 1.0, 0.0, 10.0, 3.0, 3.0]), torch.ones(6, 2, dtype=torch.bool)
    near, far, none = ppo_with("group_std", tmp_path).group_advantages(scores, 2, mask)[:, 0].view(3, 2)
    assert torch.allclose(near, far, rtol=1e-3) and near[1] > 1 and not none.any()


@pytest.mark.parametrize("name", ["mean_per_response", "constant_normaliser"])
def test_the_recipes_of_a_mean_divide_by_what_they_name(name):
    """On one of two minibatches, in micro-batches of 3, in the loop's own names."""
    torch.manual_seed(0)
    lens, logprobs = torch.tensor([1, 5, 2, 8, 3, 4, 7, 6]), torch.randn(8, 8)
    mask, minibatch = torch.arange(8) < lens.unsqueeze(1), torch.arange(0, 8, 2)
    weights = torch.randn(8, 8) * mask
    state = {"config": SimpleNamespace(minibatches=2, max_new_tokens=8), "mask": mask, "B": 8, "advantages": weights}
    *once, last = added(name) if name == "mean_per_response" else ["\n".join(added(name))]
    for line in once:
        exec(line, state)
    loss = 0.0
    for rows in minibatch.split(3):
        fraction = mask[rows].sum() / mask[minibatch].sum()
        pg_loss = masked_mean(logprobs[rows] * state["advantages"][rows], mask[rows])
        exec(last, state | {"rows": rows, "token_fraction": fraction, "pg_loss": pg_loss}, result := {})
        loss = loss + result["pg_loss"] * fraction
    sums, divisor = (logprobs * weights).sum(1), lens if name == "mean_per_response" else 8
    assert torch.allclose(loss, (sums / divisor)[minibatch].mean())


def test_mean_per_response_is_the_two_lines_of_the_derivation():
    page = (ROOT / "docs/derivation.md").read_text()
    lines = re.findall(r"^(?:advantages|pg_loss) = .*$", page, re.MULTILINE)
    assert [line.partition("#")[0].strip() for line in lines] == added("mean_per_response")


def test_the_overlong_ramp_rises_from_four_fifths_of_the_limit_to_its_end():
    state = {"config": SimpleNamespace(max_new_tokens=20, eos_penalty=2.0), "scores": torch.ones(5),
             "rollout": SimpleNamespace(response_lens=torch.tensor([1, 16, 17, 18, 20]))}
    exec("\n".join(added("overlong_ramp")), state)
    assert state["final_rewards"].tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0, -1.0])


def test_token_reward_pays_at_each_token_that_repeats_the_one_before():
    tokens = torch.tensor([[7, 5, 5, 5, 0], [6, 6, 7, 7, 0], [5, 0, 0, 0, 0]])  # prompts of 1, 2, 1; EOS is 0
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    state = {"torch": torch, "tokens": tokens, "mask": mask, "R": 4, "prompt_lens": torch.tensor([1, 2, 1]),
             "rewards": torch.zeros(3, 4), "final_rewards": torch.ones(3)}
    exec("\n".join(added("token_reward")), state)
    expected = torch.tensor([[0, -0.1, -0.1, 0], [0, -0.1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(state["rewards"], expected)
    assert state["final_rewards"].tolist() == pytest.approx([0.8, 0.9, 1.0])


@pytest.mark.slow
def test_the_ensembles_score_is_the_lowest_of_its_reward_models(world, tmp_path):
    folder = world("ppo")
    saved = torch.load(folder / "rm.pt", weights_only=True)
    for name, shift in ("rm_1", 2.0), ("rm_2", -3.0):
        moved = saved | {"model": saved["model"] | {"bias": saved["model"]["bias"] + shift}}
        save_checkpoint(folder / f"{name}.pt", {key: value for key, value in moved.items() if key != "sha256"})
    rows = trained(patched(FOLDER / "reward_ensemble.patch", tmp_path / "code"), folder)
    plain = trained(ROOT, world("ppo"))
    assert rows[0]["score"] == pytest.approx(plain[0]["score"] - 3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_log_a_number_shows_how_scores_go_with_length(sign, world, tmp_path):
    code = patched(FOLDER / "log_a_number.patch", tmp_path / "code")
    reward = reward_file(tmp_path, f"[{sign} * float(len(response)) for response in responses]")
    rows = trained(code, world("ppo"), reward=reward)
    assert all(sign * row["length_corr"] > 0.7 for row in rows)
