from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_GREEDY: _ClassVar[Mode]
    MODE_SAMPLE: _ClassVar[Mode]
    MODE_S2T: _ClassVar[Mode]
    MODE_S2T_LOCAL: _ClassVar[Mode]
    MODE_TAKEOVER: _ClassVar[Mode]
    MODE_LLM: _ClassVar[Mode]
    MODE_MAJORITY: _ClassVar[Mode]

class Trigger(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRIGGER_UNSPECIFIED: _ClassVar[Trigger]
    TRIGGER_ENTROPY: _ClassVar[Trigger]
    TRIGGER_KL: _ClassVar[Trigger]
    TRIGGER_KL_REVERSE: _ClassVar[Trigger]
    TRIGGER_MARGIN: _ClassVar[Trigger]
    TRIGGER_RANDOM: _ClassVar[Trigger]
    TRIGGER_NEVER: _ClassVar[Trigger]
    TRIGGER_ALWAYS: _ClassVar[Trigger]

class Proposals(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROPOSALS_UNSPECIFIED: _ClassVar[Proposals]
    PROPOSALS_BASE: _ClassVar[Proposals]
    PROPOSALS_ADAPTED: _ClassVar[Proposals]

class OnLlmFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_LLM_FAILURE_UNSPECIFIED: _ClassVar[OnLlmFailure]
    ON_LLM_FAILURE_DEGRADE: _ClassVar[OnLlmFailure]
    ON_LLM_FAILURE_FAIL: _ClassVar[OnLlmFailure]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class ChosenBy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHOSEN_BY_UNSPECIFIED: _ClassVar[ChosenBy]
    CHOSEN_BY_SLM: _ClassVar[ChosenBy]
    CHOSEN_BY_SAMPLER: _ClassVar[ChosenBy]
    CHOSEN_BY_LLM: _ClassVar[ChosenBy]
    CHOSEN_BY_LOCAL: _ClassVar[ChosenBy]
MODE_UNSPECIFIED: Mode
MODE_GREEDY: Mode
MODE_SAMPLE: Mode
MODE_S2T: Mode
MODE_S2T_LOCAL: Mode
MODE_TAKEOVER: Mode
MODE_LLM: Mode
MODE_MAJORITY: Mode
TRIGGER_UNSPECIFIED: Trigger
TRIGGER_ENTROPY: Trigger
TRIGGER_KL: Trigger
TRIGGER_KL_REVERSE: Trigger
TRIGGER_MARGIN: Trigger
TRIGGER_RANDOM: Trigger
TRIGGER_NEVER: Trigger
TRIGGER_ALWAYS: Trigger
PROPOSALS_UNSPECIFIED: Proposals
PROPOSALS_BASE: Proposals
PROPOSALS_ADAPTED: Proposals
ON_LLM_FAILURE_UNSPECIFIED: OnLlmFailure
ON_LLM_FAILURE_DEGRADE: OnLlmFailure
ON_LLM_FAILURE_FAIL: OnLlmFailure
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
CHOSEN_BY_UNSPECIFIED: ChosenBy
CHOSEN_BY_SLM: ChosenBy
CHOSEN_BY_SAMPLER: ChosenBy
CHOSEN_BY_LLM: ChosenBy
CHOSEN_BY_LOCAL: ChosenBy

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Messages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class LabelRule(_message.Message):
    __slots__ = ("trigger", "threshold")
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    trigger: Trigger
    threshold: float
    def __init__(self, trigger: _Optional[_Union[Trigger, str]] = ..., threshold: _Optional[float] = ...) -> None: ...

class LabelOptions(_message.Message):
    __slots__ = ("store", "task", "problem_id", "split", "triggers", "budget", "rules", "durable", "collect", "group")
    STORE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_ID_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    COLLECT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    store: bool
    task: str
    problem_id: str
    split: str
    triggers: _containers.RepeatedScalarFieldContainer[Trigger]
    budget: float
    rules: _containers.RepeatedCompositeFieldContainer[LabelRule]
    durable: bool
    collect: bool
    group: str
    def __init__(self, store: _Optional[bool] = ..., task: _Optional[str] = ..., problem_id: _Optional[str] = ..., split: _Optional[str] = ..., triggers: _Optional[_Iterable[_Union[Trigger, str]]] = ..., budget: _Optional[float] = ..., rules: _Optional[_Iterable[_Union[LabelRule, _Mapping]]] = ..., durable: _Optional[bool] = ..., collect: _Optional[bool] = ..., group: _Optional[str] = ...) -> None: ...

class GenerationParameters(_message.Message):
    __slots__ = ("text", "messages", "token_ids", "mode", "trigger", "budget", "threshold", "candidates", "candidate_ratio", "proposals", "sampling", "samples", "max_new_tokens", "stop", "timeout_seconds", "version", "return_steps", "score_rollout", "labels", "fresh_selections", "on_llm_failure")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_RATIO_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RETURN_STEPS_FIELD_NUMBER: _ClassVar[int]
    SCORE_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    FRESH_SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    ON_LLM_FAILURE_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages: Messages
    token_ids: TokenIds
    mode: Mode
    trigger: Trigger
    budget: float
    threshold: float
    candidates: int
    candidate_ratio: float
    proposals: Proposals
    sampling: Sampling
    samples: int
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    timeout_seconds: float
    version: str
    return_steps: bool
    score_rollout: bool
    labels: LabelOptions
    fresh_selections: bool
    on_llm_failure: OnLlmFailure
    def __init__(self, text: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., mode: _Optional[_Union[Mode, str]] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., budget: _Optional[float] = ..., threshold: _Optional[float] = ..., candidates: _Optional[int] = ..., candidate_ratio: _Optional[float] = ..., proposals: _Optional[_Union[Proposals, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., samples: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., timeout_seconds: _Optional[float] = ..., version: _Optional[str] = ..., return_steps: _Optional[bool] = ..., score_rollout: _Optional[bool] = ..., labels: _Optional[_Union[LabelOptions, _Mapping]] = ..., fresh_selections: _Optional[bool] = ..., on_llm_failure: _Optional[_Union[OnLlmFailure, str]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "triggers", "flips", "llm_forwards", "degraded_steps")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    FLIPS_FIELD_NUMBER: _ClassVar[int]
    LLM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_STEPS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    triggers: int
    flips: int
    llm_forwards: int
    degraded_steps: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., triggers: _Optional[int] = ..., flips: _Optional[int] = ..., llm_forwards: _Optional[int] = ..., degraded_steps: _Optional[int] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("slm", "llm", "local_selector")
    SLM_FIELD_NUMBER: _ClassVar[int]
    LLM_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SELECTOR_FIELD_NUMBER: _ClassVar[int]
    slm: str
    llm: str
    local_selector: str
    def __init__(self, slm: _Optional[str] = ..., llm: _Optional[str] = ..., local_selector: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("index", "token_id", "chosen_by", "triggered", "signal", "candidate_ids", "scores", "slm_top_id", "llm_top_id", "llm_top_rank", "kl", "entropy", "degraded", "text", "llm_digest")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_BY_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SLM_TOP_ID_FIELD_NUMBER: _ClassVar[int]
    LLM_TOP_ID_FIELD_NUMBER: _ClassVar[int]
    LLM_TOP_RANK_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LLM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_id: int
    chosen_by: ChosenBy
    triggered: bool
    signal: float
    candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    slm_top_id: int
    llm_top_id: int
    llm_top_rank: int
    kl: float
    entropy: float
    degraded: str
    text: str
    llm_digest: str
    def __init__(self, index: _Optional[int] = ..., token_id: _Optional[int] = ..., chosen_by: _Optional[_Union[ChosenBy, str]] = ..., triggered: _Optional[bool] = ..., signal: _Optional[float] = ..., candidate_ids: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[float]] = ..., slm_top_id: _Optional[int] = ..., llm_top_id: _Optional[int] = ..., llm_top_rank: _Optional[int] = ..., kl: _Optional[float] = ..., entropy: _Optional[float] = ..., degraded: _Optional[str] = ..., text: _Optional[str] = ..., llm_digest: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("token_ids", "text", "finish_reason", "usage", "versions", "steps", "labels_stored", "rollout")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LABELS_STORED_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    versions: Versions
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    labels_stored: int
    rollout: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., labels_stored: _Optional[int] = ..., rollout: _Optional[bytes] = ...) -> None: ...

class StreamGenerateRequest(_message.Message):
    __slots__ = ("request_id", "parameters", "stream_steps")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STREAM_STEPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    parameters: GenerationParameters
    stream_steps: bool
    def __init__(self, request_id: _Optional[str] = ..., parameters: _Optional[_Union[GenerationParameters, _Mapping]] = ..., stream_steps: _Optional[bool] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("request_id", "text", "answer", "steps")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    answer: Answer
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "parameters")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    parameters: GenerationParameters
    def __init__(self, request_id: _Optional[str] = ..., parameters: _Optional[_Union[GenerationParameters, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "answer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    answer: Answer
    def __init__(self, request_id: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ...) -> None: ...

class DescribeServiceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeServiceResponse(_message.Message):
    __slots__ = ("slm_digest", "tokenizer_digest", "template_digest", "llm_digest", "max_length", "live_version", "canary_version", "canary_share", "calibrated_triggers", "proposers", "running_sequences", "waiting_sequences", "live_kv_slots", "llm_reachable")
    SLM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LLM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CANARY_VERSION_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    PROPOSERS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LIVE_KV_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LLM_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    slm_digest: str
    tokenizer_digest: str
    template_digest: str
    llm_digest: str
    max_length: int
    live_version: str
    canary_version: str
    canary_share: float
    calibrated_triggers: _containers.RepeatedScalarFieldContainer[Trigger]
    proposers: int
    running_sequences: int
    waiting_sequences: int
    live_kv_slots: int
    llm_reachable: bool
    def __init__(self, slm_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., template_digest: _Optional[str] = ..., llm_digest: _Optional[str] = ..., max_length: _Optional[int] = ..., live_version: _Optional[str] = ..., canary_version: _Optional[str] = ..., canary_share: _Optional[float] = ..., calibrated_triggers: _Optional[_Iterable[_Union[Trigger, str]]] = ..., proposers: _Optional[int] = ..., running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., live_kv_slots: _Optional[int] = ..., llm_reachable: _Optional[bool] = ...) -> None: ...
