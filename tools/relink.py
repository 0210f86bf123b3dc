"""
Corrects the line numbers of the links from README.md and docs/ into the code.

    python -m tools.relink                                after you moved code

Such a link is [`text`](path.py#L123), and its text must occur in that line. The text is the key: the number becomes
that of the line which holds it, or of the one nearest to the old number if several lines do. A link whose text is in no
line is listed on stderr and stays as it is. The exit code is then 2, because only you can say where it should point.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[`([^`\n]+)`\]\(([\w./]+\.py)#L(\d+)\)")  # text, file, line


def pages(root):
    return [root / "README.md", *sorted(root.glob("docs/**/*.md"))]


def nearest(text, path, number):
    """The number of the line of `path` that holds the text and is nearest to the old number; None if no line does."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return min((n for n, line in enumerate(lines, 1) if text in line), key=lambda n: abs(n - number), default=None)


def relink(root):
    """Rewrites the pages under `root`. Returns the count of moved numbers and a sentence for each text not found."""
    moved, missing = 0, []
    for page in pages(root):
        def rewrite(link):
            nonlocal moved
            text, file, old = link[1], link[2], int(link[3])
            new = nearest(text, page.parent / file, old)
            if new is None:
                missing.append(f"{page.relative_to(root)}: no line of {file} holds `{text}`.")
                return link[0]
            moved += new != old
            return f"[`{text}`]({file}#L{new})"

        before = page.read_bytes().decode()
        after = LINK.sub(rewrite, before)
        if after != before:
            page.write_bytes(after.encode())
    return moved, missing


def main(root=ROOT):
    moved, missing = relink(root)
    print(f"{moved} line numbers corrected" if moved else "no line number to correct")
    for sentence in missing:
        print(sentence, file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
