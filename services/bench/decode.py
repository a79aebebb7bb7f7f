"""`s2t bench decode`: this engine's greedy against Hugging Face `generate`, and `s2t_local` against
greedy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from s2t_shared.decode.proposer import Proposer
from s2t_shared.errors import ConfigError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.loading import DTYPES
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.types import CandidateRule, Mode, Policy, Proposals
from services.bench import workload
from services.bench.measure import Figure, Report, figure, ratios, take_turns
from services.bench.workload import Models, Settings

CONFIGURATIONS: dict[str, tuple[SelectorKind, Reading, Proposals]] = {
    **{f"{kind.value}, base": (kind, Reading.BASE, Proposals.BASE) for kind in SelectorKind},
    **{f"{kind.value}, adapted": (kind, Reading.ADAPTED, Proposals.BASE) for kind in SelectorKind},
    "reserved, proposals adapted": (SelectorKind.RESERVED, Reading.ADAPTED, Proposals.ADAPTED),
}


def bench_decode(
    settings: Settings,
    batches: Sequence[int],
    names: Sequence[str],
    against_hf: bool,
    on_turn: Callable[[], None] = lambda: None,
) -> Report:
    """Greedy tokens per second against `generate` (whole answers, prompts included), and the decode
    time of `s2t_local` over that of greedy at the budget (all prompts have been read; what an
    adapter must first read of them for itself counts).

    Raises:
        ConfigError: a model cannot be used, or prompt and answer are too long for it.
    """
    models = workload.load(settings)
    _check_lengths(settings, models, batches)
    figures: list[Figure] = []
    for batch in batches:
        ids = workload.prompts(models.tokenizer, workload.ragged_lengths(batch, settings.prefix))
        if against_hf:
            figures += _against_hf(settings, models, ids, on_turn)
        if names:
            figures += _local(settings, models, ids, names, on_turn)
    return Report(f"decode: {settings.slm}, {settings.dtype}", tuple(figures))


def _check_lengths(settings: Settings, models: Models, batches: Sequence[int]) -> None:
    """Raises ConfigError: some prompt and its answer do not fit the model."""
    longest = max(max(workload.ragged_lengths(batch, settings.prefix)) for batch in batches)
    if longest + settings.new > models.slm.max_length:
        raise ConfigError(
            f"prompts of up to {longest} tokens (--prefix {settings.prefix} is their mean) and "
            f"answers of {settings.new} do not fit the {models.slm.max_length} tokens of "
            f"{settings.slm}; lower --prefix or --new"
        )


def _against_hf(
    settings: Settings, models: Models, ids: Sequence[tuple[int, ...]], on_turn: Callable[[], None]
) -> list[Figure]:
    model = (
        AutoModelForCausalLM.from_pretrained(
            resolve_model(settings.slm), dtype=DTYPES[settings.dtype]
        )
        .to(settings.device)
        .eval()
    )
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in ids], device=settings.device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in ids], device=settings.device
    )
    answers: dict[str, list[tuple[int, ...]]] = {}

    def theirs() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=settings.new,
                min_new_tokens=settings.new,
                do_sample=False,
                pad_token_id=0,
                repetition_penalty=1.0,
                suppress_tokens=list(models.proposer.excluded_ids) or None,
            )
        seconds = time.perf_counter() - started
        answers["theirs"] = [tuple(row[longest:].tolist()) for row in out]
        return seconds

    def ours() -> float:
        result = workload.run(endless, [Policy()] * len(ids), ids, settings.new)
        answers["ours"] = [s.output_ids for s in result.sequences]
        return result.seconds

    # `min_new_tokens` suppresses the end token, so ours must not choose it either.
    excluded = {*models.proposer.reserved_ids, *models.slm.eos_ids}
    endless = replace(models, proposer=Proposer(models.slm, tuple(sorted(excluded))))
    seconds = take_turns({"ours": ours, "theirs": theirs}, settings.repeats, on_turn)
    tokens, b = len(ids) * settings.new, len(ids)
    conditions = (
        f"batch {b}, prompts {min(map(len, ids))}-{longest} tokens, {settings.new} new each"
    )
    same = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    return [
        figure(
            "greedy, this engine", [tokens / s for s in seconds["ours"]], "tokens/s", conditions
        ),
        figure(
            "greedy, Hugging Face generate",
            [tokens / s for s in seconds["theirs"]],
            "tokens/s",
            f"{conditions}; padded to {longest}",
        ),
        figure(
            "greedy / generate",
            ratios(seconds["theirs"], seconds["ours"]),
            "x",
            f"batch {b}; {same} of {b} answers token for token equal",
        ),
    ]


def _local(
    settings: Settings,
    models: Models,
    ids: Sequence[tuple[int, ...]],
    names: Sequence[str],
    on_turn: Callable[[], None],
) -> list[Figure]:
    base = workload.with_random_trigger(
        Policy(mode=Mode.S2T_LOCAL, candidates=CandidateRule(settings.k)), settings.budget
    )
    seeds, start = [], 0
    for _ in ids:
        seeds.append(workload.seed_with(settings.budget, settings.new, base.warmup_steps, start))
        start = seeds[-1] + 1

    def side(name: str) -> tuple[list[Policy], LocalSelector]:
        kind, reads, proposals = CONFIGURATIONS[name]
        selector = workload.random_selector(models.slm, models.proposer.reserved_ids, kind, reads)
        return [replace(base, proposals=proposals)] * len(ids), selector

    found: dict[str, list[float]] = {name: [] for name in names}
    triggers = max(1, round(settings.budget * settings.new))
    for _ in range(settings.repeats):
        sides = {"greedy": ([Policy()] * len(ids), None)} | {name: side(name) for name in names}
        runs = workload.interleaved(models, sides, ids, settings.new, seeds)
        for name in names:
            assert all(s.usage.triggers == triggers for s in runs[name].sequences)
            found[name].append(runs[name].seconds / runs["greedy"].seconds)
        on_turn()
    conditions = (
        f"batch {len(ids)}, prefix {settings.prefix}, {settings.new} new each, K {settings.k}, "
        f"{triggers} triggers each"
    )
    return [figure(f"s2t_local ({name}) / greedy", found[name], "x", conditions) for name in names]
