"""The models whose labels a lake takes: each proposer writes down whom it asked.

    known-models/<hash>.json     {"slm": digest, "llm": digest, "tokenizer": digest}

It guards against mistakes: another deployment on the same Redis, a proposer with another LLM, an
old spool. The folder lies beside the lake, where only the service writes. Rollouts from the stream
whose models nobody wrote down become dead letters.

It does not guard against malice. Digests are no secrets: `DescribeService` tells them. Whoever can
append to the stream can name known models, and write labels of any content: well formed, they come
into the lake and into training. What protects the stream is Redis's password for the producer
(`s2t redis-acl`), and what is trained on such labels has to pass the gate on held-out problems,
whose answers the running LLM judges.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from s2t_shared.errors import StoreError
from s2t_shared.files import private_folder, write_atomically
from s2t_shared.labels.label import Rollout


class Models(NamedTuple):
    """Digests of what made a label."""

    slm: str
    llm: str
    tokenizer: str

    @classmethod
    def of(cls, rollout: Rollout) -> Models:
        return cls(rollout.slm_digest, rollout.llm_digest, rollout.tokenizer_digest)


class KnownModels:
    """A folder of known models. Made when the first are written down."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[Models] = set()  # seen in the folder; nothing is ever removed there

    def add(self, models: Models) -> None:
        """Write down the models that make rollouts of ours.

        Raises:
            StoreError: the folder cannot be written.
        """
        if models in self._known:
            return
        file = self._file(models)
        try:
            if not file.exists():
                private_folder(self._folder)
                write_atomically(file, json.dumps(models._asdict()))
        except OSError as error:
            raise StoreError(
                f"the folder {self._folder.name!r} cannot be written: {error.strerror or error}; "
                "free or grant space there"
            ) from error
        self._known.add(models)

    def check(self, models: Models) -> None:
        """Check that a proposer of ours wrote the models down.

        Raises:
            StoreError: none did; the text names the digest that is unknown.
        """
        if models not in self._known and not self._file(models).exists():
            raise StoreError(f"{self._unknown(models)}: no proposer here used such models")
        self._known.add(models)

    def _file(self, models: Models) -> Path:
        digest = hashlib.sha256(json.dumps(models).encode()).hexdigest()[:32]
        return self._folder / f"{digest}.json"

    def _unknown(self, models: Models) -> str:
        """Which digest occurs nowhere, else that they do not occur together."""
        seen: set[str] = set()
        for file in self._folder.glob("*.json"):
            seen.update(json.loads(file.read_text(encoding="utf-8")).values())
        for name, digest in models._asdict().items():
            if digest not in seen:
                return f"{name}_digest {digest[:64]!r} is unknown"
        return "the SLM, the LLM and the tokenizer are known, but not together"
