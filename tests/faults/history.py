"""What happened in a run, one JSON object a line: requests, every token, errors, faults, vitals.

    {"t": 12.3, "kind": "request", "id": "r7", "mode": "s2t", "labels": "durable", ...}
    {"t": 12.4, "kind": "piece", "id": "r7", "tokens": [[0, 1, "", ""]], "text": " w0"}
    {"t": 12.9, "kind": "answer", "id": "r7", "token_ids": [...], "version": "", "stored": 0, ...}
    {"t": 13.0, "kind": "error", "id": "r8", "status": "UNAVAILABLE", "reason": "STORE", ...}
    {"t": 12.5, "kind": "fault", "what": "SIGKILL selector"}
    {"t": 13.5, "kind": "vitals", "when": "after", "part": "proposer", "kv_slots": 0, ...}

A token is its index, its id, the LLM that chose it, and why it was decided without one. Times are
`time.monotonic`. Knows no service.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class History:
    """Of one run; written as it happens, so that a run that hangs can be read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream = file.open("w", encoding="utf-8", buffering=1)

    def write(self, kind: str, **fields: Any) -> float:
        """Returns when."""
        at = time.monotonic()
        self._stream.write(json.dumps({"t": at, "kind": kind, **fields}) + "\n")
        return at

    def close(self) -> None:
        self._stream.close()


def read(file: Path) -> list[Record]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
