"""For how long a loop has not turned."""

from __future__ import annotations

from s2t_shared.decode.heartbeat import Heartbeat


def test_a_loop_is_silent_since_its_last_beat_unless_it_rests() -> None:
    now = [0.0]
    heartbeat = Heartbeat(lambda: now[0])
    assert heartbeat.silent_s == 0
    heartbeat.beat()
    now[0] = 5.0
    assert heartbeat.silent_s == 5.0
    heartbeat.rest()
    now[0] = 500.0
    assert heartbeat.silent_s == 0
    heartbeat.beat()
    assert heartbeat.silent_s == 0
