"""Sphinx settings. Build with ``sphinx-build -W docs docs/_build/html``; no network is needed."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

# The gallery draws into files.
os.environ["MPLBACKEND"] = "Agg"

from skebm._version import __version__

project = "skebm"
author = "the skebm developers"
copyright = "2026, the skebm developers"
version = release = __version__

extensions = [
    "ideas",
    "inventories",
    "katex",
    "myst_parser",
    "numpydoc",
    "results",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst", "auto_examples/*.ipynb"]
templates_path = ["_templates"]
default_role = "literal"

html_math_renderer = "katex"

# What is copied is what is typed, without prompts and output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"  # numpydoc states the types
numpydoc_show_class_members = False  # the class template lists the methods

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[\\/](plot_|quickstart)",
    "ignore_pattern": r"__init__\.py",
    "abort_on_example_error": True,
    "parallel": 2,
    "download_all_examples": False,
    "doc_module": ("skebm",),
    "reference_url": {"skebm": None},
    "backreferences_dir": "generated/backreferences",
    "min_reported_time": 1,
    "show_memory": False,
    "write_computation_times": False,
    "reset_modules": ("matplotlib", "gallery.size"),
    "within_subsection_order": "gallery.order",
    "image_srcset": ["2x"],
    "ignore_repr_types": r"matplotlib",  # what drawing calls return
}

html_theme = "pydata_sphinx_theme"
html_title = "skebm"
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["skebm.css"]
html_js_files = [("access.js", {"defer": "defer"})]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_nav_level": 1,
}
html_sidebars = dict.fromkeys(
    ["index", "getting_started", "which_one", "faq", "glossary", "changelog", "contributing"], []
)


def skip_foreign(app, what, name, obj, skip, options):
    """Leave out what our classes inherit from torch and scikit-learn; their sites document it."""
    owner = getattr(getattr(obj, "fget", obj), "__module__", None)
    if isinstance(owner, str) and not owner.startswith("skebm"):
        return True
    return None


def keep_bars(app, what, name, obj, options, lines):
    """Bars in the prose of a docstring are absolute values, not substitutions of rst."""
    for i, line in enumerate(lines):
        if not re.search(r"\\|>>>|\.\.\. ", line):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [prose.replace("|", r"\|") for prose in parts[::2]]
            lines[i] = "".join(parts)


def setup(app):
    app.connect("autodoc-skip-member", skip_foreign)
    # After numpydoc, which would take the escaped bars for its own markup.
    app.connect("autodoc-process-docstring", keep_bars, priority=900)
