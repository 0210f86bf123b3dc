"""Tests of the house: who imports whom, how long things may be, and that --help shows a script's own flags first."""

import ast
import re
from dataclasses import fields

import pytest

import sample
import train_ppo
import train_rm
import train_sft
from paths import ROOT
from support.flags import describe_flags, parse_flags

PURE, SUPPORT = {"atlas", "model", "ppo"}, {path.stem for path in ROOT.glob("support/*.py")}
ROOFS = ("train_sft", "train_rm", "train_ppo", "sample")
# What each part may import of ours; the roofs, tools/ and experiments/ may import everything below them.
ALLOWED = {name: set() for name in PURE} | {
    "tokenizer": {"atlas", "support"}, "data": {"atlas", "tokenizer"}, "pretrained": {"model", "tokenizer", "support"},
    "reward_model": {"model"}, "rollout": {"model"}, "experience": {"rollout", "data", "tokenizer", "support"},
    "support": {"model", "ppo", "data", "tokenizer", "pretrained", "reward_model", "support"}}


def imports_of(path):
    """First parts of the names of our own modules that a file imports."""
    names = {path.stem for path in ROOT.glob("*.py")} | {"support", "tools", "experiments"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & names


@pytest.mark.parametrize("part, allowed", ALLOWED.items())
def test_imports_point_one_way(part, allowed):
    for path in [ROOT / f"{part}.py"] if part != "support" else ROOT.glob("support/*.py"):
        assert imports_of(path) <= allowed, path


@pytest.mark.parametrize("leaf", ["tokenizer_file", "weights"])
def test_what_the_concepts_import_from_support_imports_nothing_of_ours(leaf):
    assert not imports_of(ROOT / f"support/{leaf}.py")
    for name in ("tokenizer", "pretrained"):
        text = (ROOT / f"{name}.py").read_text()
        assert set(re.findall(r"^from support\.(\w+) import", text, re.MULTILINE)) <= {"tokenizer_file", "weights"}


def test_no_cycle_inside_support():
    def imports(name, module):
        text = (ROOT / f"support/{name}.py").read_text()
        return re.search(rf"^from support(\.{module} import| import .*\b{module}\b)", text, re.MULTILINE)

    below = {name: {module for module in SUPPORT if imports(name, module)} for name in SUPPORT}
    while below:
        leaves = {name for name, others in below.items() if not others}
        assert leaves, f"a cycle among {sorted(below)}"
        below = {name: others - leaves for name, others in below.items() if name not in leaves}


@pytest.mark.parametrize("roof", ROOFS)
def test_nothing_below_imports_a_roof(roof):
    below = [path for path in ROOT.glob("*.py") if path.stem not in ROOFS] + [*ROOT.glob("support/*.py")]
    assert not [path.name for path in below if roof in imports_of(path)]


@pytest.mark.parametrize("file, lines", [("model.py", 350), ("pretrained.py", 300), ("tokenizer.py", 320)])
def test_the_models_stay_short(file, lines):
    assert len((ROOT / file).read_text().splitlines()) <= lines


def test_the_loop_stays_short_and_calls_the_algorithm_by_name():
    text = (ROOT / "train_ppo.py").read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert len(text.splitlines()) <= 300
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110
    places = [text.index(f" {name}(") for name in ("shape_rewards", "gae", "whiten", "policy_loss", "value_loss")]
    assert places == sorted(places)
    assert re.findall(r"^ +# -- (\d) ", text, re.MULTILINE) == ["1", "2", "3", "4", "5"]


def test_no_name_of_a_test_is_longer_than_70_characters():
    for path in ROOT.glob("tests/**/test_*.py"):
        assert not [name for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE) if len(name) > 70]


def test_no_line_of_code_is_longer_than_120_characters():
    folders = ("support", "tools", "experiments", "examples", "tests")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))]:
        lines = enumerate(path.read_text("utf-8").split("\n"), 1)
        assert not [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if len(line) > 120]


@pytest.mark.parametrize("script", [train_sft, train_rm, train_ppo, sample], ids=lambda module: module.__name__)
def test_help_shows_the_scripts_own_flags_first_under_headings(script, capsys):
    with pytest.raises(SystemExit):
        parse_flags(script.Config, ["--help"])
    listing = capsys.readouterr().out.split("show this help message")[1]
    shown = re.findall(r"^  --(\w+)", listing, re.MULTILINE)
    here = list(script.Config.__annotations__)
    assert shown[:len(here)] == here and len(shown) == len(set(shown)) == len(fields(script.Config))
    for heading, names in describe_flags(script.Config)[1]:
        assert f"\n{heading or 'flags'}:\n" in listing and names


def test_the_guide_for_contributors_is_short_and_names_what_exists():
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    named = re.findall(r"`(?:bash )?((?:[\w.]+/)*[\w.]+(?:/|\.py|\.md|\.txt|/run))`", text)
    assert len(named) > 20 and not [name for name in named if not (ROOT / name).exists()]
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)


def test_ci_runs_the_script_that_a_person_can_run():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    assert "run: bash .ci/run\n" in workflow and (ROOT / ".ci/run").exists()


def test_the_citation_has_the_fields_that_its_format_requires():
    keys = re.findall(r"^([\w-]+):", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {"cff-version", "message", "title", "authors"} <= set(keys)
