"""What the doctor says of a running service."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.launch.doctor import check_service
from tests.helpers.serving import proposer_service, scripted_llm, scripted_slm, with_gateway


@pytest.mark.parametrize("available", [True, False])
def test_an_llm_that_cannot_be_reached_is_told(tmp_path: Path, available: bool) -> None:
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm, available=available))
    told = with_gateway(tmp_path, service, check_service)
    assert "LLM scripted" in told and ("not reachable" in told) != available
