"""`s2t bench swap`: a version is made live again and again while answers stream. Counts failed and
mixed answers, and measures how long a request waits for its first piece when it begins at a swap,
against all others.

Two untrained versions that select differently take turns: `prefix` over the base model's KV, and
`joint` over a KV of its own. An answer is mixed when its tokens differ from a replay that names the
version it claims.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from s2t_shared.bundled import BUNDLED, problems
from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import RESERVED_COUNT, reserved_ids
from s2t_shared.requests import new_request
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry
from services.bench.measure import machine
from services.client import Client
from services.launch.local import running_service
from services.rpc.ask_many import AsyncCaller, Target, bounded

PROMPTS = 32
MAX_NEW_TOKENS = 40
BUDGET = 0.2  # so often that the two versions' answers differ
RANK = 8
AFTER_S = 0.5  # a request that begins this long after a swap still counts as begun at it
TAKE_UP_S = 20.0
SIDES = ((SelectorKind.PREFIX, Reading.BASE), (SelectorKind.JOINT, Reading.ADAPTED))


@dataclass
class SwapReport:
    """Times in ms. `first_piece`: from sending a request to its first piece of text. `at_swap`:
    requests that began between a promotion and half a second after it was taken up; `elsewhere`:
    all others. `stall_p99`: by how much the 99th percentile at a swap exceeds the median elsewhere;
    `stall_p99_elsewhere`: the same without any swap, which is what the load itself does.
    `told_apart`: prompts whose answers differ between the versions, of `prompts`: only those can
    show a mixed answer."""

    swaps: int
    requests: int
    failed: int
    mixed: int
    requests_at_swap: int
    prompts: int
    told_apart: int
    first_piece_at_swap: dict[str, float]
    first_piece_elsewhere: dict[str, float]
    stall_p99: float
    stall_p99_elsewhere: float
    longest_gap_at_swap: float
    longest_gap_elsewhere: float
    take_up: dict[str, float]
    answers: dict[str, int]
    conditions: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"machine": machine()}


@dataclass(frozen=True)
class Asked:
    """One streamed answer; moments are `time.monotonic()`. `failure`: "" or the gRPC status."""

    prompt: int
    began: float
    pieces: tuple[float, ...]
    token_ids: tuple[int, ...] = ()
    version: str = ""
    failure: str = ""


@dataclass
class Load:
    """What the streams saw, and when versions were swapped: (promoted, taken up)."""

    asked: list[Asked] = field(default_factory=list)
    swaps: list[tuple[float, float]] = field(default_factory=list)


def bench_swap(
    swaps: int,
    minutes: float,
    concurrency: int,
    slm: str = BUNDLED,
    threads: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> SwapReport:
    """Swap `swaps` times in so many minutes under a steady number of streaming `s2t_local`
    requests.

    Raises: InvalidRequestError: a number is out of range. ConfigError: the service did not take a
        version up.
    """
    if swaps < 1 or concurrency < 1 or minutes * 60 < swaps:
        raise InvalidRequestError(
            f"--swaps={swaps}, --minutes={minutes:g}, --concurrency={concurrency}: at least one "
            "of each, and a second per swap (proposers look for a new version twice a second)"
        )
    with tempfile.TemporaryDirectory(prefix="s2t-swap-") as folder:
        config = _config(folder, slm, threads, concurrency)
        one, other = publish_untrained(config, SIDES)
        versions = (one, other)
        say(f"published {' and '.join(versions)}")
        with running_service(config) as service, Client(service.address) as client:
            _swap_to(client, versions[0])
            load = asyncio.run(
                _run(
                    service.address, client, versions, swaps, minutes * 60 / swaps, concurrency, say
                )
            )
            replays = asyncio.run(_replay(service.address, versions, concurrency))
    return report_of(
        load,
        replays,
        versions,
        f"{concurrency} streams, {minutes:g} min, budget {BUDGET:g}, up to "
        f"{MAX_NEW_TOKENS} tokens, {threads} torch threads, {os.path.basename(slm)}",
    )


def _config(folder: str, slm: str, threads: int, concurrency: int) -> Config:
    return load_config(
        None,
        {
            "data_dir": folder,
            "gateway.port": 0,
            "slm.model": slm,
            "slm.threads": threads,
            "selector.replicas": 0,
            "proposer.max_num_seqs": max(32, concurrency),
            "proposer.num_cpus": 0.5,
            "calibration.count": 16,
            "calibration.max_new_tokens": MAX_NEW_TOKENS,
        },
    )


def publish_untrained(config: Config, sides: Sequence[tuple[SelectorKind, Reading]]) -> list[str]:
    """Publish a random version of each kind; returns their names."""
    runtime = ModelRuntime.load(config.slm.model, config.slm.dtype)
    tokenizer = Tokenizer.load(resolve_model(config.slm.model), config.slm.chat_template)
    reserved, registry = reserved_ids(tokenizer, runtime.vocab_rows), Registry(config.versions)
    names = []
    for seed, (kind, reads) in enumerate(sides):
        selector = random_selector(runtime, reserved, kind, reads, seed)
        names.append(
            registry.publish(
                selector,
                Manifest(
                    version="",
                    kind=kind,
                    reads=reads,
                    temperature=selector.temperature,
                    base_model=str(resolve_model(config.slm.model)),
                    slm_digest=runtime.digest,
                    llm_digest="",
                    tokenizer_digest=tokenizer.digest,
                    reserved_ids=reserved,
                    bins=RESERVED_COUNT,
                    thresholds={},
                    metrics={},
                    snapshot="none",
                    training={},
                    created_at=0.0,
                    files={},
                ),
            ).version
        )
    return names


def random_selector(
    runtime: ModelRuntime, reserved: tuple[int, ...], kind: SelectorKind, reads: Reading, seed: int
) -> LocalSelector:
    """Weights large enough that another seed selects otherwise."""
    plain, generator = (
        new_adapter(runtime.model, RANK, 2.0 * RANK, seed),
        torch.Generator().manual_seed(seed),
    )
    weights = {
        path: (a.detach(), torch.randn(b.shape, generator=generator) * 0.2)
        for path, (a, b) in plain.weights.items()
    }
    deltas = None
    if kind is not SelectorKind.PREFIX:
        deltas = torch.randn(len(reserved), runtime.head.weight.shape[1], generator=generator)
    return LocalSelector(
        version="",
        kind=kind,
        reads=reads,
        reserved_ids=reserved,
        adapter=Adapter(rank=RANK, alpha=2.0 * RANK, weights=weights),
        bin_deltas=deltas,
    )


def _swap_to(client: Client, version: str) -> tuple[float, float]:
    """Returns when it was promoted, and when the proposer said that it serves."""
    started = time.monotonic()
    client.promote(version)
    while client.describe().live_version != version:
        if time.monotonic() - started > TAKE_UP_S:
            raise ConfigError(
                f"the service did not take {version!r} up within {TAKE_UP_S:g} s; its log says why"
            )
        time.sleep(0.05)
    return started, time.monotonic()


async def _run(
    address: str,
    client: Client,
    versions: tuple[str, str],
    swaps: int,
    every_s: float,
    concurrency: int,
    say: Callable[[str], None],
) -> Load:
    load, stop = Load(), asyncio.Event()
    target = Target(address)
    async with target.open_channel() as channel:
        caller = AsyncCaller(target, channel)
        await bounded(
            [(i, None) for i in range(PROMPTS)], lambda item: _ask(caller, *item), concurrency
        )  # first calls

        async def stream(worker: int) -> None:
            n = worker
            while not stop.is_set():
                load.asked.append(await _ask(caller, n % PROMPTS))
                n += concurrency

        workers = [asyncio.create_task(stream(i)) for i in range(concurrency)]
        started = time.monotonic()
        try:
            for n in range(swaps):
                await asyncio.sleep(max(0.0, started + (n + 0.5) * every_s - time.monotonic()))
                load.swaps.append(await asyncio.to_thread(_swap_to, client, versions[(n + 1) % 2]))
                say(
                    f"{time.monotonic() - started:6.1f} s  swap {n + 1} to "
                    f"{versions[(n + 1) % 2]}; {len(load.asked)} answers"
                )
            await asyncio.sleep(max(0.0, started + swaps * every_s - time.monotonic()))
        finally:
            stop.set()
            await asyncio.gather(*workers)
    return load


async def _ask(caller: AsyncCaller, prompt: int, version: str | None = None) -> Asked:
    """One streamed answer, timed piece by piece."""
    request = new_request(
        _PROBLEMS[prompt].prompt,
        "s2t_local",
        budget=BUDGET,
        max_new_tokens=MAX_NEW_TOKENS,
        version=version,
        request_id=f"swap-{time.monotonic_ns()}",
    )
    began = time.monotonic()
    pieces: list[float] = []
    answer = None
    try:
        async for piece in caller.stream(request, timeout_s=60.0):
            pieces.append(time.monotonic())
            answer = piece.answer
    except S2TError as error:
        return Asked(prompt=prompt, began=began, pieces=tuple(pieces), failure=str(error))
    assert answer is not None
    return Asked(
        prompt=prompt,
        began=began,
        pieces=tuple(pieces),
        token_ids=answer.token_ids,
        version=answer.versions.local_selector,
    )


_PROBLEMS = problems.problems("test", PROMPTS)


async def _replay(
    address: str, versions: Sequence[str], concurrency: int
) -> dict[tuple[str, int], tuple[int, ...]]:
    """What each version answers when it is named."""
    target = Target(address)
    async with target.open_channel() as channel:
        caller = AsyncCaller(target, channel)
        asked = await bounded(
            [(i, name) for name in versions for i in range(PROMPTS)],
            lambda item: _ask(caller, *item),
            concurrency,
        )
    return {(a.version, a.prompt): a.token_ids for a in asked}


def report_of(
    load: Load,
    replays: dict[tuple[str, int], tuple[int, ...]],
    versions: tuple[str, str],
    conditions: str,
) -> SwapReport:
    sound = [a for a in load.asked if not a.failure]

    def at_swap(moment: float) -> bool:
        return any(promoted <= moment <= taken_up + AFTER_S for promoted, taken_up in load.swaps)

    first: dict[bool, list[float]] = {True: [], False: []}
    gaps: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    for a in sound:
        first[at_swap(a.began)].append(1e3 * (a.pieces[0] - a.began))
        for before, after in zip(a.pieces, a.pieces[1:], strict=False):
            gaps[at_swap(before)].append(1e3 * (after - before))
    near, rest = _percentiles(first[True]), _percentiles(first[False])
    return SwapReport(
        swaps=len(load.swaps),
        requests=len(load.asked),
        failed=len(load.asked) - len(sound),
        mixed=sum(replays.get((a.version, a.prompt)) != a.token_ids for a in sound),
        requests_at_swap=len(first[True]),
        prompts=PROMPTS,
        told_apart=sum(
            replays.get((versions[0], i)) != replays.get((versions[1], i)) for i in range(PROMPTS)
        ),
        first_piece_at_swap=near,
        first_piece_elsewhere=rest,
        stall_p99=near["p99"] - rest["p50"],
        stall_p99_elsewhere=rest["p99"] - rest["p50"],
        longest_gap_at_swap=max(gaps[True]),
        longest_gap_elsewhere=max(gaps[False]),
        take_up=_percentiles([1e3 * (taken_up - promoted) for promoted, taken_up in load.swaps]),
        answers={name: sum(a.version == name for a in sound) for name in versions},
        conditions=conditions,
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"p50": math.nan, "p99": math.nan, "max": math.nan}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": max(values)}
