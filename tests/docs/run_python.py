"""Run the Python blocks of one page, given as JSON on standard input, one after the other in this interpreter.

A block that sets ``_base_`` is a config: it is loaded, and its model built.
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path


def is_config(code: ast.Module) -> bool:
    targets = [target for node in code.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == '_base_' for target in targets)


def run_config(text: str, build: bool) -> None:
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    import mmvim  # noqa: F401

    Path('config_of_a_page.py').write_text(text)
    cfg = Config.fromfile('config_of_a_page.py')
    scope = cfg.get('default_scope') or 'mmseg'  # model bases of mmseg name none
    if build:
        with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):  # no time for random weights
            MODELS.build(cfg.model)


def forget_scope() -> None:
    """Start a block without the default scope that one before it has set: a reader runs one host at a time."""
    if 'mmengine' in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


def main() -> None:
    names = {'__name__': '__main__'}
    for block in json.load(sys.stdin):
        place = f'{block["page"]}:{block["line"]}'
        code = ast.parse(block['text'].replace('{{', '[').replace('}}', ']'), place)
        if is_config(code):
            run_config(block['text'], build=not block['note'].startswith('load only: '))
            continue
        ast.increment_lineno(code, block['line'] - 1)
        forget_scope()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, block['page'], 'exec'), names)
        if not printed.getvalue().endswith(block['output'] or ''):  # hosts print when they are imported
            sys.exit(f'{place} prints\n{printed.getvalue()}instead of\n{block["output"]}')


if __name__ == '__main__':
    main()
