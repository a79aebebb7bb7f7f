"""One message of every type of ours with every field set, as bytes and as JSON.

`python -m tests.services.rpc.golden_messages` records those of a release; `test_golden_messages`
shows that this program reads them and writes the same bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from s2t_shared.pb.v1 import admin_pb2, generation_pb2, selection_pb2

FILE = Path(__file__).with_suffix(".json")
F = FieldDescriptor


def kinds() -> dict[str, Descriptor]:
    """Every message of the contract by its name."""
    found = {}
    for file in (generation_pb2, admin_pb2, selection_pb2):
        found |= {kind.full_name: kind for kind in file.DESCRIPTOR.message_types_by_name.values()}
    return found


def filled(kind: Descriptor) -> Any:
    """A message with a value in every field; of a oneof, in its first."""
    made = GetMessageClass(kind)()
    for field in kind.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.fields[0] is not field:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(made, field.name)["key"] = 0.5
        elif field.message_type is not None and field.is_repeated:
            getattr(made, field.name).add().CopyFrom(filled(field.message_type))
        elif field.message_type is not None:
            getattr(made, field.name).CopyFrom(filled(field.message_type))
        elif field.is_repeated:
            getattr(made, field.name).extend([_value(field)] * 2)
        else:
            setattr(made, field.name, _value(field))
    return made


def _value(field: FieldDescriptor) -> Any:
    if field.type == F.TYPE_STRING:
        return field.name
    if field.type == F.TYPE_BYTES:
        return field.name.encode()
    if field.type == F.TYPE_BOOL:
        return True
    if field.type in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return 0.5
    return 1 if field.enum_type is not None else field.number


def recorded() -> dict[str, dict[str, Any]]:
    """What a release's program wrote, by message: its bytes and their meaning."""
    golden: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return golden


def record() -> None:
    golden = {}
    for name, kind in kinds().items():
        message = filled(kind)
        golden[name] = {
            "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
            "means": MessageToDict(message, preserving_proto_field_name=True),
        }
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
