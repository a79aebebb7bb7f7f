"""Versions and label counts <-> `admin.proto`."""

from __future__ import annotations

from s2t_shared.pb.v1 import admin_pb2 as pb
from s2t_shared.types import LabelCounts, PublishedVersion


def write_version(version: PublishedVersion) -> pb.Version:
    return pb.Version(
        name=version.name,
        kind=version.kind,
        reads=version.reads,
        live=version.live,
        created_at=version.created_at,
        metrics=version.metrics,
        share=version.share,
    )


def read_version(message: pb.Version) -> PublishedVersion:
    return PublishedVersion(
        name=message.name,
        kind=message.kind,
        reads=message.reads,
        live=message.live,
        created_at=message.created_at,
        metrics=dict(message.metrics),
        share=message.share,
    )


def write_label_counts(counts: LabelCounts) -> pb.CountLabelsResponse:
    return pb.CountLabelsResponse(
        queued=counts.queued,
        in_lake=counts.in_lake,
        dead_letters=counts.dead_letters,
        dropped=counts.dropped,
    )


def read_label_counts(message: pb.CountLabelsResponse) -> LabelCounts:
    return LabelCounts(
        queued=message.queued,
        in_lake=message.in_lake,
        dead_letters=message.dead_letters,
        dropped=message.dropped,
    )
