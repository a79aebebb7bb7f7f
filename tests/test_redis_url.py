"""Who logs in at a Redis URL, and what of it may be shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from s2t_shared.redis_url import RedisRole, has_password, place_of, url_of, without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:p%40ss@host:6379/0", "redis://host:6379/0"),
        ("rediss://me:p@ss@host/1", "rediss://host/1"),
        ("unix://me:pass@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("http://:s3cret/x@127.0.0.1:1", "http://127.0.0.1:1"),
        ("redis://host/0?password=s3cret&ssl_ca_certs=/a", "redis://host/0?ssl_ca_certs=/a"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """redis-py takes a password in the query too."""
    assert without_password(url) == shown
    assert has_password(url) == (url != shown)


@pytest.mark.parametrize("url", ["redis://host:7/3", "unix:///run/redis.sock"])
def test_a_role_logs_in_with_the_password_of_its_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "producer").write_text("a:b/c@d\n")
    pool = redis.Redis.from_url(url_of(RedisRole.PRODUCER, url, tmp_path)).connection_pool
    assert pool.connection_kwargs["username"] == "producer"
    assert pool.connection_kwargs["password"] == "a:b/c@d"
    assert place_of(url_of(RedisRole.PRODUCER, url, tmp_path)) == place_of(url)
    assert url_of(RedisRole.PRODUCER, url, None) == url
