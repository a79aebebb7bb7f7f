"""The border between our types and the wire: messages <-> types, errors <-> gRPC status, both ways.

Nothing else knows both, but the servicers and clients that send the messages. Needs grpcio and
protobuf only, so that a client can use it without torch or Ray.
"""

from services.rpc.wire.admin import (
    read_label_counts,
    read_version,
    write_label_counts,
    write_version,
)
from services.rpc.wire.errors import ERROR_KIND, STATUS, abort, error_of, status_of
from services.rpc.wire.generation import (
    read_answer,
    read_description,
    read_piece,
    read_request,
    read_step,
    write_answer,
    write_description,
    write_piece,
    write_request,
    write_settings,
    write_step,
)
from services.rpc.wire.selection import read_query, read_reply, write_query, write_reply

__all__ = [
    "ERROR_KIND",
    "STATUS",
    "abort",
    "error_of",
    "read_answer",
    "read_description",
    "read_label_counts",
    "read_piece",
    "read_query",
    "read_reply",
    "read_request",
    "read_step",
    "read_version",
    "status_of",
    "write_answer",
    "write_description",
    "write_label_counts",
    "write_piece",
    "write_query",
    "write_reply",
    "write_request",
    "write_settings",
    "write_step",
    "write_version",
]
