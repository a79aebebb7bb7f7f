"""`s2t bench selector`: what a `Score` costs beyond the model's own time, and how the LLM side
batches."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import LLMSelector, PendingQuery
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply
from services.bench import workload
from services.bench.measure import Report, figure, ratios, take_turns
from services.bench.workload import Settings
from services.rpc import channels
from services.serve.remote_selector import RemoteSelector
from services.serve.selector_server import SelectionServicer
from services.serve.selector_thread import SelectorThread

CALLS = 200
GAP = 16


class InstantScorer:
    """Answers at once, so that what is left is the hop."""

    def __init__(self, info: LLMInfo) -> None:
        self.info, self._pending = info, list[PendingQuery]()

    def check(self, query: ScoreQuery) -> None:
        pass

    def add(self, query: ScoreQuery, is_wanted: Callable[[], bool]) -> PendingQuery:
        self._pending.append(PendingQuery(query, is_wanted))
        return self._pending[-1]

    @property
    def idle(self) -> bool:
        return not self._pending

    def step(self) -> list[tuple[PendingQuery, ScoreReply | None]]:
        done, self._pending = self._pending, []
        return [
            (
                p,
                ScoreReply(
                    tuple(PositionScores((-1.0,) * len(g), 0) for g in p.query.candidate_ids)
                ),
            )
            for p in done
        ]


def bench_selector(settings: Settings, on_turn: Callable[[], None] = lambda: None) -> Report:
    """One client as a proposer has it, one server process, on loopback. `settings.slm` plays the
    LLM."""
    torch.set_num_threads(settings.threads)
    tokenizer = Tokenizer.load(resolve_model(settings.slm))
    (ids,) = workload.prompts(tokenizer, [settings.prefix])
    candidates = tuple(range(10, 10 + settings.k))

    def query(tokens: Sequence[int], name: str = "bench") -> ScoreQuery:
        return ScoreQuery(
            token_ids=tuple(tokens),
            positions=(len(tokens) - 1,),
            candidate_ids=(candidates,),
            sequence_id=name,
        )

    figures = []
    with _served(settings, instant=True) as client:
        hops = _latencies(client, [query(ids)] * CALLS)
        checks = ScoreQuery(
            token_ids=ids,
            positions=tuple(range(len(ids) - 16, len(ids))),
            candidate_ids=(tuple(range(10, 74)),) * 16,
        )
        chunk_hops = _latencies(client, [checks] * CALLS)
    for name, values in (("one position", hops), ("16 positions of 64 candidates", chunk_hops)):
        figures.append(
            figure(
                f"Score hop, {name}, p50 of {CALLS}",
                [1e3 * statistics.median(part) for part in _fifths(values)],
                "ms",
                f"context {settings.prefix}, an LLM that answers at once",
            )
        )
        figures.append(
            figure(f"Score hop, {name}, p99", [1e3 * statistics.quantiles(values, n=100)[98]], "ms")
        )
    with _served(settings, instant=False) as client:

        def one_by_one() -> float:
            return sum(_latencies(client, contexts()))

        def together() -> float:
            started = time.perf_counter()
            for future in client.submit(contexts()):
                future.result()
            return time.perf_counter() - started

        turn = iter(range(10_000))

        def contexts() -> list[ScoreQuery]:
            """16 sequences whose context the LLM holds but for a gap; every gap is new."""
            n = next(turn)
            return [
                query([*prompt, *(20 + (7 * n + i + j) % 500 for j in range(GAP))], str(i))
                for i, prompt in enumerate(prompts)
            ]

        prompts = workload.prompts(tokenizer, [settings.prefix] * 16)
        for future in client.submit([query(p, str(i)) for i, p in enumerate(prompts)]):
            future.result()
        seconds = take_turns(
            {"one by one": one_by_one, "together": together}, settings.repeats, on_turn
        )
        cold = _latencies(
            client, [query(list(reversed(p)), f"cold-{i}") for i, p in enumerate(prompts[:5])]
        )
    figures += [
        figure(
            f"16 scores with gaps of {GAP}: one after another / together",
            ratios(seconds["one by one"], seconds["together"]),
            "x",
            f"context {settings.prefix} held",
        ),
        figure(
            "score of a context never seen / held but for the gap",
            [16 * c / s for c, s in zip(cold, seconds["one by one"], strict=False)],
            "x",
            f"context {settings.prefix}: what telling contexts ahead can save",
        ),
    ]
    return Report(f"selector: {settings.slm}, {settings.dtype}", tuple(figures))


def _latencies(client: RemoteSelector, queries: Sequence[ScoreQuery]) -> list[float]:
    seconds = []
    for query in queries:
        started = time.perf_counter()
        client.submit([query])[0].result()
        seconds.append(time.perf_counter() - started)
    return seconds


def _fifths(values: Sequence[float]) -> list[Sequence[float]]:
    size = len(values) // 5
    return [values[i * size : (i + 1) * size] for i in range(5)]


@contextmanager
def _served(settings: Settings, instant: bool) -> Iterator[RemoteSelector]:
    """A selector server in a process of its own, and a proposer's client of it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(settings, instant, theirs), daemon=True)
    server.start()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        address, info = ours.recv()

        async def addresses() -> list[str]:
            return [address]

        async def connect() -> RemoteSelector:
            client = RemoteSelector(addresses, SecurityConfig(), info.tokenizer_digest, info)
            await client.refresh()
            return client

        yield asyncio.run_coroutine_threadsafe(connect(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.terminate()
        server.join()


def _serve(settings: Settings, instant: bool, pipe: Connection) -> None:
    async def main() -> None:
        torch.set_num_threads(settings.threads)
        digest = Tokenizer.load(resolve_model(settings.slm)).digest
        if instant:
            scorer: LLMSelector | InstantScorer = InstantScorer(
                LLMInfo("instant", digest, frozenset(), 1 << 20)
            )
        else:
            scorer = LLMSelector(
                ModelRuntime.load(settings.slm, settings.dtype, settings.device, workload.KV_BYTES),
                digest,
            )
        server = channels.new_server(SecurityConfig())
        SelectionServicer(SelectorThread(scorer), SelectorConfig()).add_to(server)  # type: ignore[arg-type]
        port = channels.bind(server, "127.0.0.1", 0, SecurityConfig(), "port")
        await server.start()
        pipe.send((f"127.0.0.1:{port}", scorer.info))
        await server.wait_for_termination()

    asyncio.run(main())
