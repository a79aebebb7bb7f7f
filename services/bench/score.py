"""`s2t bench score`: what scoring one divergence point locally costs, in decode steps, against the
published way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from s2t_shared.decode.interfaces import NextTokenInput, SelectionInput
from s2t_shared.decode.proposer import SequenceSlots
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.runtime import Segment
from s2t_shared.types import CandidateRule, Mode, Policy, Support
from services.bench import workload
from services.bench.measure import Figure, Report, clock, figure, ratios, take_turns
from services.bench.workload import Models, Settings

GAP = 64  # tokens since an adapted reading's last score, at most half of the prefix
INNER = 5  # forwards per measurement


def bench_score(
    settings: Settings,
    prefixes: Sequence[int],
    ks: Sequence[int],
    naive: bool,
    on_turn: Callable[[], None] = lambda: None,
) -> Report:
    models = workload.load(settings)
    figures: list[Figure] = []
    for prefix in prefixes:
        for k in ks:
            figures += _at(settings, models, prefix, k, naive, on_turn)
    return Report(f"score: {settings.slm}, {settings.dtype}", tuple(figures))


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def side() -> float:
        started = clock()
        for _ in range(INNER):
            work()
        return (clock() - started) / INNER

    return side


def _at(
    settings: Settings,
    models: Models,
    prefix: int,
    k: int,
    naive: bool,
    on_turn: Callable[[], None],
) -> list[Figure]:
    (ids,) = workload.prompts(models.tokenizer, [prefix])
    opened: list[SequenceSlots] = []
    gap = min(GAP, prefix // 2)

    def ready(kind: SelectorKind, reads: Reading) -> tuple[SequenceSlots, Support]:
        selector = workload.random_selector(models.slm, models.proposer.reserved_ids, kind, reads)
        policy = Policy(mode=Mode.S2T_LOCAL, candidates=CandidateRule(k))
        slots = models.proposer.open(selector, policy, ids, prefix + 2)
        assert slots is not None
        opened.append(slots)
        return slots, _support(models, slots, ids)

    def decode(slots: SequenceSlots) -> None:
        slots.slot.truncate(prefix - 1)
        models.proposer.run([NextTokenInput(slots, ids, None, False)])

    def score(slots: SequenceSlots, support: Support, gap: int = 0) -> Callable[[], object]:
        def work() -> None:
            if slots.adapted_slot is not None:
                slots.adapted_slot.truncate(prefix - gap)
            while models.proposer.run(
                [SelectionInput(slots, ids, support.ids[:k], support.log_probs[:k])]
            ) == [None]:
                pass

        return work

    def read_gap(slots: SequenceSlots) -> None:
        assert slots.adapted_slot is not None and slots.local_selector is not None
        slots.adapted_slot.truncate(prefix - gap)
        models.slm.forward(
            [
                Segment(
                    slot=slots.adapted_slot,
                    token_ids=ids[prefix - gap :],
                    start=prefix - gap,
                    siblings=(),
                    adapter=slots.local_selector.adapter,
                )
            ]
        )

    first, _ = ready(SelectorKind.PREFIX, Reading.BASE)
    sides: dict[str, Callable[[], float]] = {"decode": _timed(lambda: decode(first))}
    for kind in SelectorKind:
        sides[f"{kind.value}, base"] = _timed(score(*ready(kind, Reading.BASE)))
    adapted = ready(SelectorKind.JOINT, Reading.ADAPTED)
    score(*adapted, gap=prefix)()  # the adapter reads the prompt once
    sides[f"joint, adapted, gap {gap}"] = _timed(score(*adapted, gap=gap))
    sides[f"reading {gap} tokens"] = _timed(lambda: read_gap(adapted[0]))
    if naive:
        sides["published way (K whole prefixes)"] = _published(models, ids, adapted, k)
    seconds = take_turns(sides, settings.repeats, on_turn)
    for slots in opened:
        models.proposer.close(slots)
    models.slm.pool.clear()
    conditions = f"prefix {prefix}, K {k}"
    return [
        figure("one decode step", [1e3 * s for s in seconds["decode"]], "ms", conditions),
        *(
            figure(
                f"{name} / decode step", ratios(seconds[name], seconds["decode"]), "x", conditions
            )
            for name in sides
            if name != "decode"
        ),
    ]


def _support(models: Models, slots: SequenceSlots, ids: Sequence[int]) -> Support:
    while True:
        (proposal,) = models.proposer.run([NextTokenInput(slots, ids)])
        if proposal is not None:
            break
    support = getattr(proposal, "support", None)
    assert isinstance(support, Support)
    return support


def _published(
    models: Models, ids: Sequence[int], scored: tuple[SequenceSlots, Support], k: int
) -> Callable[[], float]:
    """Re-run the whole prefix once per candidate, without a cache, as the published code does."""
    slots, support = scored
    selector = slots.local_selector
    assert isinstance(selector, LocalSelector)

    def side() -> float:
        row = models.slm.pool.allocate((), len(ids) + 1, object())
        assert row is not None
        started = clock()
        for candidate in support.ids[:k]:
            row.truncate(0)
            with torch.no_grad():
                hidden, _ = models.slm.forward(
                    [
                        Segment(
                            slot=row,
                            token_ids=[*ids, candidate],
                            start=0,
                            siblings=(),
                            adapter=selector.adapter,
                        )
                    ]
                )
                models.slm.reserved_logits(hidden[-1], selector.reserved_ids, selector.bin_deltas)
        seconds = clock() - started
        models.slm.pool.release(row)
        return seconds

    return side
