"""A vLLM that hangs is noticed. Needs no vLLM: its engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from s2t_shared.decode import vllm_selector
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.vllm_selector import VLLMSelector


class FakeEngine:
    """hangs: answers nothing."""

    hangs = False

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        if self.hangs:
            await asyncio.sleep(60)
        yield SimpleNamespace(outputs=[7])


def test_a_vllm_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who ask it give up after seconds and ask again: each alone looks like a cancel."""
    now = [100.0]
    monkeypatch.setattr(vllm_selector, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def main() -> None:
        engine = FakeEngine()
        selector = VLLMSelector(engine, LLMInfo("llm", "tok", frozenset(), 9), 50)  # type: ignore[arg-type]

        async def ask_and_give_up() -> None:
            call = asyncio.create_task(selector._run((1,), None))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

        assert await selector._run((1,), None) == 7  # type: ignore[arg-type]
        now[0] += 1000
        assert selector.silent_s == 0, "nobody asks"
        engine.hangs = True
        await ask_and_give_up()
        now[0] += 1000
        assert selector.silent_s == 0, "a client that went away"
        for _ in range(vllm_selector.MIN_UNANSWERED):
            now[0] += 2
            await ask_and_give_up()
        assert selector.silent_s > 1000
        engine.hangs = False
        await selector._run((1,), None)  # type: ignore[arg-type]
        assert selector.silent_s == 0

    asyncio.run(main())
