"""
Renders every formula of README.md and docs/*.md with KaTeX, and lists those that fail.

    npm install --no-save katex && python -m tools.formulas

A formula is a ```math block, $`...`$, $$...$$ or $...$ outside of code. One that passes is well-formed TeX whose
commands KaTeX knows. GitHub itself uses MathJax. How a formula looks is not checked, nor what Markdown makes of the
text around it. Exit code: 0 if all render, 1 if one fails, 2 if node or katex is missing.
"""

import json
import re
import subprocess
import sys

from tools.relink import ROOT, pages

FORMULA = re.compile(r"^ *```math\n(.*?)^ *```|"                             # a block
                     r"^ *```.*?^ *```|(?<![`$])`[^`\n]+`(?![`$])|"          # code, in which a dollar is a dollar
                     r"\$`([^`]+)`\$|\$\$(.+?)\$\$|"                     # $`...`$, whose inside Markdown leaves alone
                     r"(?<![\w$])\$(?=\S)([^$`\n]+)(?<=\S)\$(?![\w$])",  # $...$; "$5 and $6" is money
                     re.DOTALL | re.MULTILINE)
RENDER = """
const katex = require("katex"), failed = [];
JSON.parse(require("fs").readFileSync(0, "utf8")).forEach(([tex, displayMode], i) => {
  try { katex.renderToString(tex, {displayMode, strict: "error"}); } catch (error) { failed.push([i, error.message]); }
});
console.log(JSON.stringify(failed));
"""


def formulas(text):
    """[(line, TeX, whether it is displayed)] of a page."""
    found = [(text.count("\n", 0, m.start()) + 1, *m.groups()) for m in FORMULA.finditer(text)]
    return [(line, block or double or inline or single, bool(block or double))
            for line, block, inline, double, single in found if block or inline or double or single]


def render(texts):
    """[(index, error)] of each (TeX, displayed) that KaTeX refuses. OSError: no node; CalledProcessError: no katex."""
    node = subprocess.run(["node", "-e", RENDER], input=json.dumps(texts), capture_output=True, text=True, check=True)
    return json.loads(node.stdout)


def main(root=ROOT):
    found = [(page.relative_to(root), *formula) for page in pages(root) for formula in formulas(page.read_text())]
    try:
        failed = render([formula[2:] for formula in found])
    except (OSError, subprocess.CalledProcessError) as error:
        reason = "node is missing" if isinstance(error, OSError) else "node finds no katex: npm install --no-save katex"
        print(f"formulas: nothing was checked, because {reason}", file=sys.stderr)
        return 2
    for i, error in failed:
        print(f"{found[i][0]}:{found[i][1]}: {error}", file=sys.stderr)
    print(f"{len(found) - len(failed)} of {len(found)} formulas render")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
