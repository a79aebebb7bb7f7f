"""The LLM of the gate: the running service's selectors, or a bundled LLM in this process.

An LLM of real size is not loaded a second time for the gate. Without a service, the gate does
without it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from s2t_shared.config import Config
from s2t_shared.decode.interfaces import LLMInfo, SelectorClient, SLMInfo
from s2t_shared.decode.llm_selector import InProcessSelector, LLMSelector
from s2t_shared.errors import S2TError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from services.roles import APPLICATION
from services.serve.remote_selector import RemoteSelector, address_finder
from services.serve.selector_replica import SelectorReplica

log = logging.getLogger(__name__)
REACH_S = 10.0  # wait so long for the service's selectors


@contextmanager
def gate_llm(config: Config, slm: SLMInfo, tokenizer: Tokenizer) -> Iterator[SelectorClient | None]:
    """An LLM that scores answers, while the block runs; None where there is none."""
    if config.llm.model == "bundled":
        yield _bundled(config, tokenizer)
        return
    handle = _selector_handle()
    if not config.selector.addresses and handle is None:
        log.info("no selector runs: the gate does not ask the LLM")
        yield None
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gate-llm", daemon=True)
    thread.start()
    try:
        connecting = _connect(config, slm, tokenizer, handle)
        yield asyncio.run_coroutine_threadsafe(connecting, loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_tasks() -> None:
    """End what a `RemoteSelector` does on this loop in the background."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _bundled(config: Config, tokenizer: Tokenizer) -> SelectorClient | None:
    """A model of a few megabytes: loading it is cheaper than finding one that runs. None where the
    SLM has another tokenizer."""
    own = Tokenizer.load(resolve_model(config.llm.model, "llm"))
    if own.digest != tokenizer.digest:
        return None
    runtime = ModelRuntime.load(
        config.llm.model, config.llm.dtype, config.training.device, config.llm.kv_bytes, "llm"
    )
    return InProcessSelector(LLMSelector(runtime, own.digest))


def _selector_handle() -> Any:
    """Serve's handle of the selectors in this Ray cluster, None where none runs."""
    try:
        running = serve.status().applications.get(APPLICATION)
    except Exception as error:  # noqa: BLE001 - the border to Serve: it may raise anything here
        log.info("Serve does not answer: %s", type(error).__name__)
        return None
    name = SelectorReplica.__name__
    if running is None or name not in running.deployments:
        return None
    return serve.get_deployment_handle(name, APPLICATION)


async def _connect(
    config: Config, slm: SLMInfo, tokenizer: Tokenizer, handle: Any
) -> SelectorClient | None:
    fallback = LLMInfo("", "", slm.eos_ids, slm.max_length)
    find_addresses = address_finder(config, handle)
    remote = RemoteSelector(find_addresses, config.security, tokenizer.digest, fallback)
    try:
        await remote.wait_until_reachable(REACH_S)
    except S2TError as error:
        log.warning("the gate does not ask the LLM: %s", error)
        return None
    return remote if remote.reachable else None
