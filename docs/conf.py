"""Sphinx settings of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build``."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'kernels')]

import mmvim  # noqa: E402  (before any host: it serves the ops that mmcv lacks)

project = 'mmvim'
author = 'The mmvim authors'
project_copyright = author
release = version = mmvim.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode', 'sphinx_copybutton']
exclude_patterns = ['_build']
myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence']

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_use_ivar = True

html_theme = 'furo'
html_static_path, html_css_files = ['_static'], ['wide.css']
html_title = f'mmvim {release}'
html_show_copyright = html_show_sphinx = False
pygments_style, pygments_dark_style = 'tango', 'monokai'
copybutton_exclude = '.linenos, .gp, .go'

LINK = re.compile(r'(?P<text>\[[^\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)')
INCLUDE = re.compile(r'^```\{include\} (\S+)', re.MULTILINE)

# sections of the README that the site has as pages
SECTIONS = {'#speed-and-memory': '/speed.md'}


def included_files() -> dict[Path, str]:
    """Files outside of this folder that a page includes, and that page."""
    return {
        (page.parent / path).resolve(): f'/{page.relative_to(DOCS).as_posix()}'
        for page in DOCS.rglob('*.md')
        for path in INCLUDE.findall(page.read_text())
    }


def site_links(text: str, source: Path, page: Path) -> str:
    """Make links of the repository lead to pages of the site.

    Files link to one another as they lie in the repository, so that a reader of the repository can follow them. A link
    to a file that a page includes becomes one to that page, any other file a download, and a folder plain text.

    Args:
        text: Markdown.
        source: file that the text stands in.
        page: page that it becomes part of.
    """
    pages = included_files()

    def link(match: re.Match) -> str:
        path = (source.parent / match['path']).resolve()
        if path == ROOT / 'README.md' and match['anchor'] in SECTIONS:
            return f'{match["text"]}({SECTIONS[match["anchor"]]})'
        if path in pages:
            return f'{match["text"]}({pages[path]}{match["anchor"] or ""})'
        if path.is_dir():
            return match['text'][1:-1]
        relative = os.path.relpath(path, page.parent)
        if path.is_relative_to(DOCS) or path.suffix in ('.png', '.svg'):
            return f'{match["text"]}({relative}{match["anchor"] or ""})'
        return f'{match["text"]}(path:{relative})' if path.is_file() else match[0]

    return LINK.sub(link, text)


def setup(app: Sphinx) -> None:
    """Rewrite the links of every page and of every file that one includes, and leave out what repeats itself."""

    def read(app: Sphinx, docname: str, content: list[str]) -> None:
        page = Path(app.env.doc2path(docname))
        content[0] = site_links(content[0], page, page)

    def include(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
        content[0] = site_links(content[0], app.srcdir / path, Path(app.env.doc2path(app.env.docname)))

    def skip(app: Sphinx, kind: str, name: str, member: object, skipped: bool, options: object) -> bool | None:
        # fields of a named tuple, which its docstring describes
        return True if (getattr(member, '__doc__', None) or '').startswith('Alias for field number') else None

    app.connect('source-read', read)
    app.connect('include-read', include)
    app.connect('autodoc-skip-member', skip)
