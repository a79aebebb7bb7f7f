"""Score queries and replies <-> `selection.proto`."""

from __future__ import annotations

from itertools import islice

from s2t_shared import errors
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.types import MAX_CANDIDATES, PositionScores, ScoreQuery, ScoreReply


def write_query(query: ScoreQuery) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        token_ids=query.token_ids,
        positions=query.positions,
        candidate_ids=[i for group in query.candidate_ids for i in group],
        candidate_counts=[len(group) for group in query.candidate_ids],
        excluded_ids=query.excluded_ids,
        vocab_size=query.vocab_size,
        sequence_id=query.sequence_id,
    )


def read_query(request: pb.ScoreRequest) -> ScoreQuery:
    """A proposer's query, in time linear in its size; its counts are checked before anything is
    built.

    Raises: InvalidRequestError: more positions than tokens, or counts, positions and candidates do
        not fit together.
    """
    tokens, positions = len(request.token_ids), len(request.positions)
    if positions > tokens:
        raise errors.InvalidRequestError(
            f"positions: {positions} given for {tokens} token_ids; each position is one "
            "of the tokens, and given once"
        )
    if len(request.candidate_counts) != positions:
        raise errors.InvalidRequestError(
            f"candidate_counts: {len(request.candidate_counts)} given for {positions} "
            "positions; send one for each (it may be 0)"
        )
    counts = list(request.candidate_counts)
    if sum(counts) != len(request.candidate_ids):
        raise errors.InvalidRequestError(
            f"candidate_counts add up to {sum(counts)}, but there are "
            f"{len(request.candidate_ids)} candidate_ids"
        )
    if max(counts, default=0) > MAX_CANDIDATES:
        raise errors.InvalidRequestError(f"candidate_counts: at most {MAX_CANDIDATES} per position")
    ids = iter(request.candidate_ids)
    groups = [tuple(islice(ids, count)) for count in counts]
    return ScoreQuery(
        token_ids=tuple(request.token_ids),
        positions=tuple(request.positions),
        candidate_ids=tuple(groups),
        excluded_ids=tuple(request.excluded_ids),
        vocab_size=request.vocab_size,
        sequence_id=request.sequence_id,
    )


def write_reply(reply: ScoreReply) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        log_probs=[x for p in reply.positions for x in p.log_probs],
        top_ids=[p.top_id for p in reply.positions],
        llm_digest=reply.llm_digest,
    )


def read_reply(query: ScoreQuery, response: pb.ScoreResponse) -> ScoreReply:
    positions, at, log_probs = [], 0, list(response.log_probs)
    asked = len(query.candidate_ids), sum(map(len, query.candidate_ids))
    if (len(response.top_ids), len(log_probs)) != asked:
        raise errors.SelectorUnavailableError(
            "a selector's reply does not fit its query; are its versions the same?"
        )
    for group, top_id in zip(query.candidate_ids, response.top_ids, strict=True):
        positions.append(PositionScores(tuple(log_probs[at : at + len(group)]), top_id))
        at += len(group)
    return ScoreReply(tuple(positions), response.llm_digest)
