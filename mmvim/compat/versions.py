"""Check the versions of the host modules, whatever distribution brought them, and of what breaks them."""

import traceback
from importlib import import_module, metadata
from pathlib import Path

from mmengine.utils import digit_version

from mmvim.compat.lookup import HOSTS

# the oldest versions that the tests were run with; pyproject.toml has the same
TESTED_FROM = {'mmengine': '0.10.10', 'mmcv': '2.3.4', 'mmdet': '3.5.0', 'mmseg': '1.4.0', 'mmpretrain': '1.3.4'}


def require(*modules: str) -> None:
    """Raise one ImportError that names every module of `modules` that is missing or older than the tested versions."""
    problems = []
    for name in modules:
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            problems.append(f'{name} is not installed' if error.name == name else f'{name} fails to load ({error})')
            continue
        if digit_version(version) < digit_version(TESTED_FROM[name]):
            problems.append(f'{name} is {version} where mmvim needs {TESTED_FROM[name]} or newer')
    if problems:
        raise ImportError(
            f'{"; ".join(problems)}. Install the versions it works with: pip install --upgrade "mmvim[all]"'
        )


def explain_transformers(error: BaseException) -> str | None:
    """What to do if a host fails to load because of the installed transformers; None for every other error.

    MMPretrain loads its multimodal models wherever transformers is installed, MMDetection and MMSegmentation load
    MMPretrain, and transformers 5 lacks names that those models ask for.
    """
    try:
        installed = metadata.version('transformers')
    except metadata.PackageNotFoundError:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    loaded = [frame.filename for frame in frames if frame.name == '<module>' and _host_of(frame.filename)]
    if not loaded or 'transformers' not in Path(loaded[-1]).read_text('utf-8'):
        return None
    known_to_fail = digit_version(installed) >= digit_version('5')
    remedy = 'python -m pip install "transformers<5"' if known_to_fail else 'install another version'
    return (
        f'{_host_of(loaded[-1])} cannot be loaded with the installed transformers {installed} ({error}): '
        f'{remedy}, or python -m pip uninstall transformers, which no config of mmvim needs'
    )


def _host_of(path: str) -> str | None:
    return next((host for host in HOSTS if host in Path(path).parts), None)
