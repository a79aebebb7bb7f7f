"""One harvest's plan and progress on disk, so that the same command again goes on where it was
stopped.

    lake/runs/<run id>/
      plan.json    what the run is: options, models, thresholds
      done.jsonl   one line per finished chunk of prompts, written when its labels are durable
      lock         held while somebody works on it

The run id is a hash of all that the labels depend on: prompts, options, models. A chunk that was
being worked on when the process died is done again; its labels have the same ids, and its shard the
same name. Knows files; no models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from s2t_shared.errors import ConfigError
from s2t_shared.files import locked, write_atomically
from s2t_shared.types import LabelRule, Trigger

T = TypeVar("T")
CHUNK = 32  # prompts that become done together


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a finished chunk gave. `errors`: one text per prompt that can never give labels."""

    number: int
    prompts: int
    rollouts: int
    labels: int
    tokens: int
    errors: tuple[str, ...] = ()


class HarvestRun:
    """The run in its folder; use as `with HarvestRun.open(...) as run`."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.id, self._folder, self._identity = folder.name, folder, identity
        self.done: dict[int, Chunk] = {}
        self.rules: tuple[LabelRule, ...] = ()

    @classmethod
    @contextmanager
    def open(
        cls, lake: Path, identity: dict[str, Any], again: bool = False
    ) -> Iterator[HarvestRun]:
        """The run with this identity, new or as it was left; `again`: with its thresholds, but
        nothing done.

        Raises:
            ConfigError: another process is working on it, or the folder cannot be used.
        """
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        run = cls(lake / "runs" / name, identity)
        with ExitStack() as stack:
            try:
                run._folder.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(run._folder / "lock", wait=False))
            except OSError as error:
                raise ConfigError(
                    f"lake {str(lake)!r} cannot be used: {error.strerror or error}"
                ) from error
            if not held:
                raise ConfigError(
                    f"this harvest (run {name}) is being done by another process; wait for it, or "
                    "stop it first"
                )
            if again:
                (run._folder / "done.jsonl").unlink(missing_ok=True)
            run._read()
            yield run

    def _read(self) -> None:
        try:
            plan = json.loads((self._folder / "plan.json").read_text(encoding="utf-8"))
            self.rules = tuple(
                LabelRule(Trigger(trigger), threshold) for trigger, threshold in plan["rules"]
            )
        except FileNotFoundError:
            return  # new
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"harvest run {self.id}: plan.json is damaged ({error}); remove {self._folder} to "
                "start it anew (labels that are there already are not counted twice)"
            ) from error
        journal = self._folder / "done.jsonl"
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            try:
                content = json.loads(line)
                chunk = Chunk(**content | {"errors": tuple(content["errors"])})
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: that chunk is done again
            self.done[chunk.number] = chunk

    def plan(self, rules: tuple[LabelRule, ...]) -> None:
        """Fix the thresholds, for this and every later start."""
        write_atomically(
            self._folder / "plan.json",
            json.dumps(
                {**self._identity, "rules": [[r.trigger.value, r.threshold] for r in rules]},
                indent=2,
            ),
        )
        self.rules = rules

    def finish(self, chunk: Chunk) -> None:
        """Note that a chunk's labels are durable."""
        with (self._folder / "done.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(("\n" if stream.tell() else "") + json.dumps(asdict(chunk)))
            stream.flush()
            os.fsync(stream.fileno())
        self.done[chunk.number] = chunk

    def open_chunks(self, rows: Iterable[T]) -> Iterator[tuple[int, list[T]]]:
        """The chunks of `rows` that are not done."""
        for number, chunk in enumerate(_chunked(rows)):
            if number not in self.done:
                yield number, chunk


def _chunked(rows: Iterable[T]) -> Iterator[list[T]]:
    chunk: list[T] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
