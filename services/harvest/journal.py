"""A harvest's plan and progress on disk, so that the same command continues where it was stopped.

    <folder>/runs/<run id>/
      plan.json    what the run is: options, models, thresholds
      done.jsonl   one line per finished chunk of prompts, written when its labels are durable
      lock         held by the process that works on the run

The run id is a hash of all that the labels depend on: prompts, options, models. A chunk that was
open when the process died is done again; its labels have the same ids, and its shard the same name.
So a journal that is lost costs work, and no label counts twice.
Knows files; no models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from s2t_shared.errors import ConfigError
from s2t_shared.files import locked, write_atomically
from s2t_shared.types import LabelRule, Trigger

T = TypeVar("T")
CHUNK = 32  # prompts that become done together


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A finished chunk: its number, and how many prompts, rollouts, labels and tokens it has.

    errors: one text per prompt that can never give labels.
    """

    number: int
    prompts: int
    rollouts: int
    labels: int
    tokens: int
    errors: tuple[str, ...] = ()


class HarvestJournal:
    """One run's folder; use as `with HarvestJournal.open(...) as journal`.

    done: the finished chunks by number. rules: the run's thresholds; empty before `plan`.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.run_id = folder.name
        self.done: dict[int, Chunk] = {}
        self.rules: tuple[LabelRule, ...] = ()
        self._folder = folder
        self._plan_file = folder / "plan.json"
        self._done_file = folder / "done.jsonl"
        self._identity = identity

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, identity: dict[str, Any], again: bool = False
    ) -> Iterator[HarvestJournal]:
        """The journal of the run with this identity, new or as it was left.

        folder: of the lake, or of the journals of a lake in object storage. again: forget what is
        done, but not the thresholds.

        Raises:
            ConfigError: another process works on the run, or the folder cannot be used.
        """
        text = json.dumps(identity, sort_keys=True)
        run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        journal = cls(folder / "runs" / run_id, identity)
        with ExitStack() as stack:
            try:
                journal._folder.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(journal._folder / "lock", wait=False))
            except OSError as error:
                raise ConfigError(
                    f"the folder {str(folder)!r} cannot be used: {error.strerror or error}"
                ) from error
            if not held:
                raise ConfigError(
                    f"this harvest (run {run_id}) is being done by another process; wait for it, "
                    "or stop it first"
                )
            if again:
                journal._done_file.unlink(missing_ok=True)
            journal._read_plan()
            journal._read_done()
            yield journal

    def _read_plan(self) -> None:
        try:
            plan = json.loads(self._plan_file.read_text(encoding="utf-8"))
            rules = [LabelRule(Trigger(name), threshold) for name, threshold in plan["rules"]]
        except FileNotFoundError:
            return  # a new run
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"harvest run {self.run_id}: plan.json is damaged ({error}); remove {self._folder} "
                "to start it anew (labels that are there already are not counted twice)"
            ) from error
        self.rules = tuple(rules)

    def _read_done(self) -> None:
        if not self._plan_file.exists() or not self._done_file.exists():
            return
        for line in self._done_file.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
                content["errors"] = tuple(content["errors"])
                chunk = Chunk(**content)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: that chunk is done again
            self.done[chunk.number] = chunk

    def plan(self, rules: tuple[LabelRule, ...]) -> None:
        """Fix the thresholds, for this and every later start."""
        plan = {**self._identity, "rules": [[r.trigger.value, r.threshold] for r in rules]}
        write_atomically(self._plan_file, json.dumps(plan, indent=2))
        self.rules = rules

    def finish(self, chunk: Chunk) -> None:
        """Record that a chunk's labels are durable."""
        with self._done_file.open("a", encoding="utf-8") as stream:
            # The line break comes first: it also ends a line that a crash has torn.
            stream.write(("\n" if stream.tell() else "") + json.dumps(asdict(chunk)))
            stream.flush()
            os.fsync(stream.fileno())
        self.done[chunk.number] = chunk

    def open_chunks(self, rows: Iterable[T]) -> Iterator[tuple[int, list[T]]]:
        """The chunks of `rows` that are not done, with their numbers."""
        remaining = iter(rows)
        for number in count():
            chunk = list(islice(remaining, CHUNK))
            if not chunk:
                return
            if number not in self.done:
                yield number, chunk
