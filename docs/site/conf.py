"""Settings of Sphinx; `build.py` runs it."""

import mambaseg

project = "mambaseg"
author = copyright = "The mambaseg authors"
version = release = mambaseg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "index"
language = "en"
default_role = "code"  # docstrings mark code with single backticks

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4  # as GitHub names them
copybutton_prompt_text = "$ "

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["segmentation_models_pytorch", "timm"]  # of the extra zoo
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"npt.ArrayLike": "ArrayLike"}
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "mambaseg"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
