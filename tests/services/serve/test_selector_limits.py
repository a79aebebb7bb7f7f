"""What a selector refuses before it works: too much in one query, too many queries at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.errors import InvalidRequestError, OverloadedError, S2TError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import MAX_CANDIDATES
from services.rpc import channels, wire
from services.serve.request_limits import MAX_EXCLUDED_IDS, MAX_SEQUENCE_NAME_LENGTH
from tests.helpers.servers import FixedLLM, selector_address
from tests.helpers.serving import becomes

LONGEST = 99  # tokens that FixedLLM reads
K = MAX_CANDIDATES


def request(**fields: Any) -> pb.ScoreRequest:
    given = {"token_ids": [1, 2], "positions": [1], "candidate_ids": [3], "candidate_counts": [1]}
    return pb.ScoreRequest(**{**given, **fields})


async def refusal(
    stub: pb_grpc.SelectionServiceStub, message: pb.ScoreRequest, token: str | None = None
) -> S2TError | None:
    try:
        await stub.Score(message, timeout=5.0, metadata=channels.call_metadata(token))
    except grpc.aio.AioRpcError as error:
        return wire.error_of(error)
    return None


@pytest.mark.parametrize(
    ("field", "most", "one_more"),
    [
        ("token_ids", {"token_ids": [1] * LONGEST}, {"token_ids": [1] * (LONGEST + 1)}),
        ("positions", {"token_ids": [1] * 2}, {"token_ids": [1]} | {"positions": [0, 0]}),
        (
            "candidate_ids",
            {"candidate_ids": [1] * K, "candidate_counts": [K]},
            {"candidate_ids": [1] * (K + 1), "candidate_counts": [K + 1]},
        ),
        ("candidate_counts", {}, {"candidate_counts": [1, 0]}),
        (
            "excluded_ids",
            {"excluded_ids": range(MAX_EXCLUDED_IDS)},
            {"excluded_ids": range(MAX_EXCLUDED_IDS + 1)},
        ),
        (
            "sequence_id",
            {"sequence_id": "x" * MAX_SEQUENCE_NAME_LENGTH},
            {"sequence_id": "x" * (MAX_SEQUENCE_NAME_LENGTH + 1)},
        ),
    ],
)
def test_each_field_has_its_most(field: str, most: dict, one_more: dict) -> None:
    """Only the message's size was bounded: millions of ids were read on the event loop."""
    llm = FixedLLM()

    async def main() -> list[S2TError | None]:
        async with selector_address(llm=llm) as address:
            async with channels.open_channel(address, None) as channel:
                stub = pb_grpc.SelectionServiceStub(channel)
                return [await refusal(stub, request(**fields)) for fields in (most, one_more)]

    taken, refused = asyncio.run(main())
    assert taken is None, taken
    assert isinstance(refused, InvalidRequestError) and field in str(refused)
    assert llm.asked == 1


def test_too_many_queries_are_refused_with_a_time_to_come_again(tmp_path: Path) -> None:
    """The queue had no bound. Of one client first, then of all; what ended makes room, also where
    its caller has gone."""
    one, another = "one-" + 16 * "x", "another-" + 16 * "x"
    (tmp_path / "tokens").write_text(f"score: {one}\nscore: {another}\n", encoding="utf-8")
    security = SecurityConfig(token_file=tmp_path / "tokens")
    llm = FixedLLM()
    settings = SelectorConfig(max_queries=4, max_queries_per_client=3)

    async def main() -> None:
        llm.open.clear()
        async with selector_address(security, llm, settings) as address:
            async with channels.open_channel(address, None) as channel:
                stub = pb_grpc.SelectionServiceStub(channel)
                own = {"metadata": channels.call_metadata(one)}
                mine = [stub.Score(request(), timeout=30.0, **own) for _ in range(3)]
                assert await becomes(lambda: llm.asked == 3)
                fourth = await refusal(stub, request(), one)
                assert isinstance(fourth, OverloadedError) and "of your requests" in str(fourth)
                assert fourth.retry_after_s

                other = {"metadata": channels.call_metadata(another)}
                theirs = stub.Score(request(), timeout=30.0, **other)
                assert await becomes(lambda: llm.asked == 4)
                with pytest.raises(grpc.aio.AioRpcError) as full:
                    await stub.Score(request(), timeout=5.0, **other)
                assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "4 requests are being answered" in full.value.details()

                mine.pop().cancel()
                await asyncio.sleep(0.05)
                mine.append(stub.Score(request(), timeout=30.0, **own))
                assert await becomes(lambda: llm.asked == 5)
                llm.open.set()
                await asyncio.gather(*mine, theirs)
                assert await refusal(stub, request(), one) is None

    asyncio.run(main())
