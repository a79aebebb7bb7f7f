"""Selectors that hang, die, are slow or overloaded: who is asked, and what it costs the others.

Servers are real ones on loopback; figures are counts of who was asked.
"""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.scripted import ScriptedSLM
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.types import (
    DecodeOptions,
    DecodeRequest,
    Mode,
    Policy,
    ScoreQuery,
    Trigger,
)
from services.rpc import channels
from services.serve.remote_selector import RemoteSelector
from tests.faults.proxy import FaultProxy
from tests.helpers.selection_server import OPEN, FixedSelection, start_selection_server
from tests.helpers.selectors import LONG_S, NEVER, NO_LLM, QUICK, selectors
from tests.helpers.serving import becomes

# -- one of two -----------------------------------------------------------------------------------


def test_a_hung_selector_is_found_out_once() -> None:
    """It was asked again and again: a call that the engine gave up was no failure of the address,
    and the sequences' order led back to it. The first query is answered by the other one."""

    async def main() -> None:
        async with selectors(2, NEVER) as service:
            first, second = service.fakes
            hung = service.fakes[first]
            names = service.sequences_of(first, 20)
            hung.hang()
            for name in names:
                assert (await service.score(name, patience_s=0.2)).positions[0].top_id == 7
            assert hung.asked == names[:1]
            assert service.fakes[second].asked == names

    asyncio.run(main())


def test_a_selector_is_used_again_when_it_answers_a_probe() -> None:
    """Probes are copies: no answer waits for one, and only one is under way."""

    async def main() -> None:
        async with selectors(2) as service:
            first, second = service.fakes
            hung = service.fakes[first]
            names = service.sequences_of(first, 3)
            hung.hang()
            await service.score(names[0], patience_s=0.1)
            await service.score(names[1], patience_s=LONG_S)  # probes now wait for as long
            assert await becomes(lambda: hung.probes == 1)
            await asyncio.sleep(10 * QUICK.longest_s)
            assert hung.probes == 1, "one probe at a time"
            assert service.client.replicas_for(names[2]) == [second]
            hung.go_on()
            assert await becomes(lambda: service.client.replicas_for(names[2])[:1] == [first])
            await service.score(names[2])
            assert hung.asked == [names[0], names[2]]

    asyncio.run(main())


@pytest.mark.parametrize("only_scores_hang", [True, False])
def test_with_all_hung_every_step_degrades_at_once(only_scores_hang: bool) -> None:
    """Not after the timeout each, whatever hangs: the LLM alone or the whole process."""

    async def main() -> None:
        async with selectors(2) as service:
            for fake in service.fakes.values():
                fake.only_scores_hang = only_scores_hang
                fake.hang()
            with pytest.raises(SelectorUnavailableError):
                await service.score("s", patience_s=0.1)
            for number in range(50):
                with pytest.raises(SelectorUnavailableError):
                    await asyncio.wait_for(service.score(str(number), LONG_S), 1.0)
            assert not service.client.reachable
            for fake in service.fakes.values():
                assert fake.asked == ["s"]
                fake.go_on()
            assert await becomes(lambda: len(service.client.replicas_for("s")) == 2)

    asyncio.run(main())


def test_a_slow_selector_is_left_out_when_the_other_is_quicker() -> None:
    async def main() -> None:
        async with selectors(2, NEVER) as service:
            first, second = service.fakes
            slow = service.fakes[first]
            slow.delay_s = 30.0
            names = service.sequences_of(first, 5)
            for name in names:
                await service.score(name, patience_s=0.2)
            assert slow.asked == names[:1] and service.fakes[second].asked == names

    asyncio.run(main())


def test_a_dead_selector_comes_back_on_its_address() -> None:
    async def main() -> None:
        async with selectors(2) as service:
            first, second = service.fakes
            names = service.sequences_of(first, 3)
            await service.stop(first)
            for name in names:
                await service.score(name)
            assert service.fakes[second].asked == names
            assert not service.fakes[first].asked
            await service.start(first, FixedSelection())
            assert await becomes(lambda: service.client.replicas_for(names[0])[:1] == [first])

    asyncio.run(main())


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.CANCELLED,
    ],
    ids=lambda status: status.name,
)
def test_a_selector_that_refuses_is_left_out(status: grpc.StatusCode) -> None:
    """Overloaded, broken or misconfigured: the next one is asked, at once."""

    async def main() -> None:
        async with selectors(2, NEVER) as service:
            first, second = service.fakes
            service.fakes[first].status = status
            names = service.sequences_of(first, 3)
            for name in names:
                await service.score(name)
            assert service.fakes[first].asked == names[:1]
            assert service.fakes[second].asked == names

    asyncio.run(main())


# -- what is no failure of a selector -------------------------------------------------------------


def test_a_wrong_query_blames_no_selector() -> None:
    async def main() -> None:
        async with selectors(2, NEVER) as service:
            for fake in service.fakes.values():
                fake.status = grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(InvalidRequestError):
                await service.score("s")
            assert len(service.client.replicas_for("s")) == 2
            assert sum(len(fake.asked) for fake in service.fakes.values()) == 1

    asyncio.run(main())


