"""The answers of an evaluation on disk: what is in it is not asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError
from services.evaluation.records import Record


@dataclass(frozen=True)
class ScoredRollout:
    """The LLM's view of every step of a greedy answer of the SLM.

    kl, entropy: nats. rank: place of the LLM's first choice in the SLM's order, -1 = outside.
    """

    problem_id: str
    kl: tuple[float, ...]
    entropy: tuple[float, ...]
    rank: tuple[int, ...]


@dataclass(frozen=True)
class ScoredChoices:
    """The LLM's view of a local selector's divergence points in one answer.

    rank, chosen: places among the candidates of the LLM's first choice (-1: it is none) and of the
    selector's. order: Spearman's rho of the selector's and the LLM's order, where it is known.
    """

    row: str
    problem_id: str
    rank: tuple[int, ...]
    chosen: tuple[int, ...]
    order: tuple[float, ...] = ()


@dataclass
class Journal:
    """Records by key, rollouts by problem, seconds by row. Without a file they are kept in memory.

    seconds: of the rows that were answered; a row whose run was cut off has too few of them.
    timed: answers that these seconds made.
    """

    file: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    records: dict[tuple[str, str, int], Record] = field(default_factory=dict)
    rollouts: dict[str, ScoredRollout] = field(default_factory=dict)
    choices: dict[tuple[str, str], ScoredChoices] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path | None, identity: Mapping[str, Any]) -> Journal:
        """The journal of an evaluation, with what an earlier run of it left.

        identity: what makes answers comparable.

        Raises:
            ConfigError: the file holds another evaluation, or cannot be read or written.
        """
        journal = cls(file, dict(identity))
        if file is None:
            return journal
        try:
            if file.exists() and file.stat().st_size:
                journal._read(file)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"evaluation": identity}) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{str(file)!r}: {error.strerror}") from error
        return journal

    def add(self, record: Record) -> None:
        """Keep an answer. A failed one is asked again by the next run."""
        self.records[record.key] = record
        if not record.error:
            self._write({"answer": record.to_row()})

    def add_rollout(self, rollout: ScoredRollout) -> None:
        self.rollouts[rollout.problem_id] = rollout
        self._write({"rollout": rollout.__dict__})

    def add_choices(self, choices: ScoredChoices) -> None:
        self.choices[choices.row, choices.problem_id] = choices
        self._write({"choices": choices.__dict__})

    def add_seconds(self, row: str, seconds: float, answers: int) -> None:
        """Note what `answers` answers of a row took together."""
        self.seconds[row] = self.seconds.get(row, 0.0) + seconds
        self.timed[row] = self.timed.get(row, 0) + answers
        self._write({"row": row, "seconds": seconds, "answers": answers})

    # -- the file ---------------------------------------------------------------------------------

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        if not text.endswith("\n"):  # killed while it wrote: that answer is asked again
            whole = text[: text.rfind("\n") + 1]
            file.write_text(whole, encoding="utf-8")
            lines = whole.splitlines()
        self._check_identity(file, lines[0] if lines else "{}")
        for line in lines[1:]:
            self._take(json.loads(line))

    def _check_identity(self, file: Path, line: str) -> None:
        try:
            kept = json.loads(line)["evaluation"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{str(file)!r} is no evaluation; choose another --out") from None
        for name, value in self.identity.items():
            if kept.get(name) != value:
                raise ConfigError(
                    f"{str(file)!r} holds an evaluation with another {name} "
                    f"({kept.get(name)!r}, now {value!r}); choose another --out, or delete it"
                )

    def _take(self, line: dict[str, Any]) -> None:
        if "answer" in line:
            record = Record.from_row(line["answer"])
            self.records[record.key] = record
        elif "rollout" in line:
            row = line["rollout"]
            self.rollouts[row["problem_id"]] = ScoredRollout(
                row["problem_id"], tuple(row["kl"]), tuple(row["entropy"]), tuple(row["rank"])
            )
        elif "choices" in line:
            row = line["choices"]
            lists = {name: tuple(row[name]) for name in ("rank", "chosen", "order")}
            self.choices[row["row"], row["problem_id"]] = ScoredChoices(**{**row, **lists})
        else:
            row = line["row"]
            self.seconds[row] = self.seconds.get(row, 0.0) + line["seconds"]
            self.timed[row] = self.timed.get(row, 0) + line["answers"]
