"""The demo model's scripts are plain files beside their data, not a package: put their folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "demo_model"))
