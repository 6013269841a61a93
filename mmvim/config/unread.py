"""Keys of config files that nothing reads."""

import inspect
from collections.abc import Iterable
from copy import deepcopy

from mmengine.config import Config
from mmengine.runner import Runner

from mmvim.config.completion import COMPLETED_KEYS, complete_config
from mmvim.config.files import ConfigFile
from mmvim.errors import ConfigError, InputError

RUNNER_KEYS = (set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}) | {
    'activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters',
    'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline',
}  # fmt: skip
ABSENT = object()  # None is a value that a key may have


def runner_keys(cfg: Config) -> set[str]:
    """Top-level keys that mmengine's Runner or a tool reads; a data preprocessor only if the model has none itself."""
    return RUNNER_KEYS - ({'data_preprocessor'} if (cfg.get('model') or {}).get('data_preprocessor') else set())


def unread(files: list[ConfigFile], read_keys: Iterable[str]) -> list[tuple[str, ConfigFile]]:
    """Top-level keys of files with bases that nothing reads, and the file of each, the last file first.

    A key is read by the runner or by :func:`mmvim.config.completion.complete_config`, by its own file below it, or by a
    file that inherits it. What a base made of its own key is fixed by the time that a child sets the key anew. In a
    file without bases nothing is said to be unread: a config that training saved is one, with all that it was made of.

    Args:
        files: the files of a config, bases first.
        read_keys: keys that runner or completion read.
    """
    found = []
    for i in reversed(range(len(files))):
        file = files[i]
        if file.is_hosts or not file.is_child:
            continue
        known = {*read_keys, *file.read, *(key for later in files[i + 1 :] for key in later.base_read)}
        found += [(key, file) for key in file.assigned if key not in known]
    return found


def _value(paths: Iterable[str], key: str) -> object:
    """What a key is in the first file that has it; ``ABSENT`` if there is none."""
    values = (Config.fromfile(path, import_custom_modules=False).get(key, ABSENT) for path in paths)
    return next((value for value in values if value is not ABSENT), ABSENT)


def completed_keys(cfg: Config) -> set[str]:
    """Top-level keys that completion reads of a config; all that it can read if the data to decide is missing."""
    try:
        return complete_config(deepcopy(cfg))
    except InputError:
        return COMPLETED_KEYS


def check_read(cfg: Config, files: list[ConfigFile], read_keys: Iterable[str]) -> None:
    """Refuse a file whose top-level key nothing reads, unless it only says again what it inherits.

    Raises:
        ConfigError: naming file, key, and what to set instead.
    """
    for key, file in unread(files, read_keys):
        inherited = _value(file.bases, key)
        if _lists(inherited) == _lists(_value([file.path], key)):
            continue
        # a child or an option may have set what the file alone would have filled
        if key in completed_keys(Config.fromfile(file.path, import_custom_modules=False)):
            continue
        uses = uses_of(cfg, key, inherited)
        hint = f'set {" and ".join(uses[:4])} instead' if uses else 'delete it'
        raise ConfigError(
            f"config '{file.path}', line {file.assigned[key]}: nothing in this config takes its value from '{key}'; "
            f"{hint}, or begin its name with '_' if code of your own reads it"
        )


def _lists(value: object) -> object:
    """A value with lists for its tuples, which YAML and JSON do not have."""
    if isinstance(value, dict):
        return {key: _lists(child) for key, child in value.items()}
    return [_lists(child) for child in value] if isinstance(value, list | tuple) else value


def uses_of(cfg: Config, key: str, value: object) -> list[str]:
    """Dotted keys below the top level that hold what a top-level key was, or have its name."""
    nested = [(path, child) for path, child in _walk(cfg) if '.' in path]
    named = [path for path, _ in nested if path.rpartition('.')[2] == key]
    return list(dict.fromkeys([*(path for path, child in nested if _holds(child, value)), *named]))


def _holds(node: object, value: object) -> bool:
    if isinstance(value, str):
        return bool(value) and str(node).startswith(value)
    return value is not None and node == value


def _walk(node: object, path: str = '') -> Iterable[tuple[str, object]]:
    """Everything in a config with its dotted key."""
    if isinstance(node, dict | Config | list | tuple):
        for key, child in node.items() if isinstance(node, dict | Config) else enumerate(node):
            here = f'{path}.{key}'.lstrip('.')
            yield here, child
            yield from _walk(child, here)
