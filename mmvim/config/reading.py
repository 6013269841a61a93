"""Reading a config file: where it is, which keys and options nothing would read."""

import difflib
import os
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config

import mmvim
from mmvim.config.completion import COMPLETED_KEYS
from mmvim.config.files import SPLIT_KEYS, ConfigFile, config_files, follow_validation
from mmvim.config.unread import RUNNER_KEYS, check_read, completed_keys, runner_keys, unread, uses_of
from mmvim.errors import ConfigError


def config_folders() -> list[Path]:
    """Folders with the configs that come with mmvim, in an installation and in a checkout."""
    package = Path(mmvim.__file__).parent
    return [folder for folder in (package / '.mim' / 'configs', package.parent / 'configs') if folder.is_dir()]


def find_config(path: str) -> str:
    """Path of a config file: as given, or among those that come with mmvim.

    Raises:
        ConfigError: if there is none, with the closest names.
    """
    if os.path.isfile(path):
        return path
    shipped = config_folders()
    for folder in shipped:
        candidate = folder / path.removeprefix('configs/')
        if candidate.is_file():
            return str(candidate)
    names = {file.name: file for folder in shipped for file in folder.rglob('*.py') if file.is_file()}
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.5)
    hint = f': did you mean {" or ".join(close)}?' if close else ': check the path'
    raise ConfigError(f"config '{path}' does not exist{hint}")


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and apply options to it.

    Args:
        path: the file, or the name of one that comes with mmvim, such as vim/cascade_mask_rcnn_vim_ti_coco.py.
        options: values by dotted key, as ``--cfg-options`` gives them.

    Raises:
        ConfigError: if the file cannot be read, or it or an option names a key that nothing reads.
    """
    options, path = options or {}, find_config(path)
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        file = path if (error.filename or '<').startswith('<') else error.filename
        raise ConfigError(f"config '{file}', line {error.lineno}: {error.msg}") from None
    except (KeyError, NameError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"config '{path}' cannot be read: {error}") from None
    _check_names(cfg, path)
    files = config_files(cfg.filename)
    follow_validation(cfg, files)
    check_options(cfg, options)
    before = deepcopy(cfg)
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(f'--cfg-options {" ".join(options)} does not fit the config: {error}') from None
    _follow_options(cfg, before, options)
    _check_use(cfg, before, options, files)
    return cfg


def _check_names(cfg: Config, path: str) -> None:
    for name in cfg:
        close = difflib.get_close_matches(name, RUNNER_KEYS - {'tta_pipeline'}, n=1, cutoff=0.88)
        if name not in RUNNER_KEYS and close and len(name) > 4:
            raise ConfigError(f"config '{path}': nothing reads the key '{name}'; did you mean '{close[0]}'?")


def check_options(cfg: Config, options: dict) -> None:
    """Refuse options whose key nothing would read.

    A key below a ``type`` is left to the type's constructor, which knows its arguments.

    Raises:
        ConfigError: with the closest key.
    """
    for option in options:
        node, seen = cfg, []
        for part in option.split('.'):
            if isinstance(node, (list, tuple)):
                if not part.lstrip('-').isdigit() or int(part) >= len(node):
                    raise ConfigError(
                        f"--cfg-options {option}: '{'.'.join(seen)}' is a list of {len(node)}; name an entry by its "
                        f'number, such as {".".join(seen)}.0'
                    )
                node = node[int(part)]
            elif isinstance(node, dict | Config):
                if part not in node:
                    _refuse_unknown(option, part, seen, node)
                    break
                node = node[part]
            else:
                break
            seen.append(part)


def _refuse_unknown(option: str, part: str, seen: list[str], node: dict) -> None:
    if seen:
        close = difflib.get_close_matches(part, [str(key) for key in node], n=1, cutoff=0.8)
        if 'type' in node or not close:
            return
        hint = f"did you mean '{'.'.join([*seen, close[0]])}'?"
    elif part in RUNNER_KEYS | COMPLETED_KEYS:
        return
    else:
        close = difflib.get_close_matches(part, {*RUNNER_KEYS, *COMPLETED_KEYS, *node}, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f'the config has {sorted(node)}'
    raise ConfigError(f"--cfg-options {option}: the config has no key '{'.'.join([*seen, part])}'; {hint}")


def _follow_options(cfg: Config, before: Config, options: dict) -> None:
    """Let the test follow the validation: options that change one of two equal settings mean both."""
    given = {option.partition('.')[0] for option in options}
    for kind in SPLIT_KEYS:
        val, test = f'val_{kind}', f'test_{kind}'
        if val in given and test not in given and cfg.get(val) is not None and before.get(val) == before.get(test):
            cfg[test] = deepcopy(cfg[val])


def _check_use(cfg: Config, before: Config, options: dict, files: list[ConfigFile]) -> None:
    """Refuse to set a variable of a config file, here or in a file that inherits it: what the file made of it is fixed.

    What :func:`mmvim.config.completion.complete_config` reads is known only if it finds the data; otherwise its own
    error says what is missing.
    """
    read = runner_keys(cfg)
    variables = {option.partition('.')[0] for option in options} - read
    if not variables and not unread(files, read):
        return
    read |= completed_keys(cfg)
    for name in sorted(variables - read):
        uses = uses_of(before, name, before.get(name))
        hint = f'set {" and ".join(uses[:4])} instead' if uses else 'name the key that should change'
        raise ConfigError(f'--cfg-options {name}: nothing in this config takes its value from there; {hint}')
    check_read(cfg, files, read)
