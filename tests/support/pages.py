"""Python code in pages of the documentation, which tests run."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def codes(page, heading=None):
    """The blocks of Python code of a page of docs/, or of a section of it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading is not None:
        text = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(page, heading, **names):
    """Runs the only block under a heading with these names, and returns all names."""
    (code,) = codes(page, heading)
    exec(code, names)
    return names
