"""Check the versions of the host modules, whatever distribution brought them."""

from importlib import import_module

from mmengine.utils import digit_version

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
