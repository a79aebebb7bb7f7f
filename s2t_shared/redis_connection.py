"""Connections to Redis: clients that never wait long and never retry by themselves, and their
errors.

Knows no key and no command. Servers are started in `services.launch.redis_server`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from s2t_shared.errors import StoreError


def open_client(url: str, timeout_s: float) -> redis.Redis:
    """A client that waits at most `timeout_s` for a connection or an answer and never retries by
    itself.

    Raises:
        StoreError: the URL is malformed.
    """
    try:
        # Protocol 2: one answer shape for every Redis and Valkey, and the shortest handshake.
        return redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,  # no CLIENT SETINFO: one command less for a role to be allowed
        )
    except ValueError:
        # Its text may quote a part of the password: keep it out of ours.
        raise StoreError(
            "Redis URL: malformed; write redis://[user:password@]host:port[/db], with reserved "
            "characters of the password percent-encoded"
        ) from None


@contextmanager
def redis_errors(place: str) -> Iterator[None]:
    """The border: what redis-py raises inside becomes a StoreError that names `place`."""
    try:
        yield
    except redis.AuthenticationError:
        raise StoreError(
            f"Redis at {place} wants a password, or refuses the one it got; give it in redis.url "
            "(redis://user:password@host:port, by the environment: S2T_REDIS__URL), or set "
            "redis.password_dir to the folder that `s2t redis-acl` made for this server"
        ) from None
    except redis.exceptions.NoPermissionError as error:
        raise StoreError(
            f"Redis at {place}: {str(error)[:200]}; give its ACL file the rules that "
            "`s2t redis-acl` writes"
        ) from None
    except (redis.RedisError, OSError) as error:
        # redis-py quotes the failed command of a pipeline, and Redis the arguments of an unknown
        # one: label contents.
        reason = str(error).rsplit("caused error: ", 1)[-1].split(", with args", 1)[0][:200]
        raise StoreError(
            f"Redis at {place}: {type(error).__name__}: {reason}; is it running, and is its URL "
            "right?"
            if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError))
            else f"Redis at {place}: {type(error).__name__}: {reason}"
        ) from None
