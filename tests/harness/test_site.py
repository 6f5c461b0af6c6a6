"""The site's own pages, in docs/site: no public name, page or picture is missing there. `make docs` checks the rest."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs/site"
LINK = re.compile(r"!?\[[^]]*\]\(([^)#\s]+)")


def public_names():
    """What the modules of the package offer: the names of every `__all__`."""
    found = set()
    for path in sorted((ROOT / "childtune_fast").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found.update(ast.literal_eval(node.value))
    return found


def entries(page):
    """The pages in the trees of contents of a page: paths without suffix, from the root of the repository."""
    text = (SITE / page).read_text(encoding="utf-8")
    blocks = re.findall(
        r"^```\{toctree\}\n(.*?)^```|^\.\. toctree::\n((?: [^\n]*\n|\n)*)", text, re.MULTILINE | re.DOTALL
    )
    lines = [line.strip() for line in "\n".join(map("".join, blocks)).splitlines()]
    paths = [line.partition("<")[2].rstrip(">") or line for line in lines if line and not line.startswith(":")]
    folder = ROOT if page == "contents.md" else (SITE / page).parent  # it is read as the end of README
    return [(folder / path).resolve().relative_to(ROOT).as_posix() for path in paths]


def test_every_public_name_has_its_place():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (SITE / "api").glob("*.rst"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE)}
    names = public_names()
    assert len(names) > 15
    assert sorted(names - shown) == []


def test_every_page_is_in_the_contents():
    listed = entries("contents.md") + entries("results.md") + entries("api/index.rst")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *SITE.rglob("*.rst"), *(ROOT / "examples").glob("*.*")]
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in pages if path.suffix != ".py"}
    assert pages - set(listed) == {"README", "docs/site/contents"}  # the front page, and what is written below it


def test_the_gallery_has_every_picture_that_a_page_shows():
    gallery = SITE / "gallery.md"
    shown = set()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        links = LINK.findall(path.read_text(encoding="utf-8"))
        pictures = {(path.parent / link).resolve() for link in links if link.endswith((".png", ".svg"))}
        if path == gallery:
            assert all(picture.is_file() for picture in pictures)
            in_gallery = pictures
        shown |= pictures
    assert len(shown) > 5
    assert shown <= in_gallery
