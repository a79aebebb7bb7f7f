"""A service that runs on a data folder, as far as verbs beside it see it: it counts labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from s2t_shared.types import LabelCounts
from services.launch.service_record import ServiceRecord


def pretend_service(
    monkeypatch: pytest.MonkeyPatch, count_labels: Callable[[bool], LabelCounts]
) -> None:
    """Verbs find a service, and `count_labels(flush)` answers for it."""

    class FakeClient:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def count_labels(self, flush: bool) -> LabelCounts:
            return count_labels(flush)

    record = ServiceRecord("127.0.0.1:1", 1, {})
    monkeypatch.setattr("services.client.Client", FakeClient)
    monkeypatch.setattr("services.launch.service_record.find_service", lambda folder: record)
