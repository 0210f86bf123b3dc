"""Tests of docs/exercises.md: each exercise breaks one line of the code, and the test that it names goes red."""

import re
import shutil
import subprocess
import sys

import pytest

from paths import ROOT

PAGE = (ROOT / "docs/exercises.md").read_text()
HEADINGS = re.findall(r"^## \d+\. .*$", PAGE, re.MULTILINE)
# number, file, old line, new line, pytest's name of the test
EXERCISES = re.findall(r"^## (\d+)\. [^`]*?^```diff\n--- (\w+\.py)\n-(.*)\n\+(.*)\n```\n[^#]*?"
                       r"^python -m pytest (\S+)\n```\n\n<details><summary>Answer</summary>\n", PAGE, re.MULTILINE)
EACH = pytest.mark.parametrize("number, file, old, new, test", EXERCISES, ids=[row[0] for row in EXERCISES])


def copied(folder):
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache"))


def pytest_in(code, *tests):
    """(exit code, output): 0 if all passed, 1 if a test failed, more if something else went wrong."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cwd=code,
                         capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_there_are_fifteen_exercises_in_order():
    assert [int(row[0]) for row in EXERCISES] == list(range(1, 16)) and len(HEADINGS) == 15


@EACH
def test_an_exercise_has_its_line_and_its_test(number, file, old, new, test):
    lines = (ROOT / file).read_text().splitlines()
    assert lines.count(old) == 1 and new not in lines
    compile("\n".join(new if line == old else line for line in lines), file, "exec")
    path, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text()


@pytest.mark.slow
def test_the_tests_of_all_exercises_pass_on_the_code_as_it_is(tmp_path):
    code, output = pytest_in(copied(tmp_path / "code"), *(row[4] for row in EXERCISES))
    assert code == 0, output


@pytest.mark.slow
@EACH
def test_a_broken_line_turns_its_test_red(number, file, old, new, test, tmp_path):
    folder = copied(tmp_path / "code")
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(f"{old}\n", f"{new}\n"))
    code, output = pytest_in(folder, test)
    assert code == 1 and f"FAILED {test}" in output, output
