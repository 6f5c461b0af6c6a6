"""Links from pages of the site to files that are none: into the repository, or else to a copy of the file."""

import os
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.transforms import SphinxTransform


class Outside(SphinxTransform):
    """Turns links to files and folders into links to the repository, whose address CHILDTUNE_REPOSITORY has.

    Without an address, a link to a file leads to a copy of it, as Sphinx does it, and one to a folder is text.
    """

    default_priority = 5

    def apply(self, **kwargs):
        """Changes the links of a page."""
        root = Path(self.app.srcdir)
        for node in list(self.document.findall(lambda node: isinstance(node, (download_reference, pending_xref)))):
            path = (root / self.env.docname).parent.joinpath(node.get("reftarget", "")).resolve()
            folder = isinstance(node, pending_xref) and node.get("reftype") == "myst" and path.is_dir()
            if self.config.repository and (folder or isinstance(node, download_reference)):
                kind = "tree" if folder else "blob"
                address = f"{self.config.repository}/{kind}/main/{path.relative_to(root).as_posix()}"
                node.replace_self(nodes.reference("", "", *node.children, refuri=address))
            elif folder:
                node.replace_self(node.children)


def setup(app):
    """Adds the transform, and the address, which the release workflow knows."""
    app.add_config_value("repository", os.environ.get("CHILDTUNE_REPOSITORY", ""), "env")
    app.add_transform(Outside)
