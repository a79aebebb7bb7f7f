"""Builds what proposers and selectors run: from the configuration to collaborators that are ready.

The only place that knows all of them. Each function is called in its replica's process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from s2t_shared.config import Config, ModelConfig
from s2t_shared.decode.calibrate import calibration_prompts
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.interfaces import LLMInfo, SelectorClient, SLMInfo, SLMProposer
from s2t_shared.decode.llm_selector import LLMSelector
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.selection_cache import CachedSelector
from s2t_shared.decode.vllm_options import VLLMOptions
from s2t_shared.decode.vllm_proposer import VLLMProposer
from s2t_shared.decode.vllm_selector import VLLMSelector
from s2t_shared.labels.known_models import KnownModels, Models
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.redis_url import RedisRole, url_of
from s2t_shared.types import Prompt
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.weights import SLM
from services.metrics.decode_meter import DecodeMeter
from services.metrics.registry import Reading
from services.rpc import channels
from services.rpc.tokens import Role
from services.serve.calibrator import Calibrator
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from services.serve.remote_selector import RemoteSelector, address_finder
from services.serve.selector_server import SelectorServer
from services.serve.selector_thread import AsyncSelector, SelectorThread
from services.serve.traced_selector import traced
from services.serve.version_watcher import VersionWatcher

log = logging.getLogger(__name__)


# -- proposer -------------------------------------------------------------------------------------


async def proposer_service(config: Config, selectors: Any = None) -> ProposerService:
    """A proposer with its model loaded and its thresholds calibrated.

    selectors: Serve's handle of the selector deployment, None where there is none.

    Raises:
        ModelLoadError: the SLM is missing or not supported.
        TokenizerMismatchError: the LLM has another tokenizer.
        ConfigError: calibration failed, or a security file cannot be used.
        StoreError: the labels' spool cannot be used.
    """
    torch.set_num_threads(config.slm.threads)
    tokenizer = Tokenizer.load(resolve_model(config.slm.model), config.slm.chat_template)
    slm = _load_slm(config, tokenizer)
    info = slm.proposer.info
    remote = await _connect_selector(config, info, tokenizer, selectors)
    models = Models(info.digest, remote.info.digest, tokenizer.digest)
    labels = LabelRecorder(_label_writer(config, models))
    versions = VersionWatcher(LiveVersions(config.versions), slm.weights, tokenizer.digest)
    settings = config.proposer
    selector = _cached(config, remote)
    engine = Engine(
        slm.proposer,
        traced(selector),
        versions.lookup,
        max_num_seqs=settings.max_num_seqs,
        selection_timeout_s=settings.selection_timeout_s,
        max_draft_tokens=settings.max_draft_tokens,
    )
    thread = EngineThread(
        engine,
        tokenizer,
        check_when_idle=slm.check_when_idle,
        meter=DecodeMeter() if config.metrics.enabled else None,
    )
    calibrator = Calibrator(
        engine=thread,
        tokenizer=tokenizer,
        selector=remote,
        folder=config.data_dir / "calibration",
        prompts=_calibration_prompts(config, tokenizer),
        max_new_tokens=config.calibration.max_new_tokens,
    )
    await calibrator.start()
    live = versions.live_version or "none"
    log.info("proposer ready: slm %s, live local selector %s", slm.proposer.info.digest, live)
    service = ProposerService(
        engine=thread,
        tokenizer=tokenizer,
        selector=remote,
        versions=versions,
        labels=labels,
        calibration=calibrator.calibration,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queue_s=settings.max_queue_s,
        stall_timeout_s=settings.stall_timeout_s,
    )
    service.registry.add(remote.readings)
    if isinstance(selector, CachedSelector):
        service.registry.add(partial(cache_readings, selector))
    return service


def cache_readings(cache: CachedSelector) -> Iterator[Reading]:
    """For the metrics; from any thread."""
    yield Reading("s2t_selection_cache_lookups_total", cache.hits, ("hit",))
    yield Reading("s2t_selection_cache_lookups_total", cache.misses, ("miss",))


@dataclass(frozen=True)
class _SLM:
    """A loaded SLM. weights: what versions are for. check_when_idle: raises where KV was lost."""

    proposer: SLMProposer
    weights: SLM
    check_when_idle: Callable[[], None]


def _load_slm(config: Config, tokenizer: Tokenizer) -> _SLM:
    return (
        _vllm_slm(config, tokenizer)
        if config.slm.runtime == "vllm"
        else _torch_slm(config, tokenizer)
    )


def _vllm_slm(config: Config, tokenizer: Tokenizer) -> _SLM:
    proposer = VLLMProposer.load(
        config.slm.model,
        _vllm_options(config.slm),
        tokenizer,
        max_num_seqs=config.proposer.max_num_seqs,
        max_lora_rank=config.proposer.max_lora_rank,
    )
    return _SLM(proposer, proposer.adapter_host, lambda: None)


def _torch_slm(config: Config, tokenizer: Tokenizer) -> _SLM:
    slm = config.slm
    runtime = ModelRuntime.load(
        slm.model,
        slm.dtype,
        slm.device,
        slm.kv_bytes,
        max_num_seqs=config.proposer.max_num_seqs,
        cuda_graphs=config.proposer.cuda_graphs,
    )
    runtime.switch  # noqa: B018 - wrap the layers now, before the engine's thread runs the model
    excluded_ids = reserved_ids(tokenizer, runtime.vocab_rows)
    proposer = Proposer(runtime, excluded_ids, config.proposer.prefill_chunk_tokens)
    return _SLM(proposer, runtime, runtime.pool.check)


def _label_writer(config: Config, models: Models) -> LabelWriter | None:
    """models: of this proposer as it starts. They are written down before the gateway drains what
    an earlier one of the same models has left."""
    if not config.redis.url:
        return None
    spool_bytes = config.labels.spool_mib << 20
    url = url_of(RedisRole.PRODUCER, config.redis.url, config.redis.password_dir)
    known = KnownModels(config.known_models)
    if models.llm:
        known.add(models)
    return LabelWriter(LabelStream(url), config.spool, spool_bytes, known=known)


def _cached(config: Config, remote: RemoteSelector) -> SelectorClient:
    if not config.redis.url:
        return remote
    url = url_of(RedisRole.PRODUCER, config.redis.url, config.redis.password_dir)
    return CachedSelector(remote, url, config.redis.cache_ttl_s)


async def _connect_selector(
    config: Config, slm: SLMInfo, tokenizer: Tokenizer, selectors: Any
) -> RemoteSelector:
    """The client of the selectors that the configuration names, else of those that Serve runs."""
    find_addresses = address_finder(config, selectors)
    fallback = LLMInfo("", "", slm.eos_ids, slm.max_length)
    remote = RemoteSelector(find_addresses, config.security, tokenizer.digest, fallback)
    if config.selector.addresses or selectors is not None:
        channels.read_token(config.security.token_file, Role.SCORE)  # better now than never an LLM
        await remote.wait_until_reachable(config.selector.start_wait_s)
    return remote


def _calibration_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    settings = config.calibration
    return calibration_prompts(tokenizer, settings.count, settings.prompts)


# -- selector -------------------------------------------------------------------------------------


def selector_server(config: Config) -> SelectorServer:
    """The LLM's server, listening but not started.

    Raises:
        ModelLoadError: the LLM is missing or not supported.
        ConfigError: its address cannot be used, or vLLM is wanted and not installed.
    """
    torch.set_num_threads(config.llm.threads)
    runs = _vllm_selector if config.llm.runtime == "vllm" else _torch_selector
    return SelectorServer(
        runs(config.llm),
        config.security,
        config.selector,
        drain_grace_s=config.gateway.drain_s,
    )


def _torch_selector(llm: ModelConfig) -> AsyncSelector:
    runtime = ModelRuntime.load(llm.model, llm.dtype, llm.device, llm.kv_bytes, "llm")
    tokenizer = Tokenizer.load(resolve_model(llm.model, "llm"))
    return SelectorThread(LLMSelector(runtime, tokenizer.digest))


def _vllm_selector(llm: ModelConfig) -> AsyncSelector:
    return VLLMSelector.load(llm.model, _vllm_options(llm))


def _vllm_options(model: ModelConfig) -> VLLMOptions:
    return VLLMOptions(
        dtype=model.dtype,
        tensor_parallel=model.tensor_parallel,
        pipeline_parallel=model.pipeline_parallel,
        quantization=model.quantization,
        gpu_memory_utilization=model.gpu_memory_utilization,
        max_length=model.max_length,
    )
