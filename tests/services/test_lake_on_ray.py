"""Statistics and exports of a lake on a Ray cluster: the same as here."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.errors import StoreError
from s2t_shared.labels.export import export_labels
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.stats import measure_labels
from services.lake_on_ray import map_on_ray
from services.launch.ray_connection import local_ray
from tests.helpers.scored_rollouts import SCORED_ROLLOUTS

pytestmark = pytest.mark.service


def fail(part: Reader) -> int:
    raise FileNotFoundError(part.shards[0].name)


def test_counted_on_ray_as_here(tmp_path: Path) -> None:
    """With repeats in other shards, which a task does not see; and what a task cannot read is
    told."""
    lake = Lake(tmp_path / "lake")
    for start in (0, 10, 20):
        lake.write(SCORED_ROLLOUTS[start : start + 15])
    expected = measure_labels(lake)
    with local_ray(2):
        assert measure_labels(lake, map_on_ray) == expected
        exported = export_labels(lake, tmp_path / "out", run=map_on_ray)
        assert exported.total == expected.labels
        assert (tmp_path / "out/README.md").is_file()
        reader = lake.reader()
        with pytest.raises(StoreError, match="every node must see"):
            list(map_on_ray(fail, map(reader.part, range(3))))
        assert list(map_on_ray(fail, [])) == []
