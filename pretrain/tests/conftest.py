"""Tests of how keel-nano was made: `pytest pretrain/tests`, which the default run leaves out."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
