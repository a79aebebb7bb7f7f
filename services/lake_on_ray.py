"""Work on a lake's shards on the nodes of a Ray cluster, through Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray.data
from ray.exceptions import RayError

from s2t_shared.errors import StoreError
from s2t_shared.labels.reader import Reader

Result = TypeVar("Result")


def map_on_ray(work: Callable[[Reader], Result], parts: Iterable[Reader]) -> Iterator[Result]:
    """As `map`, in any order: a task for each part, on any node that sees the lake.

    A Ray cluster is connected. What comes back waits in Ray's object store, not here.

    Raises:
        StoreError: a task failed; the text says why.
    """
    rows = [{"part": part} for part in parts]
    if not rows:
        return

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": work(row["part"])}

    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
    try:
        for row in done.iter_rows():
            yield row["result"]
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise StoreError(
            f"the lake could not be read on the Ray cluster ({reason}); every node must see its "
            "folder under the same path, or its URL with credentials"
        ) from error
