"""Tests of tools/formulas.py: which text is a formula, and what a broken one gives."""

import subprocess

import pytest

from tools import formulas

PAGE = """# A page

Inline $`a_0`$ and $`b`$, and $c + d$; $$e$$ is displayed. `$h$` and `$PATH` are code, $5 and $6 are money.

```math
f = g
\\tag{1}
```

```sh
echo $h $i$
```
"""


def test_formulas_are_found_with_their_lines_and_code_is_none():
    assert formulas.formulas(PAGE) == [(3, "a_0", False), (3, "b", False), (3, "c + d", False), (3, "e", True),
                                       (5, "f = g\n\\tag{1}\n", True)]


@pytest.mark.parametrize("error, said", [(FileNotFoundError("node"), "node is missing"),
                                         (subprocess.CalledProcessError(1, "node"), "npm install")])
def test_without_node_or_katex_it_says_that_nothing_was_checked(error, said, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(subprocess, "run", fail)
    assert formulas.main() == 2 and said in capsys.readouterr().err


def test_a_broken_formula_is_named_by_page_and_line(tmp_path, capsys):
    try:
        assert formulas.render([["x", False], ["\\frac{1}", False]])[0][0] == 1
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs node and katex")
    (tmp_path / "README.md").write_text("$`x^2`$\n\n$`\\nosuchcommand`$\n")
    assert formulas.main(tmp_path) == 1
    said = capsys.readouterr()
    assert said.out == "1 of 2 formulas render\n" and said.err.startswith("README.md:3: ")


def test_every_formula_of_the_docs_renders():
    try:
        formulas.render([])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs node and katex")
    assert formulas.main() == 0
