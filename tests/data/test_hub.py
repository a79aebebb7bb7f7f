"""Hub ids: the real client packages against a small hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.errors import ConfigError
from tests.helpers import prompt_files
from tests.helpers.fake_hub import REVISION, fake_hub
from tests.helpers.prompt_files import read_prompts_of

HUB_READER = """
import json
from s2t_shared.data import hub
from s2t_shared.data.prompts import PromptSource, count, fingerprint, read
from s2t_shared.errors import S2TError
sources = (
    PromptSource(source="org/name"),
    PromptSource(source="org/other"),
    PromptSource(source="org/name", split="extra"),
)
for source in sources:
    try:
        rows = [[row["id"], prompt.text] for row, prompt in read(source)]
        found = rows, len(fingerprint(source)), count(source), hub.revision(source.source)
    except S2TError as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
"""


def test_ids_are_streamed(tmp_path: Path) -> None:
    """The right split comes, and errors say what to check."""
    pytest.importorskip("datasets")
    with fake_hub() as endpoint:
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", HUB_READER],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    found, missing, no_split = map(json.loads, done.stdout.splitlines()[-3:])
    assert found == [[["row-1", "q1"], ["row-2", "q2"]], 64, None, REVISION]
    assert missing.startswith("ConfigError: the hub's 'org/other' cannot be read: ")
    assert "check the name" in missing
    assert no_split.startswith("ConfigError")
    assert "Available splits: ['train', 'test']" in no_split


@pytest.mark.parametrize("kind", ["hub id", "card", "saved"])
def test_a_missing_package_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = "org/name:main"
    if kind == "card":
        source = prompt_files.with_card(tmp_path)
    if kind == "saved":
        source = prompt_files.saved(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 's2t\[hub\]'"):
        read_prompts_of(source)
    assert len(read_prompts_of(prompt_files.hub_layout(tmp_path / "plain"))) == 600
