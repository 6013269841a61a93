"""Test modules of this folder import tiny_training beside them by its plain name."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session')
def small_run():
    """The module small_run.py beside this file, whose classes register once."""
    return importlib.import_module('small_run')
