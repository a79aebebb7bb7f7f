"""The SLM as proposer and local selector on vLLM: tokens per second of a server's engine.

vLLM generates by itself, so a sequence has a *run*: a vLLM request that goes on as long as the
sequence takes what was proposed. It ends at a divergence point (a pause inside vLLM, by
`vllm_reader`), and where the sequence took another token or is not to go on now. The next run has
the sequence's tokens as its prompt, which vLLM's prefix cache knows.

`run` is one step of vLLM's own loop, in this process. Public vLLM interfaces only. Decides nothing;
knows no text, no LLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from s2t_shared.decode.interfaces import (
    ModelInput,
    ModelOutput,
    PromptScores,
    Proposal,
    SelectionInput,
    SequenceKV,
    SLMInfo,
)
from s2t_shared.decode.vllm_options import VLLMOptions, cannot_run, check_installed, first_line
from s2t_shared.decode.vllm_reader import RUN, Run, Vocabulary, logits_reader
from s2t_shared.errors import ConfigError, InvalidRequestError, ModelFailedError
from s2t_shared.model.loading import identify_model
from s2t_shared.model.local_selector import AdapterHost, LocalSelector
from s2t_shared.model.runtime import check_ids
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.types import SUPPORT_SIZE, Mode, Policy, Proposals

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.lora.request import LoRARequest

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MAX_LORA_RANK = 64  # of local selectors, where nothing else is said
# Versions that vLLM holds at once. It gets one place more, which stays empty: its operations for
# CPUs apply the last place's adapter to the tokens of the base model.
MAX_ADAPTERS = 3
CPU_BLOCK_TOKENS = 32  # of the prefix cache: a resubmitted run reads less than so many again

_in_this_process: WeakSet[VLLMProposer] = WeakSet()


@dataclass
class _Adapter:
    """A version's adapter in vLLM. users: open sequences that may need it."""

    request: LoRARequest
    users: int = 0


@dataclass(eq=False)
class VLLMSequence:
    """A sequence's place: its run, while it has one."""

    policy: Policy
    local_selector: LocalSelector | None = None
    adapter: _Adapter | None = None
    run: Run | None = None

    def truncate(self, length: int) -> None:
        if self.run is not None and self.run.length > length:
            self.run.length = -1  # it is no sequence's any more

    def continues(self, item: ModelInput) -> bool:
        """Whether the run generates what the input asks for."""
        run = self.run
        if run is None or type(run.item) is not type(item):
            return False
        return run.length == len(item.token_ids) and run.last_id == item.token_ids[-1]


