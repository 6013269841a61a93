import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def small_run():
    """The module small_run.py beside this file."""
    name = 'small_run'
    if name not in sys.modules:  # its classes register once
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name('small_run.py'))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
