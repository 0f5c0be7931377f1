"""Sphinx's settings. ``python -m tests.site`` builds the site (see CONTRIBUTING.md)."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mtprune"
author = "the authors of mtprune"
copyright = author
version = release = version_of("mtprune")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "names",
    "mathml",
]
exclude_patterns = ["_ext", "LICENSE"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

# Pages.
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_ambiguous"]

# The reference.
nitpicky = True
# Left as text: types of other libraries, for whose names a network would be needed; those that
# users do not meet; type variables.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|optim|transformers|lightning|matplotlib|Module)\b.*"),
    (r"py:.*", r"(collections|typing|types|pathlib|os|enum|fractions|abc)\b.*"),
    (r"py:.*", r"mtprune\.(model|observing|census|facts|reading)\..*"),
    (r"py:.*", r"mtprune\.(affinity|compression|holding|selection)\.\w+\..*"),
    (r"py:.*", r"mtprune\.[\w.]+\._\w+"),
    (r"py:.*", r"(mtprune\.[\w.]+\.)?[A-Z]"),
    (r"py:.*", r"Drawn"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
default_role = "name"
toc_object_entries_show_parents = "hide"

# The look.
html_theme = "furo"
html_title = "mtprune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_theme_options = {"navigation_with_keys": True}
