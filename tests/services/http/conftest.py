"""One gateway over a scripted pair, for the tests that need nothing else of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.serving import http_gateway, proposer_service


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with http_gateway(tmp_path_factory.mktemp("http"), proposer_service()) as found:
        yield found
