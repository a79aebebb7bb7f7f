"""Everything that reads outside bytes, on a few of them: what atheris runs for half an hour."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.malformed import GATEWAY, SELECTOR, calls
from tests.fuzz.targets import TARGETS, request, seeds, selection

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_bytes_end_a_reader(name: str) -> None:
    """Seeds, and what is near them: an error that is none of ours, or a wrong value that is let
    through."""
    good = seeds(name)

    @QUICK
    @given(st.one_of(st.binary(max_size=80), st.tuples(st.sampled_from(good or [b""]), st.data())))
    def near(drawn: object) -> None:
        if isinstance(drawn, bytes):
            TARGETS[name](drawn)
            return
        seed, data = drawn  # type: ignore[misc]
        at = data.draw(st.integers(0, len(seed)))
        TARGETS[name](seed[:at] + data.draw(st.binary(max_size=6)) + seed[at + 1 :])

    for seed in good:
        TARGETS[name](seed)
    near()


@QUICK
@given(st.one_of(calls(GATEWAY), calls(SELECTOR)))
def test_no_message_ends_a_reader(call) -> None:  # type: ignore[no-untyped-def]
    """Messages that decode, with values at and beyond the edges of each field."""
    request(call.sent)
    selection(call.sent)
