from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("token_ids", "positions", "candidate_ids", "candidate_counts", "excluded_ids", "vocab_size", "sequence_id")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_IDS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    candidate_counts: _containers.RepeatedScalarFieldContainer[int]
    excluded_ids: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    sequence_id: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., candidate_ids: _Optional[_Iterable[int]] = ..., candidate_counts: _Optional[_Iterable[int]] = ..., excluded_ids: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., sequence_id: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("log_probs", "top_ids", "llm_digest", "tokenizer_digest")
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LLM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    llm_digest: str
    tokenizer_digest: str
    def __init__(self, log_probs: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., llm_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ("digest", "tokenizer_digest", "eos_ids", "max_length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EOS_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: str
    tokenizer_digest: str
    eos_ids: _containers.RepeatedScalarFieldContainer[int]
    max_length: int
    def __init__(self, digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., eos_ids: _Optional[_Iterable[int]] = ..., max_length: _Optional[int] = ...) -> None: ...
