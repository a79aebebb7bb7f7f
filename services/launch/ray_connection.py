"""Connections to Ray: to a cluster that runs, or to one of this machine's own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)

from s2t_shared.errors import ConfigError

logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
OBJECT_STORE_BYTES = 256 << 20
PROBE_TIMEOUT_S = 5.0
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


@contextmanager
def local_ray(num_cpus: float | None = None, reuse: bool = True) -> Iterator[None]:
    """A connection to Ray: this process's own, or a running local cluster's (with `reuse`), or a
    fresh local cluster that ends with the block."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":
        reuse = False
    if reuse and _join(address or "auto", QUIET):
        try:
            yield
        finally:
            ray.shutdown()
        return
    ray.init(
        address="local",
        num_cpus=int(num_cpus or max(2, os.cpu_count() or 2)),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **QUIET,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def existing_ray(address: str = "") -> Iterator[bool]:
    """A connection to a Ray cluster that runs already; yields whether there is one.

    address: host:port of its head, as recorded; where nothing listens any more, or nothing is
    recorded: that of RAY_ADDRESS, else one on this machine.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
    """
    if ray.is_initialized():
        yield True
        return
    named = os.environ.get("RAY_ADDRESS", "") or "auto"
    if address and listens(address):
        named = address
        # As Ray does for a cluster that it finds itself: one of `ray.init` asks for this user's
        # token.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    joined = named != "local" and _join(named, QUIET)
    try:
        yield joined
    finally:
        if joined:
            ray.shutdown()


def _join(address: str, quiet: dict[str, Any]) -> bool:
    """Connect to a running Ray cluster; whether there is one.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
    """
    try:
        if address != "auto":
            _probe(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:  # a ConnectionError is an OSError
        if address == "auto":
            return False
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"RAY_ADDRESS={address}: this Ray cluster cannot be joined ({reason}); start it "
            "(ray start --head), correct the address, set RAY_AUTH_MODE=token where the cluster "
            "asks for a token, or unset RAY_ADDRESS for a Ray of this machine's own"
        ) from error
    return True


def listens(address: str) -> bool:
    """Whether something does at host:port."""
    try:
        _probe(address)
    except (OSError, ValueError):
        return False
    return True


def _probe(address: str) -> None:
    """Check that something listens at `address`: Ray itself tries for minutes without a word.

    Raises:
        OSError: nothing does.
        ValueError: it is not host:port.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError("not host:port of the head node; a ray:// client cannot run a service")
    socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()
