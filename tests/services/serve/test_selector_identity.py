"""Which LLM answered, and whether what it says can be true."""

from __future__ import annotations

import asyncio
import math

import pytest

from s2t_shared.errors import SelectorUnavailableError, TokenizerMismatchError
from s2t_shared.pb.v1 import selection_pb2 as pb
from tests.helpers.selection_server import FixedSelection
from tests.helpers.selectors import NEVER, selectors
from tests.helpers.serving import becomes

# -- another LLM ----------------------------------------------------------------------------------


def test_another_llm_on_the_same_address_is_noticed_at_its_next_reply() -> None:
    """Only new addresses were asked which LLM they run, so scores of the new LLM went under the old
    digest: into Steps, labels and thresholds."""

    async def main() -> None:
        async with selectors(1) as service:
            [(_, fake)] = service.fakes.items()
            assert (await service.score("s")).llm_digest == "llm"
            fake.digest = "new"
            with pytest.raises(SelectorUnavailableError, match="replaced"):
                await service.score("s")
            assert await becomes(lambda: service.client.info.digest == "new")
            assert (await service.score("s")).llm_digest == "new"

    asyncio.run(main())


def test_a_restart_with_another_llm() -> None:
    async def main() -> None:
        async with selectors(1) as service:
            [(address, _)] = service.fakes.items()
            await service.stop(address)
            await service.start(address, FixedSelection(digest="new"))
            digests = []
            while "new" not in digests:
                try:
                    digests.append((await service.score("s")).llm_digest)
                except SelectorUnavailableError:
                    await asyncio.sleep(0.01)
            assert digests == ["new"]
            assert service.client.info.digest == "new"

    asyncio.run(asyncio.wait_for(main(), 10.0))


def test_a_foreign_tokenizer_on_a_known_address_is_refused() -> None:
    """Its ids mean other texts: not one reply may be used, even under the same LLM digest."""

    async def main() -> None:
        async with selectors(1) as service:
            [(_, fake)] = service.fakes.items()
            await service.score("s")
            fake.tokenizer_digest = "other"
            with pytest.raises(SelectorUnavailableError, match="replaced"):
                await service.score("s")
            assert await becomes(lambda: _is_refused(service.client.check_tokenizer))
            with pytest.raises(SelectorUnavailableError):
                await service.score("s")
            fake.tokenizer_digest = "tok"
            assert await becomes(lambda: service.client.reachable)
            service.client.check_tokenizer()
            assert (await service.score("s")).llm_digest == "llm"

    asyncio.run(main())


def _is_refused(check) -> bool:  # type: ignore[no-untyped-def]
    try:
        check()
    except TokenizerMismatchError:
        return True
    return False


def test_a_rolling_change_mixes_no_two_llms() -> None:
    """As long as a selector of the old LLM answers, the new one waits."""

    async def main() -> None:
        async with selectors(2) as service:
            first, second = service.fakes
            names = service.sequences_of(first, 3)
            service.fakes[first].digest = "new"
            for name in names:
                assert (await service.score(name)).llm_digest == "llm"
            link = service.client._links[first]
            assert await becomes(lambda: link.is_closed)
            assert link.info is not None and link.info.digest == "new"
            asked = len(service.fakes[first].asked)
            for name in names:
                assert (await service.score(name)).llm_digest == "llm"
            assert len(service.fakes[first].asked) == asked
            service.fakes[second].digest = "new"
            with pytest.raises(SelectorUnavailableError, match="replaced"):
                await service.score(names[0])
            for name in names:
                assert (await service.score(name)).llm_digest == "new"

    asyncio.run(main())


def test_a_selector_that_sends_no_digest_is_taken_as_it_described_itself() -> None:
    async def main() -> None:
        async with selectors(1) as service:
            [(_, fake)] = service.fakes.items()
            fake.reply = pb.ScoreResponse(log_probs=[-1.0, -2.0], top_ids=[7])
            assert (await service.score("s")).llm_digest == "llm"

    asyncio.run(main())


# -- impossible replies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        pb.ScoreResponse(log_probs=[-1.0, math.nan], top_ids=[7]),
        pb.ScoreResponse(log_probs=[math.nan, -1.0], top_ids=[7]),
        pb.ScoreResponse(log_probs=[-1.0, -math.inf], top_ids=[7]),
        pb.ScoreResponse(log_probs=[math.inf, -math.inf], top_ids=[7]),
        pb.ScoreResponse(log_probs=[-1.0, 0.5], top_ids=[7]),
        pb.ScoreResponse(log_probs=[-1.0, -1e9], top_ids=[7]),
        pb.ScoreResponse(log_probs=[-1.0], top_ids=[7]),
        pb.ScoreResponse(log_probs=[-1.0, -1.0], top_ids=[]),
        pb.ScoreResponse(log_probs=[-1.0, -1.0], top_ids=[50]),
        pb.ScoreResponse(log_probs=[-1.0, -1.0], top_ids=[9]),
    ],
    ids=lambda reply: f"{list(reply.log_probs)}-{list(reply.top_ids)}",
)
def test_a_reply_that_cannot_be_true_is_a_failure(reply: pb.ScoreResponse) -> None:
    """In the modes takeover and llm its top id became a token, and a NaN a label."""

    async def main() -> None:
        async with selectors(2, NEVER) as service:
            first, second = service.fakes
            service.fakes[first].reply = reply
            names = service.sequences_of(first, 2)
            for name in names:
                right = await service.score(name, vocab_size=50, excluded_ids=(9,))
                assert right.positions[0].top_id == 7
            assert service.fakes[first].asked == names[:1]
            assert service.fakes[second].asked == names

    asyncio.run(main())
