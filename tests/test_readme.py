"""Tests of README.md and docs/: they must not say what the code no longer does."""

import re
from dataclasses import fields
from importlib import import_module

import pytest

import sample
import train_ppo
import train_rm
import train_sft
from experiments import rungs
from paths import ROOT
from support.metrics import HEALTH
from tools.relink import LINK

TEXT = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
LINES = [(page, *link) for page, text in PAGES.items()
         for link in LINK.findall(text)]
FILES = sorted({(page, target) for page, text in PAGES.items()
                for target in re.findall(r"\]\((?!http|\.\./\.\./actions/)([^)#\s]+)", text)})  # actions: GitHub's own
THEOREMS = set(re.findall(r"^def test_t(\d\d)", (ROOT / "tests/core/test_theorems.py").read_text(), re.MULTILINE))
SCRIPTS = {"train_sft.py": train_sft, "train_rm.py": train_rm, "train_ppo.py": train_ppo, "sample.py": sample} | {
    f"-m {path.parent.name}.{path.stem}": import_module(f"{path.parent.name}.{path.stem}")
    for folder in ("experiments", "tools") for path in sorted((ROOT / folder).glob("*.py"))
    if "class Config" in path.read_text()}


@pytest.mark.parametrize("page, quoted, file, line", LINES)
def test_a_link_to_a_line_points_at_what_it_quotes(page, quoted, file, line):
    lines = ((ROOT / page).parent / file).read_text().splitlines()
    assert quoted in (lines[int(line) - 1] if int(line) <= len(lines) else ""), "run `python -m tools.relink`"


@pytest.mark.parametrize("page, target", FILES)
def test_a_link_to_a_file_has_its_file(page, target):
    assert ((ROOT / page).parent / target).exists()


def test_the_derivation_cites_every_theorem_test_and_no_other():
    cited = re.findall(r"\bT(\d+)\b", PAGES["docs/derivation.md"])
    assert {f"{int(number):02}" for number in cited} == THEOREMS


def test_every_section_on_reliability_names_test_files_that_exist():
    sections = [part for part in PAGES["docs/reliability.md"].split("\n## ")[1:] if "| fault |" in part]
    assert len(sections) == 6
    for section in sections:
        named = re.findall(r"`(test_\w+\.py)`", section.partition("\nTests: ")[2])
        assert named, section
        for file in named:
            assert [*ROOT.glob(f"tests/**/{file}")], file


COMMAND = re.compile(rf"^(?:.*&& |  )?(?:python|torchrun --\S+) ({'|'.join(map(re.escape, SCRIPTS))})(?![\w.])"
                     r"((?:\\\n|[^#\n])*)", re.MULTILINE)
COMMANDS = [command for text in PAGES.values() for command in COMMAND.findall(text)]


@pytest.mark.parametrize("script, rest", COMMANDS)
def test_every_flag_of_a_command_exists(script, rest):
    # with --objective, the ladder's flags are those of rungs.py; others are of the whole ladder
    module = rungs if "--objective" in rest else SCRIPTS[script]
    known = {field.name for field in fields(module.Config)}
    assert set(re.findall(r"--(\w+)", rest)) <= known


def test_every_metric_of_a_ppo_iteration_is_explained():
    table = PAGES["docs/metrics.md"]
    metrics = ("score kl reward entropy policy_loss value_loss approx_kl clip_frac ratio_mean ratio_max "
               "explained_variance response_len eos_rate kl_coef lr grad_norm sec_rollout sec_score sec_update "
               "tokens_per_s ratio_first logprob_gap logprob_gap_max skipped_steps gold gold_heldout utility "
               "penalty reward_<part> score_heldout kl_heldout eval eval_se eval_<part>").split()
    assert not [name for name in metrics if f"`{name}`" not in table]


@pytest.mark.parametrize("metric, bound", [(rule.metric, bound) for rule in HEALTH for bound in (rule.low, rule.high)
                                           if isinstance(bound, float) and bound])
def test_the_page_names_the_bound_of_each_warning(metric, bound):
    rows = [line.split(" | ") for line in PAGES["docs/metrics.md"].splitlines() if line.startswith("| ")]
    row, = [cells[-1] for cells in rows if f"`{metric}`" in cells[0]]
    assert re.search(rf"\*\*warns\*\*[^;]* {bound:g}\b", row)


def test_the_map_names_every_file():
    listed = set(re.findall(r"^([\w/]+\.py) ", TEXT, re.MULTILINE))
    ours = {path.name for path in ROOT.glob("*.py")} - {"my_reward.py"}  # which README has you write
    assert ours <= listed
