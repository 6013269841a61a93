"""Code blocks of Markdown pages, and what a comment in front of a block says about it.

``<!-- not run: WHY -->`` keeps a block from being run, ``<!-- load only: WHY -->`` keeps the model of a config from
being built, and ``<!-- run -->`` runs a bash block. A block ``text`` right behind a Python block is what it prints
last.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for pattern in ('README.md', 'CONTRIBUTING.md', 'docs/**/*.md', 'configs/*/README.md')
    for page in sorted(ROOT.glob(pattern))
    if '_build' not in page.parts
]


@dataclass
class Block:
    """A fenced block: its language, text and first line, the comment in front of it, and what it should print."""

    page: str
    line: int
    language: str
    text: str
    note: str
    output: str | None = None

    def __str__(self) -> str:
        return f'{self.page}:{self.line}'


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    note, behind_python = '', False
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == 'html_block':
            note = token.content.strip().removeprefix('<!--').removesuffix('-->').strip()
            behind_python = False
        elif token.type == 'fence':
            if behind_python and token.info == 'text':
                found[-1].output = token.content
            else:
                name = page.relative_to(ROOT).as_posix()
                found.append(Block(name, token.map[0] + 2, token.info, token.content, note))
            note, behind_python = '', token.info == 'python'
        elif token.nesting == 1:
            note, behind_python = '', False
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a bash block as lists of words."""
    for line in block.text.replace('\\\n', ' ').splitlines():
        for command in line.split(' && '):
            words = shlex.split(command, comments=True)
            if words:
                yield words
