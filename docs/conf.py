"""How Sphinx builds the documentation."""

import importlib.metadata

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
napoleon_google_docstring = False
napoleon_use_ivar = True
