"""Malformed requests as hypothesis strategies, from the protobuf descriptors: every field with
values at and beyond its edge, messages cut and altered, bytes that are none; and raw frames."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

from s2t_shared.pb.v1 import admin_pb2, generation_pb2, selection_pb2

CANARY = "canary-7f3a of a prompt"  # stands in prompts only
F = FieldDescriptor
FLOATS = [0.0, -1.0, 0.5, 1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "x", "none", "\x00", "\U0001f600", "../../etc/passwd", "{{ 7*7 }}", "a" * 300]
PROMPT_FIELDS = ("text", "content")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@dataclass(frozen=True)
class Call:
    """method: with its service, "/" before both. sent: the bytes of the one message."""

    method: str
    sent: bytes


def _methods(*files: Any) -> dict[str, Descriptor]:
    found = {}
    for file in files:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = method.input_type
    return found


GATEWAY = _methods(generation_pb2, admin_pb2, reflection_pb2, health_pb2)
GATEWAY.pop("/grpc.health.v1.Health/Watch")  # answers for ever
SELECTOR = _methods(selection_pb2)


def calls(methods: dict[str, Descriptor]) -> st.SearchStrategy[Call]:
    """A call of one of the methods."""
    names = sorted(methods)
    weighty = [n for n in names if n.endswith(("Generate", "Score"))]
    name = st.one_of(st.sampled_from(weighty), st.sampled_from(names))
    known = name.flatmap(lambda n: st.builds(Call, st.just(n), _sent(methods[n])))
    unknown = st.builds(Call, st.sampled_from(["/a/b", "/s2t.v1.None/Get", "/x"]), st.just(b""))
    return st.integers(0, 19).flatmap(lambda i: unknown if i == 7 else known)


def _sent(kind: Descriptor) -> st.SearchStrategy[bytes]:
    good = message(kind, 3).map(lambda m: m.SerializeToString())
    cut = st.tuples(good, st.floats(0, 1)).map(lambda t: t[0][: int(len(t[0]) * t[1])])
    altered = st.tuples(good, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)).map(
        lambda t: t[0][: t[1] % (len(t[0]) + 1)] + t[2] + t[0][t[1] % (len(t[0]) + 1) + 1 :]
    )
    no_text = st.builds(_bad_text, st.integers(1, 20))
    return st.one_of(good, good, cut, altered, no_text, st.binary(max_size=60))


def _bad_text(number: int) -> bytes:
    """A field of bytes that are no UTF-8."""
    return bytes([number << 3 & 0x7F | 2, 3]) + b"\xff\xfe\xc0"


@cache
def message(kind: Descriptor, depth: int) -> st.SearchStrategy[Any]:
    """A message with some of its fields, down to `depth`."""
    fields = [f for f in kind.fields if depth or f.type != F.TYPE_MESSAGE]
    if not fields:
        return st.just(GetMessageClass(kind)())
    values = {f.name: _field(f, depth) for f in fields}
    chosen = st.lists(st.sampled_from(sorted(values)), max_size=6, unique=True)
    required = [f.name for f in fields if f.name in ("parameters", "token_ids", "positions")]
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({n: values[n] for n in {*names, *required}})
    ).map(lambda given: _made(kind, given))


def _made(kind: Descriptor, given: dict[str, Any]) -> Any:
    made = GetMessageClass(kind)()
    for name, value in given.items():
        field = kind.fields_by_name[name]
        if field.is_repeated:
            if field.message_type is None:
                getattr(made, name).extend(value)
            elif not field.message_type.GetOptions().map_entry:
                for item in value:
                    getattr(made, name).add().CopyFrom(item)
        elif field.message_type is not None:
            getattr(made, name).CopyFrom(value)
        else:
            setattr(made, name, value)
    return made


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    one = _value(field, depth)
    if not field.is_repeated:
        return one
    if field.message_type is not None:
        return st.lists(one, max_size=3)
    long = st.tuples(one, st.sampled_from([200, 5000])).map(lambda t: [t[0]] * t[1])
    return st.integers(0, 9).flatmap(lambda i: long if i == 0 else st.lists(one, max_size=4))


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return message(field.message_type, depth - 1)
    if field.enum_type is not None:
        return st.sampled_from([0, 1, 2, 3, 5, 7, 99, -1, 2**31 - 1])
    if field.type in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return st.sampled_from(FLOATS)
    if field.type == F.TYPE_BOOL:
        return st.booleans()
    if field.type == F.TYPE_STRING:
        texts = st.sampled_from(TEXTS)
        return texts.map(lambda t: f"{CANARY} {t}") if field.name in PROMPT_FIELDS else texts
    if field.type == F.TYPE_BYTES:
        return st.binary(max_size=20)
    high = {F.TYPE_UINT32: 2**32 - 1, F.TYPE_UINT64: 2**64 - 1, F.TYPE_INT32: 2**31 - 1}
    most = high.get(field.type, 2**63 - 1)
    low = 0 if field.type in (F.TYPE_UINT32, F.TYPE_UINT64) else -most
    return st.sampled_from([low, 0, 1, 2, 3, 7, 64, 65, 511, 512, most])


# -- below gRPC -----------------------------------------------------------------------------------


def _frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


frames = st.builds(
    _frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**32 - 1]),
    st.binary(max_size=40),
    st.sampled_from([None, None, None, 0, 5, 2**24 - 1]),
)
raw = st.one_of(
    st.lists(frames, min_size=1, max_size=6).map(lambda f: PREFACE + SETTINGS + b"".join(f)),
    st.binary(min_size=1, max_size=80),
    st.just(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    st.just(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 60),  # a TLS hello
)
