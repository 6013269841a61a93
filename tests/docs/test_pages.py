"""The code blocks of README.md, docs/ and configs/*/README.md are run, or a comment in front of each says why not."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pages
import pytest

from mmvim import registry

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
BASH = [block for block in BLOCKS if block.language == 'bash']
PYTHON = [block for block in BLOCKS if block.language == 'python' and not block.note.startswith('not run: ')]
# load all three hosts, or build a detector as README.md does
SLOW = ('docs/extending.md', 'docs/inference.md', 'docs/weights.md')
SLOW_BASH = ('docs/tools.md',)  # counts the FLOPs of a model
FOLDERS = ('configs/', 'tools/', 'kernels/', 'docs/', 'tests/', '.ci/', 'mmvim/')


@pytest.fixture
def script(run_script):
    """Run a script of this folder on values given as JSON."""
    return lambda name, given, cwd: run_script(FOLDER / f'{name}.py', cwd=cwd, given=json.dumps(given))


def test_every_block_has_a_language():
    languages = ('python', 'bash', 'text', '{include}', '{toctree}', '{eval-rst}')
    assert [str(block) for block in BLOCKS if not block.language.startswith(languages)] == []


@pytest.mark.parametrize(
    'page',
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in dict.fromkeys(block.page for block in PYTHON)
    ],
)
def test_python(page, tmp_path, script):
    given = [asdict(block) for block in PYTHON if block.page == page]
    if any('work_dirs' in block['text'] for block in given):
        prepared = script('stand_ins', given, tmp_path)
        assert prepared.returncode == 0, prepared.stderr[-3000:]
    finished = script('run_python', given, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize('block', BASH, ids=str)
def test_bash_says_whether_it_runs(block):
    assert block.note == 'run' or block.note.startswith('not run: ')


@pytest.mark.parametrize(
    'block',
    [
        pytest.param(block, marks=pytest.mark.slow if block.page in SLOW_BASH else (), id=str(block))
        for block in BASH
        if block.note == 'run'
    ],
)
def test_bash(block):
    finished = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', f'python() {{ {sys.executable} "$@"; }}\n{block.text}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr


def test_commands_name_files_that_exist():
    for block in BASH:
        for word in (word for words in pages.commands(block) for word in words if word.startswith(FOLDERS)):
            is_output = '_build' in word
            assert is_output or list(ROOT.glob(word.partition('::')[0])), f'{block} names {word}'


def test_the_tools_take_their_commands(script):
    lines = [(str(block), *line) for block in BASH for line in tool_lines(block)]
    assert len(lines) > 20
    finished = script('parse_commands', lines, ROOT)
    assert finished.returncode == 0 and finished.stdout == '', finished.stdout + finished.stderr


def tool_lines(block) -> list[tuple[str, list[str]]]:
    """Tool and arguments of each command that starts one."""
    words = [words for words in pages.commands(block) if len(words) > 1 and words[1].startswith('tools/')]
    return [(tool, rest) for _, tool, *rest in words]


def test_every_registered_name_is_listed():
    registries = [value for value in vars(registry).values() if getattr(value, 'scope', None) == registry.SCOPE]
    names = set(registry.HOST_PARTS)
    for child in registries:
        child.import_from_location()
        names |= set(child.module_dict)
    listed = (ROOT / 'docs' / 'extending.md').read_text()
    assert sorted(name for name in names if f'`mmvim.{name}`' not in listed) == []


def test_pages_link_to_files_that_exist():
    for page in pages.PAGES:
        for token in pages.MarkdownIt().parse(page.read_text()):
            for child in token.children or ():
                target = str(child.attrs.get('href') or child.attrs.get('src') or '').partition('#')[0]
                if target and '://' not in target:
                    assert (page.parent / target).exists(), f'{page.relative_to(ROOT)} links to {target}'
