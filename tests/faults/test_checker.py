"""The checker finds what it is there for: a sound history, and one for each way to break it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.faults import script
from tests.faults.checker import violations
from tests.faults.history import Record
from tests.faults.proxy import Fault, FaultProxy

UNSURE = 4
VITALS = {
    "kind": "vitals",
    "part": "proposer",
    "pid": 7,
    "kv_slots": 0,
    "running": 0,
    "tasks": 9,
    "fds": 20,
    "threads": 12,
    "rss_mb": 100.0,
}


def sound() -> list[Record]:
    """One s2t answer of six tokens; at the fifth, the LLM was asked."""
    ids = [script.word_id(i) for i in range(6)]
    ids[UNSURE] = script.OTHER_ID
    tokens = [[i, ids[i], "llm" if i == UNSURE else "", ""] for i in range(6)]
    text = script.TOKENIZER.decode(ids)
    asked = {"mode": "s2t", "prompt": "1", "labels": "durable", "streams": True}
    records: list[Record] = [
        {"kind": "vitals", "when": "before", **VITALS},
        {"kind": "request", "id": "r", "is_scripted": True, **asked},
        {"kind": "piece", "id": "r", "tokens": tokens[:3], "text": text},
        {"kind": "piece", "id": "r", "tokens": tokens[3:], "text": ""},
        {
            "kind": "answer",
            "id": "r",
            "token_ids": ids,
            "text": text,
            "version": "v1",
            "degraded": 0,
            "stored": 1,
        },
        {"kind": "lake", "labels": {"r": 1}},
        {"kind": "vitals", "when": "after", **VITALS},
    ]
    return [{"t": float(i), **copy.deepcopy(record)} for i, record in enumerate(records)]


def error(**changes: object) -> Record:
    fields = {"status": "UNAVAILABLE", "reason": "STORE", "retry_after_s": None, "bytes": 99}
    return {"t": 4.0, "kind": "error", "id": "r", "text": "", **fields, **changes}


def set_token(records: list[Record], *changed: object) -> None:
    """Of the position where the LLM was asked."""
    records[3]["tokens"][1] = [UNSURE, *changed]
    records[4]["token_ids"][UNSURE] = changed[0]


SPOILT: dict[str, Callable[[list[Record]], object]] = {
    "ended 0 times": lambda r: r.pop(4),
    "ended 2 times": lambda r: r.insert(4, dict(r[4])),
    "went on behind its end": lambda r: r[3].update(t=99.0),
    "lost, doubled": lambda r: r[3]["tokens"].pop(0),
    "lost, doubled or": lambda r: r[3]["tokens"].insert(0, r[2]["tokens"][-1]),
    "answered": lambda r: r[4]["token_ids"].pop(),
    "the pieces' text": lambda r: r[4].update(text="another"),
    "expected": lambda r: set_token(r, script.OTHER_ID, "", "late"),
    "decided by LLM ''": lambda r: set_token(r, script.word_id(UNSURE), "", ""),
    "nobody was needed there": lambda r: r[2]["tokens"][0].__setitem__(3, "late"),
    "says 3 degraded": lambda r: r[4].update(degraded=3),
    "two LLMs": lambda r: r[2]["tokens"][0].__setitem__(2, "another"),
    "not what version v1 says": lambda r: r.append(
        {
            "t": 9.0,
            "kind": "replay",
            "mode": "s2t",
            "version": "v1",
            "prompt": "1",
            "token_ids": [1],
        }
    ),
    "undocumented error": lambda r: r.__setitem__(4, error(status="INTERNAL", reason="INTERNAL")),
    "failed: ('UNAVAILABLE', 'STORE')": lambda r: r.__setitem__(4, error()),
    "without RetryInfo": lambda r: r.__setitem__(
        4, error(status="RESOURCE_EXHAUSTED", reason="OVERLOADED")
    ),
    "an error of 2000 bytes": lambda r: r.__setitem__(4, error(bytes=2000)),
    "1 labels acknowledged, 0 in the lake": lambda r: r[5].update(labels={}),
    "nobody looked into the lake": lambda r: r.pop(5),
    "still holds 3 kv_slots": lambda r: r[-1].update(kv_slots=3),
    "fds grew from 20 to 99": lambda r: r[-1].update(fds=99),
    "tasks grew": lambda r: r[-1].update(tasks=99),
    "memory grew": lambda r: r[-1].update(rss_mb=900.0),
}


def test_a_sound_history_has_no_violations() -> None:
    assert violations(sound()) == []


@pytest.mark.parametrize("expected", SPOILT)
def test_each_breach_is_found(expected: str) -> None:
    records = sound()
    SPOILT[expected](records)
    assert any(expected in text for text in violations(records)), violations(records)


def test_errors_that_a_fault_may_cause_are_allowed_by_name() -> None:
    records = sound()
    records[4] = error()
    assert violations(records, allowed={"STORE"}) == []


# -- the proxy ------------------------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    ("fault", "least_s"),
    [
        (Fault(), 0.0),
        (Fault(latency_s=0.1), 0.2),
        (Fault(bytes_per_s=40_000), 0.1),
        (Fault(slice_bytes=500), 0.0),
    ],
    ids=["none", "latency", "bandwidth", "slices"],
)
def test_the_proxy_delays_and_loses_nothing(fault: Fault, least_s: float) -> None:
    sent = bytes(range(256)) * 32

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = FaultProxy(server.sockets[0].getsockname()[1])
        proxy.fault = fault
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        assert loop.time() - begun >= least_s
        writer.close()
        proxy.close()
        server.close()

    asyncio.run(main())


def test_the_proxy_is_silent_resets_and_flips() -> None:
    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = FaultProxy(server.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        proxy.fault = Fault(is_black_hole=True)
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        await asyncio.to_thread(proxy.reset)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        proxy.fault = Fault(flip_share=1.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(bytes(1000))
        changed = await reader.readexactly(1000)
        assert 1 <= sum(byte != 0 for byte in changed) <= 40, "a byte of each chunk"
        writer.close()
        proxy.close()
        server.close()

    asyncio.run(main())
