"""Whether a history keeps what the service promises.

    python -m tests.faults.checker HISTORY.jsonl

- Each request ends once: with an answer, with a documented error, or because its client left.
- No token is lost or doubled: those that were streamed are the answer's, each once, in order.
- A token that was decided without the LLM is the SLM's own, and says so.
- An answer is of one version and one LLM, and its tokens are what that version says.
- A label that was acknowledged is in the lake.
- What a part held is free in the end: sequences, KV, tasks, descriptors, memory.

Knows histories and the script; no service.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.rpc.wire import errors as wire_errors
from tests.faults import script
from tests.faults.history import Record, read

# Statuses that gRPC gives by itself: when the client's deadline passes or it cancels, and when a
# gateway dies or cannot be reached. They have no ErrorInfo.
FROM_GRPC = {"DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"}
DOCUMENTED = {
    (wire_errors.STATUS[kind].name, reason) for kind, reason in wire_errors.REASONS.items()
} | {("UNAVAILABLE", "PROPOSER_LOST"), *((status, "") for status in FROM_GRPC)}

FREE = ("kv_slots", "running", "waiting", "admitted", "open")
SPARE = {"tasks": 12, "fds": 12, "threads": 6}  # pools and connections that are kept
SPARE_MB = 150.0  # pyarrow and its pools, at the first shard; the soak looks closer
MAX_DETAILS = 1024  # bytes


Replays = dict[tuple[str, str, str], list[int]]


@dataclass
class Request:
    """All that a history says of one."""

    asked: Record
    pieces: list[Record] = field(default_factory=list)
    ends: list[Record] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.asked["id"][1:])

    @property
    def tokens(self) -> list[list]:
        return [token for piece in self.pieces for token in piece["tokens"]]

    @property
    def answer(self) -> Record | None:
        return next((end for end in self.ends if end["kind"] == "answer"), None)

    @property
    def error(self) -> Record | None:
        return next((end for end in self.ends if end["kind"] == "error"), None)

    @property
    def seconds(self) -> float:
        return float(self.ends[-1]["t"] - self.asked["t"])

    def overlaps(self, begun: float, ended: float) -> bool:
        """Whether it was under way in a span of time."""
        return bool(self.asked["t"] < ended and self.ends[-1]["t"] > begun)

    @property
    def is_degraded(self) -> bool:
        return any(degraded for *_, degraded in self.tokens)


def requests_of(records: Sequence[Record]) -> dict[str, Request]:
    """By their ids, in the order they were asked."""
    found: dict[str, Request] = {}
    for record in records:
        if record["kind"] == "request":
            found[record["id"]] = Request(record)
        elif record["kind"] == "piece":
            found[record["id"]].pieces.append(record)
        elif record["kind"] in ("answer", "error", "left"):
            found[record["id"]].ends.append(record)
    return found


def violations(records: Sequence[Record], allowed: Collection[str] = ()) -> list[str]:
    """What was broken, one line each. allowed: reasons (or gRPC's statuses) of errors that the
    faults of this run may cause; all others count as failed."""
    requests = requests_of(records)
    replays = _replays(records)
    found = []
    for name, request in requests.items():
        checks = (
            _ends_once(request),
            _tokens_once(request),
            _as_scripted(request) if request.asked["is_scripted"] else (),
            _one_version(request, replays),
            _documented(request, allowed),
        )
        found += [f"{name}: {text}" for check in checks for text in check]
    found += _labels(requests, records)
    found += _all_free(records)
    return found


def wrong_tokens(records: Sequence[Record]) -> int:
    """Requests that lost or doubled a token, or were told another one than the script's."""
    found = requests_of(records).values()
    return sum(any((*_tokens_once(r), *_as_scripted(r))) for r in found if r.asked["is_scripted"])


def mixed(records: Sequence[Record]) -> int:
    """Answers that are not of one version."""
    return sum(any(_one_version(r, _replays(records))) for r in requests_of(records).values())


def _replays(records: Sequence[Record]) -> Replays:
    """What a mode and a version say to a prompt."""
    found = _of(records, "replay")
    return {(r["mode"], r["version"], r["prompt"]): r["token_ids"] for r in found}


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _ends_once(request: Request) -> Iterator[str]:
    if len(request.ends) != 1:
        yield f"ended {len(request.ends)} times"
    elif any(piece["t"] > request.ends[0]["t"] for piece in request.pieces):
        yield "went on behind its end"


def _tokens_once(request: Request) -> Iterator[str]:
    indices = [index for index, *_ in request.tokens]
    if request.asked["streams"] and indices != list(range(len(indices))):
        yield f"tokens lost, doubled or out of order: {indices}"
    answer = request.answer
    if answer is None or not request.asked["streams"]:
        return
    streamed = [token_id for _, token_id, *_ in request.tokens]
    if streamed != answer["token_ids"]:
        yield f"streamed {streamed}, answered {answer['token_ids']}"
    if "".join(piece["text"] for piece in request.pieces) != answer["text"]:
        yield "the pieces' text is not the answer's"


def _as_scripted(request: Request) -> Iterator[str]:
    """What the SLM and the LLM say is known, whatever happens to either."""
    asks_llm = request.asked["mode"] == "s2t"
    for index, token_id, llm, degraded in request.tokens:
        is_unsure = index in script.UNSURE_AT
        expected = script.OTHER_ID if llm and is_unsure else script.word_id(index)
        if token_id != expected:
            yield f"token {index} is {token_id}, expected {expected} (LLM {llm!r}, {degraded!r})"
        if asks_llm and is_unsure and bool(llm) == bool(degraded):
            yield f"token {index}: decided by LLM {llm!r}, and marked {degraded!r}"
        if degraded and not is_unsure:
            yield f"token {index} is marked {degraded!r}, and nobody was needed there"
    answer = request.answer
    if answer is not None and answer["degraded"] != sum(bool(d) for *_, d in request.tokens):
        yield f"says {answer['degraded']} degraded steps, streamed others"


def _one_version(request: Request, replays: Replays) -> Iterator[str]:
    llms = {llm for _, _, llm, _ in request.tokens if llm}
    if len(llms) > 1:
        yield f"two LLMs in one answer: {sorted(llms)}"
    answer = request.answer
    if answer is None or answer["degraded"]:
        return
    asked = request.asked
    expected = replays.get((asked["mode"], answer["version"], asked["prompt"]))
    if expected is not None and expected != answer["token_ids"]:
        yield f"not what version {answer['version']} says: {answer['token_ids']}"


def _documented(request: Request, allowed: Collection[str]) -> Iterator[str]:
    error = request.error
    if error is None:
        return
    kind = (error["status"], error["reason"])
    if kind not in DOCUMENTED:
        yield f"an undocumented error: {kind}, {error['text']}"
    elif (error["reason"] or error["status"]) not in allowed:
        yield f"failed: {kind}, {error['text']}"
    if kind == ("RESOURCE_EXHAUSTED", "OVERLOADED") and error["retry_after_s"] is None:
        yield "a refusal without RetryInfo"
    if error["bytes"] > MAX_DETAILS:
        yield f"an error of {error['bytes']} bytes"


def _labels(requests: Mapping[str, Request], records: Sequence[Record]) -> Iterator[str]:
    lakes = _of(records, "lake")
    in_lake = lakes[-1]["labels"] if lakes else {}  # by request
    for name, request in requests.items():
        answer = request.answer
        if answer is None or request.asked["labels"] != "durable":
            continue
        if not lakes:
            yield f"{name}: nobody looked into the lake for its labels"
        elif (found := in_lake.get(name, 0)) != answer["stored"]:
            yield f"{name}: {answer['stored']} labels acknowledged, {found} in the lake"


def lost_labels(records: Sequence[Record]) -> int:
    """Answers whose acknowledged labels are not all in the lake."""
    return sum(1 for _ in _labels(requests_of(records), records))


def _all_free(records: Sequence[Record]) -> Iterator[str]:
    before: dict[int, Record] = {}
    after: dict[int, Record] = {}
    for record in _of(records, "vitals"):
        if record["when"] in ("before", "after"):
            (before if record["when"] == "before" else after)[record["pid"]] = record
    for pid, last in after.items():
        yield from kept(before.get(pid, last), last)


def kept(first: Record, last: Record) -> Iterator[str]:
    """What a part still holds of what it did between two looks at its vitals."""
    part = last["part"]
    yield from (f"{part} still holds {last[n]} {n}" for n in FREE if last.get(n))
    for name, spare in SPARE.items():
        if last[name] > first[name] + spare:
            yield f"{part}: {name} grew from {first[name]} to {last[name]}"
    if last["rss_mb"] > first["rss_mb"] + SPARE_MB:
        yield f"{part}: memory grew from {first['rss_mb']:.0f} to {last['rss_mb']:.0f} MB"


def main() -> None:
    records = read(Path(sys.argv[1]))
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        counts[record["kind"]] += 1
    print(dict(counts))
    print("\n".join(violations(records)) or "nothing was broken")


if __name__ == "__main__":
    main()
