"""The site: what Sphinx makes of the pages that are read on GitHub too, and of the docstrings. `make docs` builds it.

The repository's folder is the source folder, so that the links between its pages, and to its pictures and files, lead
to the same places on both.
"""

import re
import sys
from pathlib import Path

from docutils import nodes

from childtune_fast import __version__

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

project = "childtune_fast"
author = "The childtune_fast maintainers"
copyright = f"{author}, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "links", "notebooks"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/**.md", "examples/*.md", "examples/*.ipynb"]
exclude_patterns = [".*", "build", "childtune_fast*", "csrc", "findings", "tests", "docs/site/contents.md"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "notebook"}
myst_heading_anchors = 4  # as GitHub names them, so that links to headings are checked

# Docstrings are Google's style, with code between single backticks, which is a link where there is such a name.
default_role = "py:obj"
smartquotes_action = "D"  # dashes alone: the quotes are those of strings
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_typehints = "none"  # ten typed arguments would fill a page, and "Args" says what they are
autodoc_member_order = "bysource"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # most code in docstrings is no name

html_theme = "furo"
html_title = f"childtune_fast {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def add_contents(app, docname, source):
    """Ends the front page, which is README, with the tree of all pages."""
    if docname == root_doc:
        source[0] += "\n" + (HERE / "contents.md").read_text(encoding="utf-8")


def mark_code(app, what, name, of, options, lines):
    """Marks what is indented below a line of prose as code, as which it is meant in docstrings."""
    text = re.sub(r"^((?! |:|\.\.).+)\n\n(?=    )", r"\1\n\n::\n\n", "\n".join(lines), flags=re.MULTILINE)
    lines[:] = text.split("\n")


def leave_out_of_search(app, doctree):
    """Leaves reports out of the search: their tables name everything, and would stand before the pages that explain."""
    if app.env.docname.startswith("benchmarks/results/"):
        for section in doctree.findall(nodes.section):
            section["classes"].append("no-search")


def write_front_page(app, error):
    """Copies the front page to where servers look for it."""
    if not error:
        page = Path(app.outdir, f"{root_doc}.html")
        page.with_name("index.html").write_bytes(page.read_bytes())


def setup(app):
    """Adds what Sphinx does not do by itself."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", mark_code)
    app.connect("doctree-read", leave_out_of_search)
    app.connect("build-finished", write_front_page)
