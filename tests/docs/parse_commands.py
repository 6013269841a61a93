"""Parse command lines of the tools, given as JSON on standard input, with the tools' own parsers, and carry out none.

Prints one line for each that its tool would refuse, or whose --cfg-options name a key that the config does not have.
"""

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELL = {'dist_train.sh': 'train.py', 'dist_test.sh': 'test.py'}


class Parsed(Exception):
    """What a parser made of the command line."""


def parse_args(self: argparse.ArgumentParser, *args, **kwargs) -> None:
    raise Parsed(parse(self, *args, **kwargs))


parse = argparse.ArgumentParser.parse_args


def complaint(tool: str, words: list[str]) -> str | None:
    name = Path(tool).name
    if name in SHELL:  # CONFIG [CHECKPOINT] PROCESSES, then the tool's arguments
        words = [word for word in words if not word.isdigit()]
    sys.argv = [tool, *words]
    try:
        runpy.run_path(str(ROOT / 'tools' / SHELL.get(name, name)), run_name='__main__')
    except Parsed as parsed:
        return unknown_keys(parsed.args[0])
    except SystemExit:
        return 'refused by its parser'
    return 'has no parser'


def unknown_keys(args: argparse.Namespace) -> str | None:
    from mmengine.config import Config

    path = ROOT / (getattr(args, 'config', None) or '')
    if not path.is_file():
        return None  # a config of the reader's
    keys = {option.partition('.')[0] for option in getattr(args, 'cfg_options', {})}
    missing = keys - set(Config.fromfile(path)) if keys else None
    return f'{path.name} has no {sorted(missing)}' if missing else None


def main() -> None:
    argparse.ArgumentParser.parse_args = parse_args
    sys.path.insert(0, str(ROOT / 'tools'))
    os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    for place, tool, words in json.load(sys.stdin):
        problem = complaint(tool, words)
        if problem:
            print(f'{place}: {tool} {" ".join(words)}: {problem}')


if __name__ == '__main__':
    main()
