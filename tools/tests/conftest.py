"""The settings and fixtures of ``tests/``, whose helpers these tests may import (``from tiny import build``)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import no_grad, pytest_collection_modifyitems, run  # noqa: F401
