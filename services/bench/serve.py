"""`s2t bench serve`: the whole service against the engine inside it, concurrency against one by
one, and a soak."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from s2t_shared.config import load_config
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import InvalidRequestError, S2TError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.requests import new_request
from s2t_shared.types import GenerateRequest, Policy, Sampling
from services.bench import workload
from services.bench.measure import Figure, Report, figure, ratios, take_turns
from services.bench.streams import Streamed, by_grpc, by_http, compared
from services.bench.workload import Settings
from services.launch.local import RunningService, running_service
from services.rpc.ask_many import AsyncCaller, Target, bounded

SAMPLE_S = 5.0
# kept contexts fill the pools up to their bound by design: so small that warm-up fills them
SOAK_KV_GIB = 0.05


def bench_serve(
    settings: Settings, batch: int, on_turn: Callable[[], None] = lambda: None
) -> Report:
    """Greedy answers, streamed through gateway, gRPC or HTTP, and Serve, against the same engine in
    this process; with an LLM also requests of every mode at once against one after another."""
    models = workload.load(settings)
    prompts = workload.prompts(models.tokenizer, workload.ragged_lengths(batch, settings.prefix))
    turns = {side: iter(range(10_000)) for side in ("in process", "gRPC", "HTTP")}
    seen: dict[str, list[Streamed]] = {"gRPC": [], "HTTP": []}

    def fresh(side: str) -> list[tuple[int, ...]]:
        """Another first token each turn, so that the service cannot reuse what it read in an
        earlier one, nor by the other transport."""
        n = 2 * next(turns[side]) + (side == "HTTP")
        return [(20 + n, *ids[1:]) for ids in prompts]

    def in_process() -> float:
        result = workload.run(
            models, [Policy()] * batch, fresh("in process"), settings.new, engine=_plain(batch)
        )
        return result.seconds / result.tokens

    figures: list[Figure] = []
    with _service(settings, batch) as service:

        def served(side: str) -> float:
            requests = [_greedy(ids, settings.new) for ids in fresh(side)]
            if side == "gRPC":
                turn = by_grpc(service.address, requests)
            else:
                turn = by_http(service.url, service.config.served_model_name, requests)
            seen[side].append(turn)
            return turn.seconds / turn.tokens

        seconds = take_turns(
            {
                "in process": in_process,
                "gRPC": lambda: served("gRPC"),
                "HTTP": lambda: served("HTTP"),
            },
            settings.repeats,
            on_turn,
        )
        conditions = f"batch {batch}, prefix {settings.prefix} ragged, up to {settings.new} new"
        figures.append(
            figure("in process", [1 / s for s in seconds["in process"]], "tokens/s", conditions)
        )
        figures.append(
            figure("streamed through the service", [1 / s for s in seconds["gRPC"]], "tokens/s")
        )
        figures.append(
            figure(
                "service / in process, tokens per second",
                ratios(seconds["in process"], seconds["gRPC"]),
                "x",
            )
        )
        figures += compared(seen["HTTP"], seen["gRPC"])
        if settings.llm:
            turn = iter(range(1000, 10_000))

            def mixed(concurrency: int) -> Callable[[], float]:
                return lambda: _stream_all(
                    service, _mixed(prompts, settings.new, next(turn)), concurrency
                )

            seconds = take_turns(
                {"together": mixed(batch), "one by one": mixed(1)},
                max(1, settings.repeats // 2),
                on_turn,
            )
            figures.append(
                figure(
                    f"{batch} requests of mixed modes: together / one after another, tokens per "
                    "second",
                    ratios(seconds["one by one"], seconds["together"]),
                    "x",
                    ", ".join(MODES),
                )
            )
    return Report(f"serve: {settings.slm}, {settings.dtype}", tuple(figures))


def soak(
    settings: Settings, minutes: float, batch: int, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Mixed load for so long; the slope of the resident memory of all the service's processes after
    the first fifth of the time (warm-up, in which the KV pools fill up to their bound)."""
    if minutes < 2:
        raise InvalidRequestError(
            f"--soak-minutes={minutes:g}: too short for a slope; give at least 2"
        )
    tokenizer = Tokenizer.load(resolve_model(settings.slm))
    samples: list[tuple[float, float]] = []
    tokens = failed = rounds = 0
    with _service(settings, batch, SOAK_KV_GIB) as service:
        started = last = time.monotonic()
        while time.monotonic() - started < 60 * minutes:
            prompts = workload.prompts(
                tokenizer, workload.ragged_lengths(batch, settings.prefix), rounds
            )
            answers = asyncio.run(
                _stream(service.address, _mixed(prompts, settings.new, rounds), batch)
            )
            tokens += sum(answers)
            failed += sum(n == 0 for n in answers)
            rounds += 1
            if time.monotonic() - last >= SAMPLE_S:
                last = time.monotonic()
                samples.append(((last - started) / 60, _resident_mb()))
                say(
                    f"{samples[-1][0]:6.1f} min  {samples[-1][1]:8.1f} MB  {tokens} tokens, "
                    f"{failed} failed"
                )
    warm = [s for s in samples if s[0] >= minutes / 5]
    slope = statistics.linear_regression([t for t, _ in warm], [m for _, m in warm]).slope
    thirds = [warm[i * len(warm) // 3 : (i + 1) * len(warm) // 3] for i in range(3)]
    slopes = [
        statistics.linear_regression([t for t, _ in p], [m for _, m in p]).slope for p in thirds
    ]
    return Report(
        f"soak: {settings.slm}",
        (
            Figure(
                name="resident memory of all processes, slope",
                median=slope,
                low=min(slopes),
                high=max(slopes),
                unit="MB/min",
                conditions=(
                    f"{minutes:g} min, first fifth left out; min - max of thirds; "
                    f"{rounds * batch} requests of mixed modes"
                ),
            ),
            Figure(
                name="resident memory at the end",
                median=warm[-1][1],
                low=warm[0][1],
                high=max(m for _, m in warm),
                unit="MB",
                conditions=(
                    f"min: at the start of the measured time; {tokens} tokens, {failed} failed"
                ),
            ),
        ),
    )


MODES = (
    "greedy",
    "sample",
    "s2t entropy",
    "s2t kl",
    "takeover kl",
    "s2t_local random",
    "llm",
    "majority@2",
)


def _mixed(prompts: Sequence[Sequence[int]], new: int, turn: int) -> list[GenerateRequest]:
    """One request a prompt, of another mode each."""
    requests = []
    for i, ids in enumerate(prompts):
        mode, _, trigger = MODES[i % len(MODES)].partition(" ")
        request = new_request(
            [20 + turn % 80, *ids[1:]],
            mode,
            trigger=trigger or "entropy",
            budget=0.05,
            max_new_tokens=new,
            version="" if mode == "s2t_local" else None,
            sampling=Sampling(seed=turn),
            request_id=f"mixed-{turn}-{i}",
        )
        options = replace(request.options, fresh_selections=True)
        requests.append(replace(request, options=options))
    return requests


def _greedy(ids: Sequence[int], new: int) -> GenerateRequest:
    return new_request(ids, "greedy", max_new_tokens=new, request_id=f"greedy-{ids[0]}-{len(ids)}")


def _stream_all(
    service: RunningService, requests: Sequence[GenerateRequest], concurrency: int
) -> float:
    """Seconds per token."""
    started = time.perf_counter()
    tokens = asyncio.run(_stream(service.address, requests, concurrency))
    return (time.perf_counter() - started) / sum(tokens)


async def _stream(address: str, requests: Sequence[GenerateRequest], concurrency: int) -> list[int]:
    """Tokens of every answer; 0 where it failed."""
    target = Target(address)
    async with target.open_channel() as channel:
        caller = AsyncCaller(target, channel)

        async def one(request: GenerateRequest) -> int:
            tokens = 0
            try:
                async for piece in caller.stream(request, timeout_s=600.0):
                    if piece.answer is not None:
                        tokens = piece.answer.usage.completion_tokens
            except S2TError:
                return 0
            return tokens

        return await bounded(requests, one, concurrency)


def _plain(batch: int) -> Callable[[Proposer], Engine]:
    return lambda proposer: Engine(proposer, max_num_seqs=batch)


def _resident_mb() -> float:
    """Of this process and everything it started."""
    total = 0
    for process in [
        psutil.Process(os.getpid()),
        *psutil.Process(os.getpid()).children(recursive=True),
    ]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / (1 << 20)


@contextmanager
def _service(settings: Settings, batch: int, kv_gib: float = 2.0) -> Iterator[RunningService]:
    with tempfile.TemporaryDirectory(prefix="s2t-bench-") as folder:
        model = {
            "dtype": settings.dtype,
            "device": settings.device,
            "threads": settings.threads,
            "kv_gib": kv_gib,
        }
        overrides = {
            f"slm.{key}": value for key, value in ({"model": settings.slm} | model).items()
        }
        if settings.llm:
            overrides |= {
                f"llm.{key}": value for key, value in ({"model": settings.llm} | model).items()
            }
        config = load_config(
            None,
            overrides
            | {
                "data_dir": str(Path(folder)),
                "gateway.port": 0,
                "selector.replicas": 1 if settings.llm else 0,
                "proposer.max_num_seqs": max(32, batch),
                "proposer.selection_timeout_s": 60.0,
                "calibration.count": 8,
                "calibration.max_new_tokens": 24,
                "proposer.num_cpus": 0.5,
                "selector.num_cpus": 0.5,
            },
        )
        with running_service(config) as service:
            yield service
