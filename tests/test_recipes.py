"""Tests of docs/recipes: each patch applies to train_ppo.py, trains, and does what it says."""

import shutil
import subprocess
import sys

import pytest

from paths import ROOT
from tiny import TINY, metrics

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.patch"))


def patched(recipe, folder):
    """A copy of the project's code with a recipe applied to it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "docs", "tests", ".*", "__pycache__"))
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_changes_at_most_ten_lines_and_applies(recipe, tmp_path):
    lines = recipe.read_text().splitlines()
    assert 1 <= sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in lines if line) <= 10
    code = patched(recipe, tmp_path / "code")
    compile((code / "train_ppo.py").read_text(), "train_ppo.py", "exec")
    assert (code / "train_ppo.py").read_text() != (ROOT / "train_ppo.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, world, tmp_path):
    rows = trained(patched(recipe, tmp_path / "code"), world("ppo"))
    assert [row["iter"] for row in rows] == [1, 2, 3]
    if recipe.stem == "critic_warmup":  # the policy has not moved, and the critic has
        assert [row["kl"] for row in rows] == [0.0] * 3 and rows[0]["value_loss"] != rows[1]["value_loss"]
    if recipe.stem == "lam_value":
        plain = trained(ROOT, world("ppo"))
        assert rows[0]["policy_loss"] == plain[0]["policy_loss"] and rows[0]["value_loss"] != plain[0]["value_loss"]
