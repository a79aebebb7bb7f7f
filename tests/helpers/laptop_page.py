"""The laptop's first ten minutes of `cluster/README.md`: its commands, and how to run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from services.launch.cluster_files import CLUSTER_FILES

ROOT = Path(__file__).parents[2]
README = (CLUSTER_FILES / "README.md").read_text(encoding="utf-8")


def laptop_commands() -> list[str]:
    """up, ask, status, down."""
    block = re.search(r"## The first ten minutes: a laptop\n+```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def run(command: str, folder: Path) -> str:
    """Run a command of the page in a folder, on a Ray of its own. Returns what it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
