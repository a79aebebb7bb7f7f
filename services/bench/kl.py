"""`s2t bench kl`: S2T with the LLM, by KL and by entropy trigger, against the LLM alone; drafts
against lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from s2t_shared.decode.engine import MAX_DRAFT_TOKENS
from s2t_shared.decode.proposer import Proposer
from s2t_shared.policy import Calibration
from s2t_shared.types import CandidateRule, DecodeOptions, DecodeRequest, Mode, Policy, Trigger
from services.bench import workload
from services.bench.measure import Figure, Report, figure, ratios, take_turns
from services.bench.workload import Models, Run, Settings


def bench_kl(
    settings: Settings,
    batch: int,
    answers: int,
    lockstep: bool,
    on_turn: Callable[[], None] = lambda: None,
) -> Report:
    """`answers` prompts, `batch` at a time. Thresholds are calibrated on these very prompts, so
    that the budget is what it says."""
    models = workload.load(settings, needs_llm=True)
    assert models.scorer is not None
    ids = workload.prompts(models.tokenizer, [settings.prefix] * answers)
    calibration = _calibrate(models, ids, settings.new)
    alone = Models(models.tokenizer, Proposer(models.scorer.runtime, models.proposer.reserved_ids))
    last: dict[str, list[Run]] = {}

    def side(name: str, which: Models, policy: Policy, **options: int) -> Callable[[], float]:
        def work() -> float:
            which.slm.pool.clear()
            engine = workload.with_llm(models, batch, **options)
            last[name] = [
                workload.run(which, [policy] * len(part), part, settings.new, engine=engine)
                for part in _parts(ids, batch)
            ]
            return sum(run.seconds for run in last[name])

        return work

    def s2t(trigger: Trigger) -> Policy:
        # The calibrated value is the signal of one of these very steps, where rounding would
        # decide: just above it.
        threshold = calibration.threshold(trigger, settings.budget) + 1e-3
        return Policy(
            mode=Mode.S2T,
            trigger=trigger,
            threshold=threshold,
            candidates=CandidateRule(settings.k),
        )

    sides = {
        "LLM alone": side("LLM alone", alone, Policy()),
        "SLM alone": side("SLM alone", models, Policy()),
        "KL": side("KL", models, s2t(Trigger.KL)),
        "entropy": side("entropy", models, s2t(Trigger.ENTROPY)),
    }
    per_token: dict[str, list[float]] = {name: [] for name in sides}

    def counted(name: str) -> Callable[[], float]:
        def work() -> float:
            seconds = sides[name]()
            per_token[name].append(seconds / sum(run.tokens for run in last[name]))
            return seconds

        return work

    take_turns({name: counted(name) for name in sides}, settings.repeats, on_turn)
    conditions = (
        f"batch {batch}, {answers} answers, prefix {settings.prefix}, up to {settings.new} new, "
        f"K {settings.k}, budget {settings.budget:.1%}"
    )
    figures = [
        figure("LLM alone", [1e3 * s for s in per_token["LLM alone"]], "ms/token", conditions)
    ]
    for name in list(sides)[1:]:
        figures.append(
            figure(
                f"{name} / LLM alone, time per token",
                ratios(per_token[name], per_token["LLM alone"]),
                "x",
                _spent(last[name]),
            )
        )
    for name in ("KL", "entropy"):
        figures.append(
            figure(
                f"{name}: LLM forwards per token", [_forwards(last[name])], "", _spent(last[name])
            )
        )
    if lockstep:
        side("lockstep", models, s2t(Trigger.KL), max_draft_tokens=1)()
        figures.append(_against_lockstep(last["KL"], last["lockstep"], answers))
    return Report(f"kl: {settings.slm} with {settings.llm}, {settings.dtype}", tuple(figures))


def _against_lockstep(drafted: Sequence[Run], lockstep: Sequence[Run], answers: int) -> Figure:
    """What asking token by token costs, and whether drafts gave the same tokens."""
    same = 0
    for x, y in zip(drafted, lockstep, strict=True):
        for a, b in zip(x.sequences, y.sequences, strict=True):
            same += a.output_ids == b.output_ids
    return figure(
        "lockstep: LLM forwards per token",
        [_forwards(lockstep)],
        "",
        f"drafts of up to {MAX_DRAFT_TOKENS}: {same} of {answers} answers token for token equal",
    )


def _parts(ids: Sequence[tuple[int, ...]], batch: int) -> list[Sequence[tuple[int, ...]]]:
    return [ids[i : i + batch] for i in range(0, len(ids), batch)]


def _calibrate(models: Models, ids: Sequence[tuple[int, ...]], new: int) -> Calibration:
    engine = workload.with_llm(models, len(ids))(models.proposer)
    live = [
        engine.add(
            DecodeRequest(
                request_id=f"calibrate-{i}",
                token_ids=p,
                options=DecodeOptions(policy=Policy(), max_new_tokens=new, score_rollout=True),
            )
        )
        for i, p in enumerate(ids)
    ]
    while not engine.idle:
        engine.step()
    return Calibration.measure([s.steps for s in live])


def _forwards(runs: Sequence[Run]) -> float:
    return sum(s.llm_forwards for run in runs for s in run.sequences) / sum(
        run.tokens for run in runs
    )


def _spent(runs: Sequence[Run]) -> str:
    usages = [s.usage for run in runs for s in run.sequences]
    tokens = sum(u.completion_tokens for u in usages)
    triggers = sum(usage.triggers for usage in usages)
    flips = sum(usage.flips for usage in usages)
    return f"{tokens} tokens, {triggers} triggers, {flips} flips"