def test_a_query_beyond_the_message_limit_is_not_sent() -> None:
    """gRPC would refuse it with the status of an overloaded server, at each selector in turn."""

    async def main() -> None:
        async with selectors(1, NEVER) as service:
            query = ScoreQuery(
                token_ids=(100_000,) * (channels.MAX_MESSAGE_BYTES // 3 + 1),
                positions=(0,),
                candidate_ids=((),),
            )
            (future,) = service.client.submit([query])
            with pytest.raises(InvalidRequestError, match="bytes; selectors take"):
                await asyncio.wrap_future(future)
            assert service.client.reachable

    asyncio.run(main())


def test_a_torn_connection_is_no_dead_selector() -> None:
    """A query that was under way is sent once more over a new connection: nothing is degraded, and
    the only selector stays in use. It was left out until a probe came back, for each reset."""

    async def main() -> None:
        fake = FixedSelection(delay_s=0.2)
        server, address = await start_selection_server(OPEN, selection=fake)
        proxy = FaultProxy(int(address.rpartition(":")[2]))

        async def find() -> list[str]:
            return [f"127.0.0.1:{proxy.port}"]

        client = RemoteSelector(find, OPEN, "tok", NO_LLM, NEVER)
        await client.refresh()
        query = ScoreQuery(
            token_ids=(1, 2),
            positions=(1,),
            candidate_ids=((4, 5),),
            sequence_id="s",
            patience_s=LONG_S,
        )
        (future,) = client.submit([query])
        assert await becomes(lambda: fake.asked == ["s"])
        proxy.reset()
        reply = await asyncio.wait_for(asyncio.wrap_future(future), 30.0)
        assert reply.positions[0].top_id == 7 and fake.asked == ["s", "s"]
        assert client.reachable
        await client.close()
        await server.stop(None)
        proxy.close()

    asyncio.run(main())


@pytest.mark.parametrize("late", [False, True])
def test_giving_up_a_query_is_a_failure_only_when_it_was_late(late: bool) -> None:
    """A client that goes away and a draft that is rejected cancel queries too."""

    async def main() -> None:
        async with selectors(1, NEVER) as service:
            [(_, fake)] = service.fakes.items()
            fake.hang()
            asking = asyncio.ensure_future(service.score("s", patience_s=0.2 if late else LONG_S))
            assert await becomes(lambda: fake.asked == ["s"])
            await asyncio.sleep(0.15 if late else 0.0)
            asking.cancel()
            await becomes(lambda: not service.client.reachable, within_s=0.1)
            assert service.client.reachable is not late

    asyncio.run(main())


# -- discovery ------------------------------------------------------------------------------------


def test_a_black_hole_holds_up_no_other_selector() -> None:
    """Addresses were asked one after another, five seconds for each that is silent."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
            server, address = await start_selection_server(OPEN)
            hole = f"127.0.0.1:{silent.getsockname()[1]}"

            async def find() -> list[str]:
                return [hole, address]

            client = RemoteSelector(find, OPEN, "tok", NO_LLM)
            refreshing = asyncio.ensure_future(client.refresh())
            assert await becomes(lambda: client.reachable)
            assert not refreshing.done()
            assert client.replicas_for("s") == [address]
            await asyncio.wait_for(refreshing, 4.0)  # a description is waited for 5 s
            await client.close()
            await server.stop(None)

    asyncio.run(main())


# -- whole answers --------------------------------------------------------------------------------


def test_answers_beside_a_hung_selector() -> None:
    """Eight answers, two selectors, one of which hangs from the first token on: no step is
    degraded, and the LLM is asked at most 1.5 times as often."""
    words = [f"w{i}" for i in range(10)]  # the fake dislikes id 13
    slm = ScriptedSLM(words)
    requests = [
        DecodeRequest(
            request_id=f"answer-{i}",
            token_ids=(slm.tokenizer.id_of("w0"),),
            options=DecodeOptions(policy=Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS)),
        )
        for i in range(8)
    ]

    def decode(engine: Engine) -> int:
        while not engine.idle:
            engine.step()
            engine.wait()
        return sum(len(sequence.steps) for sequence in sequences)

    async def main() -> None:
        async with selectors(2, eos_ids=(0,)) as service:
            first, second = service.fakes.values()
            first.hang()
            engine = Engine(slm, service.client, selection_timeout_s=1.0)
            sequences.extend(engine.add(request) for request in requests)
            steps = await asyncio.to_thread(decode, engine)
            assert steps == 8 * (len(words) + 1)
            degraded = [s.degraded for sequence in sequences for s in sequence.steps]
            assert set(degraded) == {""}
            assert 0 < len(first.asked) <= 8, "each answer meets it once at most"
            assert len(second.asked) == steps
            assert len(first.asked) + len(second.asked) <= 1.5 * steps

    sequences: list = []
    asyncio.run(main())
