"""Test modules of this folder import tiny_training beside them by its plain name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
