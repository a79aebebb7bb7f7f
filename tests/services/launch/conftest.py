"""A service that `s2t up` has started, as the laptop's page does, on the ports that it names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launch.service_record import read_record
from tests.helpers.laptop_page import laptop_commands, run


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where the page's first command was run."""
    folder = tmp_path_factory.mktemp("up")
    start, _, _, down = laptop_commands()
    run("s2t init cluster cluster", folder)
    began = time.monotonic()
    run(start, folder)
    print(f"s2t up: {time.monotonic() - began:.0f} s")
    yield folder
    if read_record(folder / "s2t-data") is not None:
        run(down, folder)
