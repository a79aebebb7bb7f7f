"""What one row of an evaluation asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from s2t_shared.errors import InvalidRequestError
from s2t_shared.requests import by_name, new_request, parse_mode
from s2t_shared.types import GenerateRequest, Mode, Prompt, Sampling, Trigger

SEED_STRIDE = 1_000_003  # between the seeds of two runs
SAMPLE_STRIDE = 7_919  # between the seeds of two samples of one problem
PASS_AT = "pass@"


@dataclass(frozen=True, kw_only=True)
class ModeSpec:
    """One row of the table.

    name: a mode, majority@n or pass@n. trigger, budget: where the mode has them. candidates: K.
    version: of the local selector; None means the live one.
    """

    name: str
    trigger: str = ""
    budget: float | None = None
    candidates: int = 8
    version: str | None = None
    temperature: float = 0.7

    @property
    def label(self) -> str:
        """The row's name in a table."""
        if not self.trigger:
            return self.name
        budget = f" {self.budget * 100:g}%" if self.budget else ""
        candidates = f" K={self.candidates}" if self.candidates != 8 else ""
        version = f" {self.version}" if self.version and self.mode is Mode.S2T_LOCAL else ""
        return f"{self.name} {self.trigger}{budget}{candidates}{version}"

    @property
    def mode(self) -> Mode:
        """The mode that requests are answered in."""
        return Mode.SAMPLE if self.is_pass_at else parse_mode(self.name)[0]

    @property
    def is_pass_at(self) -> bool:
        """Whether a problem counts as solved when any of its samples is right."""
        return self.name.startswith(PASS_AT)

    @property
    def samples(self) -> int:
        """How many requests ask each problem."""
        return int(self.name.removeprefix(PASS_AT)) if self.is_pass_at else 1

    @property
    def asks_llm_all_along(self) -> bool:
        """Whether the LLM reads every token of an answer."""
        if self.mode is Mode.LLM:
            return True
        return self.mode.can_trigger and Trigger(self.trigger).needs_llm

    def request(
        self,
        prompt: Prompt,
        *,
        request_id: str,
        max_new_tokens: int,
        seed: int = 0,
        return_steps: bool = False,
        stop: Sequence[str] = (),
    ) -> GenerateRequest:
        """The request that asks a prompt in this mode. Selections are never taken from a cache."""
        request = new_request(
            prompt,
            Mode.SAMPLE.value if self.is_pass_at else self.name,
            trigger=self.trigger or "entropy",
            budget=self.budget,
            threshold=0.0 if self.budget is None else None,
            candidates=self.candidates,
            max_new_tokens=max_new_tokens,
            version=self.version,
            sampling=Sampling(self.temperature, seed=seed),
            stop=stop,
            steps=return_steps,
            request_id=request_id,
        )
        options = replace(request.options, fresh_selections=True)
        return replace(request, options=options)


def rows(
    modes: Sequence[str],
    triggers: Sequence[str],
    budgets: Sequence[float],
    candidates: Sequence[int],
    versions: Sequence[str | None] = (None,),
) -> list[ModeSpec]:
    """One row per mode, and per trigger, budget, K and local selector where the mode has them.

    Raises:
        InvalidRequestError: an unknown mode or trigger, or a row twice.
    """
    found: list[ModeSpec] = []
    for name in modes:
        _check_name(name)
        spec = ModeSpec(name=name)
        if not spec.mode.can_trigger:
            found.append(spec)
            continue
        of_mode = versions if spec.mode is Mode.S2T_LOCAL else (None,)
        # A takeover takes the LLM's first choice of all tokens, whatever K is.
        ks = (spec.candidates,) if spec.mode is Mode.TAKEOVER else candidates
        for version, trigger, k, budget in product(of_mode, triggers, ks, budgets):
            known = by_name(Trigger, trigger, "--trigger").value
            row = replace(spec, trigger=known, budget=budget, candidates=k, version=version)
            found.append(row)
    labels = [spec.label for spec in found]
    for label in labels:
        if labels.count(label) > 1:
            raise InvalidRequestError(f"--modes: {label!r} is asked for twice")
    return found


def _check_name(name: str) -> None:
    if not name.startswith(PASS_AT):
        parse_mode(name)
        return
    number = name.removeprefix(PASS_AT)
    if not number.isdigit() or int(number) < 1:
        raise InvalidRequestError(f"--modes: {name!r}: write pass@n, as in pass@8")