class VLLMProposer:
    """The SLM. Implements `SLMProposer`."""

    def __init__(
        self,
        engine: LLMEngine,
        dtype: str,
        adapter_host: AdapterHost,
        info: SLMInfo,
        vocabulary: Vocabulary,
        runs: dict[int, Run],
    ) -> None:
        """dtype: of the arithmetic. adapter_host: what versions can be loaded for. runs: those that
        the engine's logits processor reads."""
        self._engine = engine
        self.dtype = dtype
        self.adapter_host = adapter_host
        self.info = info
        self._vocabulary = vocabulary
        self._runs = runs
        self._numbers = count(1)
        self._adapters: dict[str, _Adapter] = {}  # by version
        self._open = 0
        _in_this_process.add(self)

    @classmethod
    def load(
        cls,
        model: str,
        options: VLLMOptions,
        tokenizer: Tokenizer,
        *,
        max_num_seqs: int = 32,
        max_lora_rank: int = 0,
    ) -> VLLMProposer:
        """Start vLLM in this process on a Hugging Face folder, a hub id or "bundled".

        max_num_seqs: sequences in one batch. max_lora_rank: of local selectors, 0: there are none.

        Raises:
            ConfigError: vLLM is not installed, runs an SLM in this process already, or is to spread
                this one over several GPUs.
            ModelLoadError: the model is missing, or vLLM cannot run it with these options.
        """
        if options.tensor_parallel * options.pipeline_parallel > 1:
            raise ConfigError(
                "slm.tensor_parallel, slm.pipeline_parallel: the SLM runs on one GPU; start more "
                "proposers (proposer.replicas) instead"
            )
        if _in_this_process:  # vLLM's distributed state is the process's: one would end the other's
            raise ConfigError(
                "vLLM runs an SLM in this process already: start another process, or let go of the "
                "first pair"
            )
        check_installed("slm.runtime")
        identity = identify_model(model)
        excluded_ids = tuple(
            i for i in reserved_ids(tokenizer, identity.vocab_rows) if i < identity.vocab_rows
        )
        vocabulary = Vocabulary(
            excluded_ids=excluded_ids,
            support_size=min(SUPPORT_SIZE, identity.vocab_rows - len(excluded_ids)),
            pause_id=min(excluded_ids or identity.eos_ids or {0}),
        )
        runs: dict[int, Run] = {}
        arguments = options.arguments(identity.folder) | {
            "max_model_len": options.max_length,
            "max_num_seqs": max_num_seqs,
            "logits_processors": [logits_reader(runs, vocabulary)],
            "distributed_executor_backend": "uni",
            "async_scheduling": False,  # a run goes on when its sequence has decided
        }
        if max_lora_rank:
            arguments |= {
                "enable_lora": True,
                "max_lora_rank": _allowed_rank(max_lora_rank),
                "max_loras": MAX_ADAPTERS + 1,
            }
        try:
            engine = _start(arguments)
        except Exception as error:  # the border to vLLM, which raises anything here
            raise cannot_run(model, options, error) from error
        cache = engine.vllm_config.cache_config
        info = SLMInfo(
            digest=options.digest(identity.digest),
            eos_ids=identity.eos_ids,
            max_length=engine.model_config.max_model_len,
            vocab_rows=identity.vocab_rows,
            excluded_ids=excluded_ids,
            kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        )
        host = AdapterHost(identity.digest, max_lora_rank)
        return cls(engine, options.dtype, host, info, vocabulary, runs)

    # -- sequences --------------------------------------------------------------------------------

    def check(
        self, token_ids: Sequence[int], policy: Policy, local_selector: LocalSelector | None
    ) -> None:
        """Raises InvalidRequestError: an id is outside the vocabulary, or the local selector is of
        a kind that vLLM cannot run."""
        check_ids(token_ids, self.info.vocab_rows)
        untrained = local_selector is None and policy.mode is Mode.S2T_LOCAL
        hosted = local_selector is None or local_selector.is_ordinary_lora
        if untrained or not hosted:
            found = "none" if local_selector is None else f"version {local_selector.version!r}"
            raise InvalidRequestError(
                "the SLM's runtime is vllm, which runs local selectors of kind prefix that read "
                f"adapted only (here: {found}); name such a version, or set slm.runtime to torch",
                field="version",
            )

    @property
    def kv_slots_in_use(self) -> int:
        return self._open

    @property
    def kv_usage(self) -> None:
        return None

    def fits(self, policy: Policy, tokens: int) -> bool:
        """Whether a sequence of so many tokens can ever be served."""
        return tokens <= self.info.kv_tokens

    def open(
        self,
        local_selector: LocalSelector | None,
        policy: Policy,
        token_ids: Sequence[int],
        max_tokens: int,
    ) -> VLLMSequence | None:
        """A place for a new sequence, or None while its adapter has none.

        Sequences that the KV has no room for wait in vLLM itself.
        """
        adapter = None
        if local_selector is not None and self.adapter_host.max_rank:
            adapter = self._load(local_selector)
            if adapter is None:
                return None
            adapter.users += 1
        self._open += 1
        return VLLMSequence(policy, local_selector, adapter)

    def close(self, kv: SequenceKV) -> None:
        """End a sequence's run."""
        place = _place(kv)
        self._open -= 1
        if place.adapter is not None:
            place.adapter.users -= 1
        if place.run is not None:
            self._end([place.run])

    def read_prompt(self, token_ids: Sequence[int], count: int) -> PromptScores:
        raise InvalidRequestError(
            "the log-probabilities of a prompt's own tokens are known where slm.runtime is torch "
            "(here: vllm); leave them out",
            field="prompt_alternatives",
        )

    def _load(self, local_selector: LocalSelector) -> _Adapter | None:
        """A version's adapter, under a name of its own: the prefix cache tells them apart by it."""
        from vllm.lora.request import LoRARequest

        version = local_selector.version
        if version in self._adapters:
            return self._adapters[version]
        if len(self._adapters) == MAX_ADAPTERS:
            unused = [name for name, adapter in self._adapters.items() if not adapter.users]
            if not unused:
                return None
            self._engine.remove_lora(self._adapters.pop(unused[0]).request.lora_int_id)
        assert local_selector.folder is not None
        request = LoRARequest(version, next(self._numbers), str(local_selector.folder))
        self._adapters[version] = _Adapter(request)
        return self._adapters[version]

    # -- the step ---------------------------------------------------------------------------------

    def run(self, inputs: Sequence[ModelInput]) -> list[ModelOutput]:
        """One step of vLLM. An output is None while its prompt is not read to its end."""
        if not inputs:
            return []
        going_on = {_place(item.kv).run for item in inputs if _place(item.kv).continues(item)}
        self._end([run for run in self._runs.values() if run not in going_on])
        runs = [self._run_of(item) for item in inputs]
        self._step()
        return [_take(run, item) for run, item in zip(runs, inputs, strict=True)]

    def _run_of(self, item: ModelInput) -> Run:
        """The run that generates what the input asks for, begun if there is none."""
        place = _place(item.kv)
        run = place.run
        if run is None or run.number not in self._runs:
            run = place.run = self._begin(place, item)
        run.item = item
        return run

    def _begin(self, place: VLLMSequence, item: ModelInput) -> Run:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        run = Run(number, item, len(item.token_ids), item.token_ids[-1])
        selecting = isinstance(item, SelectionInput)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1 if selecting else self.info.max_length - run.length,
            stop_token_ids=[self._vocabulary.pause_id],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={RUN: number},
            skip_clone=True,
        )
        adapted = selecting or place.policy.proposals is Proposals.ADAPTED
        adapter = place.adapter.request if adapted and place.adapter is not None else None
        self._runs[number] = run
        prompt = tokens_input(list(item.token_ids))
        self._engine.add_request(str(number), prompt, params, lora_request=adapter)
        return run

    def _end(self, runs: Sequence[Run]) -> None:
        """End runs that vLLM has not ended itself."""
        numbers = [run.number for run in runs if self._runs.pop(run.number, None) is not None]
        if numbers:
            self._engine.abort_request([str(number) for number in numbers])

    def _step(self) -> None:
        """Raises ModelFailedError: vLLM has failed."""
        try:
            outputs = self._engine.step()
        except Exception as error:  # the border to vLLM
            raise ModelFailedError(
                f"vLLM, which runs the SLM, has failed ({first_line(error)}); start it anew"
            ) from error
        for output in outputs:
            run = self._runs[int(output.request_id)]
            run.is_new = True
            if output.finished:
                del self._runs[run.number]


def _take(run: Run, item: ModelInput) -> ModelOutput:
    """What the last step made of an input."""
    if not run.is_new:
        return None
    run.is_new = False
    output = run.output
    if isinstance(output, Proposal):
        run.length += 1
        run.last_id = output.top_id if output.drawn_id is None else output.drawn_id
    elif isinstance(item, SelectionInput) and output is not None:
        selector = _place(item.kv).local_selector
        fusion = selector.fusion if selector is not None else 0.0
        pairs = zip(output, item.base_log_probs, strict=True)
        return tuple(score + fusion * log_prob for score, log_prob in pairs)
    return output


def _place(kv: SequenceKV) -> VLLMSequence:
    assert isinstance(kv, VLLMSequence), "a place of another proposer"
    return kv


def _allowed_rank(rank: int) -> int:
    """The least rank that vLLM has kernels for."""
    return next(allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)


def _start(arguments: dict[str, Any]) -> LLMEngine:
    """vLLM's engine, in this process."""
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        arguments = arguments | {"block_size": CPU_BLOCK_TOKENS}
    with _environment(IN_PROCESS):
        return LLMEngine.from_engine_args(EngineArgs(**arguments))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the `with` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
