"""Notebooks as pages: their prose, their code and the outputs that they were stored with. Nothing is run."""

import json

from myst_parser.parsers.sphinx_ import MystParser

FENCE = "`" * 5


def fenced(text, language):
    """Returns a block of code, in Markdown."""
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def output(stored):
    """Returns an output of a cell in Markdown: a picture if there is one, or else its text."""
    data = stored.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return fenced("".join(stored.get("text", data.get("text/plain", ""))), "text")


def markdown(text):
    """Returns a notebook, which is JSON, as Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        parts += [output(stored) for stored in cell.get("outputs", [])]
    return "\n\n".join(parts)


class Parser(MystParser):
    """Parses a notebook as the page that it reads as."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        """Parses a notebook into the nodes of a page."""
        super().parse(markdown(inputstring), document)


def setup(app):
    """Adds the parser."""
    app.add_source_parser(Parser)
