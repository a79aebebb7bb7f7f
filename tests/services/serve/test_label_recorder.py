"""What becomes of an answer's labels: collected, stored, stored durably."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from s2t_shared.decode.decide import with_figures
from s2t_shared.errors import StoreError
from s2t_shared.labels.label import Digests, Rollout, rollout_of
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.types import CandidateRule, LabelOptions, PositionScores, Step, Support
from services.client import Client
from services.launch.redis_server import open_redis
from services.serve.label_recorder import LabelRecorder
from tests.helpers.serving import LLM_TEXT, proposer_service, with_gateway

NO_REDIS = "redis://127.0.0.1:1/0"
DIGESTS = Digests(slm="slm", llm="llm", tokenizer="tok")
STEP = with_figures(
    Step(
        index=0,
        token_id=7,
        triggered=True,
        support=Support((7, 8), (-0.5, -1.0)),
        llm=PositionScores((-0.1, -3.0), 7),
    )
)


def rollout(*steps: Step) -> Rollout:
    return rollout_of(
        prompt_ids=(1, 2),
        steps=steps,
        rule=CandidateRule(2),
        options=LabelOptions(store=True),
        digests=DIGESTS,
        request_id="r",
    )


LABELLED = rollout(STEP)


def store(writer: LabelWriter, durable: bool, timeout_s: float = 30.0) -> None:
    recorder = LabelRecorder(writer, durable_timeout_s=timeout_s)
    asyncio.run(recorder.store(LABELLED, durable))


def spooled(folder: Path) -> int:
    return sum(
        path.read_bytes().count(b"rollout_id") for path in folder.rglob("*") if path.is_file()
    )


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_durable_answer_waits_and_a_plain_one_does_not(tmp_path: Path) -> None:
    writer = LabelWriter(LabelStream(NO_REDIS), tmp_path / "spool")
    store(writer, durable=True)
    assert spooled(tmp_path / "spool") == 1  # it had waited
    writer.close()
    store(writer, durable=False)
    recorder = LabelRecorder(writer)
    assert recorder.dropped == len(LABELLED.labels) == 1
    with pytest.raises(StoreError, match="could not be stored durably; send the request again"):
        store(writer, durable=True)


def test_labels_that_are_not_durable_in_time_fail_the_answer(tmp_path: Path) -> None:
    """They are stored nevertheless: sent again, it is the same rollout."""
    with open_redis(None, tmp_path / "redis") as server:
        assert server.process is not None
        writer = LabelWriter(LabelStream(server.url), tmp_path / "spool")
        os.kill(server.process.pid, signal.SIGSTOP)
        with pytest.raises(StoreError, match="could not be stored durably"):
            store(writer, durable=True, timeout_s=0.2)
        os.kill(server.process.pid, signal.SIGCONT)
        eventually(lambda: writer.written == 1)
        writer.close()


def test_a_rollout_that_says_nothing_of_the_llm_is_not_stored(tmp_path: Path) -> None:
    writer = LabelWriter(LabelStream(NO_REDIS), tmp_path / "spool")
    recorder = LabelRecorder(writer)
    plain = rollout(Step(index=0, token_id=7))
    asyncio.run(recorder.store(plain, durable=True))
    recorder.close()
    assert spooled(tmp_path / "spool") == 0


def test_answers_go_on_when_neither_redis_nor_the_spool_takes_labels(tmp_path: Path) -> None:
    """R6. What is lost is counted exactly, and the operator is told the count."""
    writer = LabelWriter(LabelStream(NO_REDIS), tmp_path / "spool", spool_bytes=2000)
    service = proposer_service(writer=writer)

    def ask(address: str) -> tuple[list[str], int, int]:
        with Client(address, timeout_s=20.0) as client:
            labels = {"store": True}
            answers = [client.generate("hello", mode="s2t", labels=labels) for _ in range(20)]
            eventually(lambda: writer.written + writer.dropped.total() == 2 * len(answers))
            dropped = asyncio.run(service.count_dropped_labels())
            return [a.text for a in answers], sum(a.labels_stored for a in answers), dropped

    texts, promised, dropped = with_gateway(tmp_path, service, ask)
    assert set(texts) == {LLM_TEXT} and promised == 40
    kept = spooled(tmp_path / "spool")
    assert 0 < kept < 20 and dropped == promised - 2 * kept
