"""Tests of tools/relink.py on a folder with a README, a page and a file of code."""

import pytest

from tools import relink

CODE = "import torch\n\n\ndef first(x):\n    return x\n\n\ndef second(x):\n    return first(x)\n"


@pytest.fixture
def write(tmp_path):
    """write(readme, page) makes the pages of tmp_path and returns it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text(CODE)

    def write(readme="", page=""):
        (tmp_path / "README.md").write_bytes(readme.encode())
        (tmp_path / "docs/page.md").write_bytes(page.encode())
        return tmp_path

    return write


def test_a_number_follows_its_text(write, capsys):
    root = write("See [`def second`](code.py#L2).\n", "[`def first`](../code.py#L90), [`def second`](../code.py#L8)\n")
    assert relink.main(root) == 0
    assert (root / "README.md").read_text() == "See [`def second`](code.py#L8).\n"
    assert (root / "docs/page.md").read_text() == "[`def first`](../code.py#L4), [`def second`](../code.py#L8)\n"
    assert capsys.readouterr().out == "2 line numbers corrected\n"


@pytest.mark.parametrize("old, new", [(1, 4), (6, 4), (7, 9), (50, 9)])
def test_the_nearest_of_several_lines_is_taken(write, old, new):
    root = write(f"[`first(`](code.py#L{old})")
    assert relink.main(root) == 0
    assert (root / "README.md").read_text() == f"[`first(`](code.py#L{new})"


@pytest.mark.parametrize("link, file", [("[`def third`](../code.py#L5)", "code.py"),
                                        ("[`def first`](../gone.py#L4)", "gone.py")])
def test_missing_text_exits_2_and_the_rest_is_rewritten(write, capsys, link, file):
    root = write(page=f"{link} and [`def second`](../code.py#L1)\n")
    assert relink.main(root) == 2
    assert (root / "docs/page.md").read_text() == f"{link} and [`def second`](../code.py#L8)\n"
    error = capsys.readouterr().err.splitlines()
    assert error == [f"docs/page.md: no line of ../{file} holds {link[1:link.index(']')]}."]


def test_right_pages_stay_byte_for_byte(write, capsys):
    root = write("[`def first`](code.py#L4)\r\nno newline at the end: é", "[`return x`](../code.py#L5)\x0b\r\n")
    paths = [root / "README.md", root / "docs/page.md"]
    for path in paths:
        path.chmod(0o444)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert relink.main(root) == 0
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert capsys.readouterr().out == "no line number to correct\n"


def test_line_ends_of_a_page_survive_a_change(write):
    root = write("[`def first`](code.py#L1)\r\né\r\n")
    relink.main(root)
    assert (root / "README.md").read_bytes() == "[`def first`](code.py#L4)\r\né\r\n".encode()
