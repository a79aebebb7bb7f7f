"""What an evaluation says about a pair and its prompts, in plain words.

A gain is claimed where the 95 % interval of the paired difference is above 0 and the exact McNemar
test agrees (p < 0.05): the interval alone is too bold where few problems differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2t_shared.types import Mode
from services.evaluation.figures import Row, Sufficiency, mcnemar

ENOUGH_OF_THE_GAP = 0.8
SUFFICIENT = 0.9
MANY_ROWS = 10


@dataclass(frozen=True)
class Verdict:
    """headline: which mode to use. reasons: sentences that it rests on. choice: the row to use; ""
    where none is better than the first."""

    headline: str
    reasons: tuple[str, ...]
    choice: str = ""


def verdict(rows: Sequence[Row], hits: Sufficiency | None) -> Verdict:
    """The verdict on rows whose first one is the baseline (greedy, usually)."""
    base = rows[0]
    reasons = [_rate(base) + "."]
    llm = _llm_row(rows)
    if llm is not None and llm is not base:
        reasons.append(_rate(llm) + f", {_gain(llm, base)}.")
    better = [row for row in rows[1:] if _is_a_choice(row) and _gains(row, base)]
    best = _cheapest_of_the_best(better)
    headline = _headline(rows, llm, best)
    if best is not None:
        reasons.insert(0, f"{best.label}: {_meaning(best)}.")
        reasons.append(_rate(best) + f", {_gain(best, base)}. {_cost(best)}")
    free = [row for row in better if not row.usage.llm_forwards]
    if best is not None and best.usage.llm_forwards and free:
        alone = max(free, key=lambda row: row.accuracy)
        reasons.append(f"Without the LLM: {_rate(alone)}, {_gain(alone, base)}.")
    if hits is not None:
        reasons.append(_sufficiency(hits))
    reasons += _warnings(rows, base)
    return Verdict(headline, tuple(reasons), best.label if best is not None else "")


def _headline(rows: Sequence[Row], llm: Row | None, best: Row | None) -> str:
    base = rows[0]
    if best is not None:
        share = _share_of_gap(best, base, llm)
        tail = "" if share is None else f": it closes {share:.0%} of the gap to the LLM"
        return f"For this pair and these prompts, use {best.label}{tail}."
    if len(rows) == 1:
        return f"Only {base.label} was asked; add modes to compare."
    if llm is not None and llm is not base and not _gains(llm, base):
        return (
            f"Nothing to gain was found: the LLM alone is not clearly better than {base.label} "
            "on these prompts."
        )
    only_the_llm = llm is not None and not any(_is_a_choice(row) for row in rows[1:])
    if only_the_llm:
        return (
            f"There is something to gain: the LLM alone is clearly better than {base.label}. Ask "
            "again with --modes s2t,s2t_local, to see how much of it they get."
        )
    if llm is not None and _gains(llm, base):
        return (
            f"Nothing short of the LLM helps here: alone it is clearly better than {base.label}, "
            "and no mode that asks it less is."
        )
    return f"Stay with {base.label}: no other mode is clearly better on these prompts."


def _cheapest_of_the_best(better: Sequence[Row]) -> Row | None:
    """Of the rows that are as good as the best one, the one that costs the LLM least."""
    if not better:
        return None
    best = max(better, key=lambda row: row.accuracy)
    as_good = [row for row in better if row is best or not _gains(best, row)]
    return min(as_good, key=lambda row: (round(row.llm_read_per_token, 2), _is_prior_art(row)))


def _is_a_choice(row: Row) -> bool:
    """Whether a deployment could run so: pass@n needs someone who knows the right answer."""
    return row.spec.mode is not Mode.LLM and not row.spec.is_pass_at


def _is_prior_art(row: Row) -> bool:
    return row.spec.mode is Mode.TAKEOVER


def _llm_row(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.spec.mode is Mode.LLM), None)


def _gains(row: Row, other: Row) -> bool:
    gain, half = row.gain_over(other)
    return gain - half > 0 and mcnemar(*row.rescues_and_harms(other)) < 0.05


def _share_of_gap(row: Row, base: Row, llm: Row | None) -> float | None:
    if llm is None or llm is row or not _gains(llm, base):
        return None
    return min(1.0, (row.accuracy - base.accuracy) / (llm.accuracy - base.accuracy))


def _meaning(row: Row) -> str:
    """What a mode does, for who has never seen one."""
    mode = row.spec.mode
    if mode is Mode.GREEDY:
        return "the small model (SLM) alone"
    if mode is Mode.LLM:
        return "the large model (LLM) alone"
    if mode is Mode.MAJORITY:
        return "the small model answers several times, and the most frequent answer counts"
    if not mode.can_trigger:
        return "the small model alone, sampled"
    acts = {
        Mode.S2T: "the large one (LLM) chooses among its candidates",
        Mode.TAKEOVER: "the large one (LLM) writes the token",
    }
    what = acts.get(mode, "it chooses again, as it was taught")
    return f"the small model (SLM) writes; at {row.trigger_rate:.1%} of the tokens {what}"


def _rate(row: Row) -> str:
    low, high = row.interval
    is_alone = row.spec.mode in (Mode.GREEDY, Mode.LLM)
    name = f"{row.label}, {_meaning(row)}," if is_alone else row.label
    return f"{name} is right on {row.accuracy:.1%} ({low:.0%} to {high:.0%})"


def _gain(row: Row, base: Row) -> str:
    gain, half = row.gain_over(base)
    return f"{100 * gain:+.1f} ± {100 * half:.1f} points over {base.label}"


def _cost(row: Row) -> str:
    if not row.usage.llm_forwards:
        return "It asks no LLM."
    return (
        f"It asks the LLM {row.llm_forwards_per_token:.3f} times per token, and the LLM reads "
        f"{row.llm_read_per_token:.0%} of the answers' tokens."
    )


def _sufficiency(hits: Sufficiency) -> str:
    rate = hits.by_kl[0.05][8]
    word = "holds" if rate >= SUFFICIENT else "does not hold well"
    return (
        f"Local sufficiency {word} here: at the 5 % of the steps where the models differ most, "
        f"the LLM's choice is among the SLM's first 8 in {rate:.1%}."
    )


def _warnings(rows: Sequence[Row], base: Row) -> list[str]:
    found = []
    if not any(any(row.correct) for row in rows):
        found.append(
            "No answer of any mode was graded as right: look at some, and at --grader and "
            "--answer-column."
        )
    halves = [row.gain_over(base)[1] for row in rows[1:]]
    if halves and max(halves) > 0.1:
        found.append(
            f"With {len(base.correct)} problems a difference below "
            f"{100 * max(halves):.0f} points cannot be seen; ask more."
        )
    if len(rows) > MANY_ROWS:
        found.append(
            f"The best of {len(rows)} rows looks better than it is: ask the chosen one again on "
            "other problems."
        )
    cut = [row for row in rows if row.truncated > 0.05 * len(row.correct) * row.spec.samples]
    if cut:
        names = ", ".join(f"{row.label} {row.truncated}" for row in cut)
        found.append(
            f"Answers were cut off at the token limit and count as wrong ({names}); "
            "raise --max-new-tokens or give --stop."
        )
    degraded = [row for row in rows if row.usage.degraded_steps]
    if degraded:
        names = ", ".join(f"{row.label} {row.usage.degraded_steps}" for row in degraded)
        found.append(f"Steps were decided without the LLM because it did not answer: {names}.")
    failed = [row for row in rows if row.failed]
    if failed:
        names = ", ".join(f"{row.label} {row.failed}" for row in failed)
        found.append(f"Answers failed and count as wrong: {names}; run it again to ask them again.")
    return found
