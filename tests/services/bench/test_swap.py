"""`s2t bench swap`: what it counts, and the bench itself on a real service, small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import InvalidRequestError
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.types import DecodeOptions, DecodeRequest, Mode, Policy, Trigger
from services.bench.swap import (
    PROMPTS,
    SIDES,
    Asked,
    Load,
    bench_swap,
    random_selector,
    report_of,
)

OLD, NEW = "v0001", "v0002"
REPLAYS = {(OLD, i): (1, 2, i) for i in range(PROMPTS)} | {
    (NEW, i): (1, 3, i) for i in range(PROMPTS)
}
SOUND = Asked(0, 10.0, (10.1, 10.2), (1, 2, 0), OLD)


def report(*asked: Asked, swaps: tuple[tuple[float, float], ...] = ()):  # noqa: ANN201
    return report_of(Load(list(asked), list(swaps)), REPLAYS, (OLD, NEW), "")


def test_mixed_answers_are_counted() -> None:
    """Tokens that are not those of the version the answer claims, or a version that was never
    published."""
    half = replace(SOUND, token_ids=(1, 2, 9))
    swapped = replace(SOUND, version=NEW)
    stranger = replace(SOUND, version="v0009")
    found = report(SOUND, half, swapped, stranger, replace(SOUND, version=NEW, token_ids=(1, 3, 0)))
    assert (found.requests, found.failed, found.mixed) == (5, 0, 3)
    assert found.told_apart == PROMPTS
    assert found.answers == {OLD: 2, NEW: 2}


def test_failed_requests_are_counted_and_give_no_times() -> None:
    failed = Asked(0, 10.0, (), failure="StatusCode.UNAVAILABLE")
    found = report(SOUND, failed)
    assert (found.requests, found.failed, found.mixed) == (2, 1, 0)
    assert found.first_piece_elsewhere["max"] == pytest.approx(100.0)


def test_requests_at_a_swap_are_told_from_the_others() -> None:
    """From the promotion to half a second after it was taken up."""
    slow = [replace(SOUND, began=t, pieces=(t + 0.3, t + 0.5)) for t in (20.0, 20.2, 20.4)]
    found = report(
        *[replace(SOUND, began=t, pieces=(t + 0.1, t + 0.2)) for t in (10.0, 19.9, 21.0)],
        *slow,
        swaps=((20.0, 20.4),),
    )
    assert found.requests_at_swap == 3
    assert found.first_piece_at_swap["p50"] == pytest.approx(300.0)
    assert found.stall_p99 == pytest.approx(200.0)
    assert found.stall_p99_elsewhere == pytest.approx(0.0)
    assert found.longest_gap_at_swap == pytest.approx(200.0)
    assert found.longest_gap_elsewhere == pytest.approx(100.0)
    assert found.take_up["max"] == pytest.approx(400.0)
    json.dumps(found.as_json())


@pytest.mark.parametrize(
    ("swaps", "minutes", "concurrency"), [(0, 1.0, 1), (10, 0.1, 1), (1, 1.0, 0)]
)
def test_impossible_settings_are_refused(swaps: int, minutes: float, concurrency: int) -> None:
    with pytest.raises(InvalidRequestError, match="--swaps"):
        bench_swap(swaps, minutes, concurrency)


def test_the_two_versions_select_differently(models: dict[str, Path]) -> None:
    """Otherwise no mixed answer could ever show."""
    runtime = ModelRuntime.load(str(models["slm"]))
    reserved = tuple(range(48, 64))
    answers = []
    for seed, (kind, reads) in enumerate(SIDES):
        selector = random_selector(runtime, reserved, kind, reads, seed)
        engine = Engine(
            Proposer(runtime, reserved), None, lambda version, s=selector: s, max_num_seqs=1
        )
        sequence = engine.add(
            DecodeRequest(
                request_id="x",
                token_ids=(5, 9, 30),
                options=DecodeOptions(
                    policy=Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.ALWAYS), max_new_tokens=12
                ),
            )
        )
        while not engine.idle:
            engine.step()
        answers.append(sequence.output_ids)
    assert answers[0] != answers[1]


@pytest.mark.service
@pytest.mark.faults
def test_swaps_under_load_fail_and_mix_nothing() -> None:
    """The bench on a real service: Ray, gateway, streams, three swaps."""
    found = bench_swap(3, 0.1, 3)
    assert (found.swaps, found.failed, found.mixed) == (3, 0, 0)
    assert found.requests > 5
    assert found.requests_at_swap > 0
    assert found.told_apart > PROMPTS // 2
    assert min(found.answers.values()) > 0
