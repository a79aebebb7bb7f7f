from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Version(_message.Message):
    __slots__ = ("name", "kind", "reads", "live", "created_at", "metrics", "share")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    reads: str
    live: bool
    created_at: float
    metrics: _containers.ScalarMap[str, float]
    share: float
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., reads: _Optional[str] = ..., live: _Optional[bool] = ..., created_at: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., share: _Optional[float] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    def __init__(self, versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ...) -> None: ...

class PromoteVersionRequest(_message.Message):
    __slots__ = ("name", "share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    share: float
    def __init__(self, name: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class PromoteVersionResponse(_message.Message):
    __slots__ = ("live", "canary")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    live: str
    canary: str
    def __init__(self, live: _Optional[str] = ..., canary: _Optional[str] = ...) -> None: ...

class RollbackVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackVersionResponse(_message.Message):
    __slots__ = ("live",)
    LIVE_FIELD_NUMBER: _ClassVar[int]
    live: str
    def __init__(self, live: _Optional[str] = ...) -> None: ...

class CountLabelsRequest(_message.Message):
    __slots__ = ("flush",)
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    flush: bool
    def __init__(self, flush: _Optional[bool] = ...) -> None: ...

class CountLabelsResponse(_message.Message):
    __slots__ = ("queued", "in_lake", "dead_letters", "dropped")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    IN_LAKE_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTERS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    queued: int
    in_lake: int
    dead_letters: int
    dropped: int
    def __init__(self, queued: _Optional[int] = ..., in_lake: _Optional[int] = ..., dead_letters: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...
