"""The documentation site: ``make docs``. Nothing is fetched, neither while it is built nor by its pages."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402

pages.write(DOCS / "made")

project = "fusionlab"
extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fusionlab"
html_show_sphinx = False
nitpicky = True
