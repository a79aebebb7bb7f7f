"""`s2t bench capacity`: what `s2t plan` needs to know of a machine, and how well it then plans.

A service is started and asked by so many clients as there are to be sequences at once; each client
asks again as soon as it is answered. From greedy, `s2t_local` and `llm` at the calibration's
concurrencies the costs of both roles are fitted. Every mode at the other concurrencies is then
compared with the plan; `s2t` was not looked at before.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from s2t_shared.bundled import BUNDLED, problems
from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.local_selector import Reading, SelectorKind
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.requests import new_request
from s2t_shared.types import GenerateRequest, Prompt, Sampling, Usage
from s2t_shared.versions.live import LiveVersions
from services.bench import workload
from services.bench.measure import Figure, Report, figure, machine
from services.bench.swap import publish_untrained
from services.bench.workload import Settings
from services.launch.local import running_service
from services.plan.capacity import Load
from services.plan.costs import Point
from services.plan.demand import Traffic, demand_of
from services.plan.deployment import Assumptions, Deployment, deployment_of, prefill_chunk
from services.plan.measured import Measured
from services.rpc.ask_many import AsyncCaller, Target

SHORT = 4  # new tokens of the answers that tell what a prompt and a request cost
MODES = {"greedy": "greedy", "s2t_local": "s2t_local entropy", "llm": "llm", "s2t": "s2t entropy"}
WARM_UP_S = 0.8
MOST_S = 60.0  # of one measurement
BUNDLED_PROMPTS = 4000
LONGEST = 4096  # tokens of a prompt


@dataclass(frozen=True, kw_only=True)
class Windows:
    """calibrate, validate: clients at once. seconds: of one measurement."""

    calibrate: Sequence[int]
    validate: Sequence[int]
    seconds: float = 2.0


@dataclass(frozen=True)
class Work:
    """One kind of load."""

    mode: str
    concurrency: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Seen:
    """What one kind of load gave: answers a second, and of an answer the mean tokens."""

    work: Work
    answers_per_second: float
    prompt: float
    new: float

    @property
    def tokens_per_second(self) -> float:
        return self.answers_per_second * self.new


def bench_capacity(
    settings: Settings, windows: Windows, on_turn: Callable[[], None] = lambda: None
) -> tuple[Report, Measured]:
    """The planned over the measured tokens per second of every mode, and what to plan with.

    Raises:
        ConfigError: no request was answered.
    """
    works = [*_calibration(settings, windows), *_validation(settings, windows)]
    seen: dict[Work, list[Seen]] = {work: [] for work in works}
    most = max(work.concurrency for work in works)
    with _service(settings, most) as (config, address):
        clients = Clients(settings, address)
        for _ in range(settings.repeats):
            for work in works:  # in turns: a machine's bad minute hits all kinds of load
                seen[work].append(asyncio.run(clients.load(work, windows.seconds)))
                on_turn()
    calibration = [_typical(seen[work]) for work in _calibration(settings, windows)]
    measured = Measured(
        machine=machine(),
        conditions=(
            f"clients {', '.join(map(str, windows.calibrate))}, prompts of {settings.prefix}, up "
            f"to {settings.new} new, {settings.repeats} turns of {windows.seconds:g} s"
        ),
        slm=settings.slm,
        llm=settings.llm,
        points=_points(calibration, settings, config),
    )
    figures = [
        found
        for work in _validation(settings, windows)
        for found in _compared(seen[work], measured, settings, config)
    ]
    return Report(f"capacity: {settings.slm} and {settings.llm}", tuple(figures)), measured


def _calibration(settings: Settings, windows: Windows) -> list[Work]:
    """Every client count in the modes that show one role's work, and short answers to short and
    long prompts, which tell requests, prompt tokens and decode steps apart."""
    most = max(windows.calibrate)
    works = []
    for mode in ("greedy", "s2t_local", "llm"):
        works += [Work(mode, n, settings.prefix, settings.new) for n in windows.calibrate]
        if mode != "s2t_local":
            works += [Work(mode, most, settings.prefix, SHORT)]
            works += [Work(mode, most, 3 * settings.prefix, SHORT)]
    return works


def _validation(settings: Settings, windows: Windows) -> list[Work]:
    return [
        Work(mode, n, settings.prefix, settings.new) for n in windows.validate for mode in MODES
    ]


def _typical(runs: Sequence[Seen]) -> Seen:
    """The turn with the median rate: one that a busy machine spoilt must not spoil the plan."""
    return sorted(runs, key=lambda seen: seen.answers_per_second)[len(runs) // 2]


# -- load -----------------------------------------------------------------------------------------


class Clients:
    """Asks one service."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings = settings
        self._target = Target(address)
        self._prompts = _prompts(settings.slm, Tokenizer.load(resolve_model(settings.slm)))
        self._count = itertools.count()

    async def load(self, work: Work, seconds: float) -> Seen:
        """So many clients for so long, or longer, until some answers have come behind the warm-up.

        Raises:
            ConfigError: too few came.
        """
        usages: list[Usage] = []
        begin = time.perf_counter() + WARM_UP_S
        wanted = 1 + work.concurrency // 4
        ended = 0.0  # when enough was seen

        async with self._target.open_channel() as channel:
            caller = AsyncCaller(self._target, channel)

            async def client() -> None:
                nonlocal ended
                while not ended:
                    usage = await _ask(caller, self._request(work))
                    now = time.perf_counter()
                    if begin <= now and not ended:
                        usages.append(usage)
                        if now >= begin + seconds and len(usages) >= wanted:
                            ended = now
                    if now > begin + MOST_S:
                        raise ConfigError(
                            f"{len(usages)} answers of mode {work.mode} in {MOST_S:g} s are too "
                            "few to learn from; give a smaller --new"
                        )

            await asyncio.gather(*(client() for _ in range(work.concurrency)))
        return Seen(
            work,
            len(usages) / (ended - begin),
            statistics.mean(usage.prompt_tokens for usage in usages),
            statistics.mean(usage.completion_tokens for usage in usages),
        )

    def _request(self, work: Work) -> GenerateRequest:
        number = next(self._count)
        request = new_request(
            self._prompts(number, work.prompt),
            work.mode,
            trigger="random",
            budget=self._settings.budget,
            max_new_tokens=work.new,
            sampling=Sampling(seed=number),
            request_id=f"capacity-{number}",
        )
        return replace(request, options=replace(request.options, fresh_selections=True))


