"""Where the repository is, and where the data of the tests on real files may be."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PPO_TEST_DATA", ROOT.parent / "shared" / "data"))
