"""What a replica raised, and what Ray and Serve raise when there is no replica."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from s2t_shared.errors import InvalidRequestError, OverloadedError, ProposerLostError
from s2t_shared.types import GenerateRequest, Prompt, ServiceDescription
from services.serve import serve_proposers
from services.serve.serve_proposers import ServeProposers

REQUEST = GenerateRequest(request_id="r", prompt=Prompt(text="x"))


class FailingHandle:
    """Stands for Serve's handle and its responses: every call fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.stream = self.answer = self.describe = self

    def options(self, stream: bool) -> FailingHandle:
        return self

    def remote(self, *arguments: Any) -> FailingHandle:
        return self

    def cancel(self) -> None:
        pass

    def __await__(self) -> Any:
        raise self._error
        yield

    def __aiter__(self) -> FailingHandle:
        return self

    async def __anext__(self) -> Any:
        raise self._error


def raised_by_a_replica(error: Exception) -> Exception:
    """As Ray hands it on: an error of both classes, with the original as its cause."""
    found: Exception = RayTaskError("stream", "traceback", error).as_instanceof_cause()
    return found


ERRORS = {
    "ours": (raised_by_a_replica(InvalidRequestError("budget=2")), InvalidRequestError),
    "a bug": (raised_by_a_replica(KeyError("x")), KeyError),
    "busy": (BackPressureError(1, 1), OverloadedError),
    "no replica": (DeploymentUnavailableError(None), ProposerLostError),
    "dead": (ActorDiedError(), ProposerLostError),
    "dead while it answered": (raised_by_a_replica(ActorDiedError()), ProposerLostError),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["stream", "answer", "describe"])
def test_errors_of_ray_end_here(name: str, call: str) -> None:
    given, expected = ERRORS[name]
    proposers = ServeProposers(FailingHandle(given))

    async def main() -> None:
        if call == "stream":
            async for _ in proposers.stream(REQUEST):
                pass
        elif call == "answer":
            await proposers.answer(REQUEST)
        else:
            await proposers.describe()

    with pytest.raises(expected) as caught:
        asyncio.run(main())
    assert type(caught.value) is expected


class DescribingHandle(FailingHandle):
    """Stands for Serve's handle: every call is answered with `description`."""

    def __init__(self, description: ServiceDescription) -> None:
        super().__init__(AssertionError())
        self._description = description

    def __await__(self) -> Any:
        return self._description
        yield


def test_the_replicas_that_run_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harvest takes its concurrency from it; it used to be the configured number, whatever ran.
    Any client may ask, so Serve's controller is not asked every time."""
    counts = iter([2, 5])
    description = ServiceDescription(
        slm_digest="s", tokenizer_digest="t", template_digest="p", llm_digest="l", max_length=9
    )
    proposers = ServeProposers(DescribingHandle(description), lambda: next(counts))

    async def main() -> list[int]:
        first = [(await proposers.describe()).proposers for _ in range(5)]
        monkeypatch.setattr(serve_proposers, "COUNT_EVERY_S", 0.0)
        return [*first, (await proposers.describe()).proposers]

    assert asyncio.run(main()) == [2, 2, 2, 2, 2, 5]
