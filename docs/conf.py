"""How Sphinx builds the documentation."""

import importlib.metadata
import re

project = "psnc"
author = copyright = "The psnc developers"
version = release = importlib.metadata.version("psnc")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "psnc"

# Pages refer to each other's headings, as Markdown viewers do.
myst_heading_anchors = 3

# The text has the types; the signature repeats no more than the names and defaults.
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
# The suite of stores is made of it; to describe the suite nothing has to run.
autodoc_mock_imports = ["pytest"]
napoleon_google_docstring = False
napoleon_use_ivar = True


# Names such as `psnc.Config` are plain code in the pages, which are read on GitHub too. Here they
# lead to the reference. Blocks of code, headings and the texts of links stay as they are.
_PUBLIC_NAME = re.compile(r"(?<![\[`])`(psnc\.[\w.]+)`(?!`)")
_BLOCK_OF_CODE = re.compile(r"(^```.*?^```$|^#.*?$)", re.DOTALL | re.MULTILINE)


def _link_names(app, name, source):
    parts = _BLOCK_OF_CODE.split(source[0])
    parts[::2] = [_PUBLIC_NAME.sub(r"{py:obj}`\1`", part) for part in parts[::2]]
    source[0] = "".join(parts)


def setup(app):
    """Have Sphinx call what is above."""
    app.connect("source-read", _link_names)
