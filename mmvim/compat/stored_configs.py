"""A config that a checkpoint holds as text is parsed, never executed, and no model is built from it.

mmengine runs such a text as a Python file: `Runner.resume` for the number of GPUs in `meta['config']`, and inferencers
without a config for the model. A name of a type is enough to call any function, `dict(type='os.system', ...)`, so that
parsing alone does not make it safe to build from.
"""

import ast
import math
from collections.abc import Callable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.config import BASE_KEY, RESERVED_KEYS

from mmvim.compat.import_hook import when_imported
from mmvim.errors import CheckpointError, ConfigError

MODULE = 'mmengine.infer.infer'
NAMES = dict(inf=math.inf, nan=math.nan)


def keep_stored_configs_from_running() -> None:
    """Put the functions below in place, whether mmengine's inferencers are imported already or only later."""
    if not hasattr(Config.fromstring, '__wrapped__'):
        Config.fromstring = staticmethod(_from_string(Config.fromstring))
    when_imported(MODULE, _require_config)


def parse_config(text: str) -> dict[str, Any]:
    """The keys of a config as mmengine writes it: assignments of values, `dict(...)` among them. Nothing is run.

    Raises:
        ConfigError: at the first line that is anything else, with its number.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError) as error:
        raise ConfigError(f'a config kept as text is no Python ({type(error).__name__}: {error})') from None
    keys = {}
    for statement in body:
        try:
            name, node = _assignment(statement)
            keys[name] = _value(node)
        except (ValueError, TypeError, RecursionError, MemoryError):
            line = text.splitlines()[statement.lineno - 1].strip()[:60]
            raise ConfigError(
                f'line {statement.lineno} of a config kept as text, {line!r}, is code and no plain value: it is not run'
            ) from None
    return keys


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
        if name not in (BASE_KEY, *RESERVED_KEYS):
            return name, statement.value
    raise ValueError('no key and value')


def _value(node: ast.expr) -> Any:
    """What `ast.literal_eval` gives, with `dict(...)`, inf and nan inside."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        result = dict(*map(_value, node.args))
        for keyword in node.keywords:
            value = _value(keyword.value)
            result.update({keyword.arg: value} if keyword.arg else value)
        return result
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(_value(item) for item in node.elts)
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    return ast.literal_eval(node)


def check_stored_config(checkpoint: Mapping[str, Any], source: str) -> None:
    """Refuse to resume from a checkpoint whose config, `meta['config']`, holds code.

    Raises:
        CheckpointError: with the line.
    """
    text = (checkpoint.get('meta') or {}).get('config')
    try:
        parse_config('' if text is None else text)
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint '{source}' cannot be resumed, meta['config']: {error}. Start from its weights alone with "
            'load_from, without --resume'
        ) from None


def _from_string(original: Callable) -> Callable:
    @wraps(original)
    def fromstring(cfg_str: str, file_format: str) -> Config:
        """mmengine's function for a Python config that holds values only; `custom_imports` in it are not imported.

        Raises:
            ConfigError: if it holds code, or is not Python.
        """
        if file_format != '.py':
            raise ConfigError(
                f'a config kept as text can only be Python, got {file_format!r}: write it into a file and read '
                'Config.fromfile(file)'
            )
        try:
            return Config(ConfigDict(parse_config(cfg_str)))
        except ConfigError as error:
            raise ConfigError(
                f'{error}. If you trust it, write it into a file and read Config.fromfile(file)'
            ) from None

    return fromstring


def _require_config(host: ModuleType) -> None:
    original = host.BaseInferencer._init_model

    @wraps(original)
    def init_model(self, cfg, weights: str | None, device: str = 'cpu'):
        if not cfg:
            raise CheckpointError(
                f"checkpoint '{weights}' was given without a config; the one inside is not used, as building a model "
                f"from it can run any code: give both, {type(self).__name__}('CONFIG.py', '{weights}'). The work "
                'directory of the training holds the config'
            )
        return original(self, cfg, weights, device)

    host.BaseInferencer._init_model = init_model
