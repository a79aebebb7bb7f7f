"""Converts value types to protobuf messages, errors to gRPC statuses, and both back.

Only servicers and clients, which send the messages, know protobuf besides. Imports grpcio,
protobuf and google.rpc only, so that a client needs neither torch nor Ray.
"""

from services.rpc.wire.admin import (
    read_label_counts,
    read_version,
    write_label_counts,
    write_version,
)
from services.rpc.wire.errors import (
    ERROR_KIND,
    INTERNAL,
    REASONS,
    STATUS,
    STATUS_DETAILS,
    Refusal,
    abort,
    abort_with,
    error_of,
    is_connection_lost,
    public_text,
    refusal_of,
    status_of,
)
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
    "INTERNAL",
    "REASONS",
    "STATUS",
    "STATUS_DETAILS",
    "Refusal",
    "abort",
    "abort_with",
    "error_of",
    "is_connection_lost",
    "public_text",
    "read_answer",
    "read_description",
    "read_label_counts",
    "read_piece",
    "read_query",
    "read_reply",
    "read_request",
    "read_step",
    "read_version",
    "refusal_of",
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