def _prompts(slm: str, tokenizer: Tokenizer) -> Callable[[int, int], tuple[int, ...]]:
    """Number and length -> a prompt that begins as no other does, so that nobody has read it.

    The bundled pair gets its own problems, whole, behind as many others as it takes: it stops
    early on anything else.
    """
    if slm != BUNDLED:
        (long,) = workload.prompts(tokenizer, [LONGEST])
        return lambda number, length: (
            20 + number % 80,
            20 + number // 80 % 80,
            *long[2 - length :],
        )
    own = [
        tokenizer.encode(Prompt(text=problem.prompt))
        for problem in problems.problems("train", BUNDLED_PROMPTS)
    ]

    def of(number: int, length: int) -> tuple[int, ...]:
        ids = tuple(own[number % len(own)])
        while len(ids) < length:
            number += 1
            ids = (*own[number % len(own)], *ids)
        return ids

    return of


async def _ask(caller: AsyncCaller, request: GenerateRequest) -> Usage:
    """Raises S2TError: it was refused or not answered."""
    answer = None
    async for piece in caller.stream(request, timeout_s=120.0):
        answer = piece.answer
    if answer is None:
        raise S2TError("a stream ended without its answer")
    if answer.usage.degraded_steps:
        raise ConfigError("the LLM did not answer in time: nothing can be learnt from this load")
    return answer.usage


@contextmanager
def _service(settings: Settings, most: int) -> Iterator[tuple[Config, str]]:
    """A service of one proposer and one selector, with an untrained version that is live."""
    model = {
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": settings.threads,
    }
    models = {"slm": settings.slm, "llm": settings.llm}
    overrides = {
        f"{role}.{key}": value
        for role, name in models.items()
        for key, value in {"model": name, **model}.items()
    }
    with tempfile.TemporaryDirectory(prefix="s2t-capacity-") as folder:
        config = load_config(
            None,
            {
                **overrides,
                "data_dir": str(Path(folder)),
                "gateway.port": 0,
                "gateway.max_requests_per_client": 0,
                "proposer.max_num_seqs": most,
                "proposer.selection_timeout_s": 60.0,
                "calibration.count": 8,
                "calibration.max_new_tokens": 24,
            },
        )
        (version,) = publish_untrained(config, [(SelectorKind.PREFIX, Reading.BASE)])
        LiveVersions(config.versions).promote(version)
        with running_service(config) as service:
            yield config, service.address


# -- the plan -------------------------------------------------------------------------------------


def _load_of(seen: Seen, settings: Settings, deployment: Deployment, config: Config) -> Load:
    traffic = Traffic(
        prompt=seen.prompt, new=seen.new, budget=settings.budget, chunk=prefill_chunk(config)
    )
    demand = demand_of(MODES[seen.work.mode], traffic)
    return Load(demand, traffic, deployment, float(seen.work.concurrency))


def _points(
    calibration: Sequence[Seen], settings: Settings, config: Config
) -> dict[str, list[Point]]:
    """Mean steps: all clients wait for one, so it took their number over the rate of steps."""
    points: dict[str, list[Point]] = {"slm": [], "llm": []}
    for seen in calibration:
        deployment = _deployment(seen, settings, config, None)
        load = _load_of(seen, settings, deployment, config)
        clients = float(seen.work.concurrency)
        if seen.work.mode == "llm":
            step, steps = load.selector_step(clients), load.demand.queries
            points["llm"].append(Point(step, clients / seen.answers_per_second / steps))
        else:
            step, steps = load.proposer_step(clients), load.demand.slm_steps
            points["slm"].append(Point(step, clients / seen.answers_per_second / steps))
    return points


def _deployment(
    seen: Seen, settings: Settings, config: Config, measured: Measured | None
) -> Deployment:
    traffic = Traffic(prompt=seen.prompt, new=seen.new, budget=settings.budget)
    given = Assumptions(prices={}, measured=measured.costs() if measured else {})
    return deployment_of(config, traffic, given)


def _compared(
    runs: Sequence[Seen], measured: Measured, settings: Settings, config: Config
) -> Iterator[Figure]:
    """Measured, planned, and the one over the other. The plan is for the tokens that were seen."""
    found = [seen.tokens_per_second for seen in runs]
    seen = _typical(runs)
    deployment = _deployment(seen, settings, config, measured)
    planned = _load_of(seen, settings, deployment, config).most_answers() * seen.new
    name = f"{seen.work.mode}, {seen.work.concurrency} clients"
    conditions = f"prompts of {seen.prompt:.0f}, {seen.new:.0f} new (mean)"
    if seen.work.mode in ("s2t", "s2t_local"):
        conditions += f", {settings.budget:.0%} random triggers"
    yield figure(f"{name}: measured", found, "tokens/s", conditions)
    yield figure(f"{name}: planned", [planned], "tokens/s")
    yield figure(f"{name}: planned / measured", [planned / one for one in found], "x")
