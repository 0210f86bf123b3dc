"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(out_dir, what it printed) of `python train_ppo.py` as a user starts it, in a process of its own. It takes
    minutes, so all slow tests that need a trained run share this one; whoever would write into it takes a copy."""
    folder, root = tmp_path_factory.mktemp("default"), Path(__file__).parents[1]
    process = subprocess.run([sys.executable, str(root / "train_ppo.py"), f"--out_dir={folder}", "--device=cpu"],
                             cwd=folder, capture_output=True, text=True, env=os.environ)
    assert process.returncode == 0, process.stderr[-2000:]
    return folder, process.stdout
