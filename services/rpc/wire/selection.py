"""Score queries and replies <-> `selection.proto`."""

from __future__ import annotations

from itertools import islice

from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.types import MAX_CANDIDATES, PositionScores, ScoreQuery, ScoreReply


def write_query(query: ScoreQuery) -> pb.ScoreRequest:
    """`fresh` is for the caller's own cache and is not sent."""
    candidate_ids: list[int] = []
    for group in query.candidate_ids:
        candidate_ids.extend(group)
    return pb.ScoreRequest(
        token_ids=query.token_ids,
        positions=query.positions,
        candidate_ids=candidate_ids,
        candidate_counts=[len(group) for group in query.candidate_ids],
        excluded_ids=query.excluded_ids,
        vocab_size=query.vocab_size,
        sequence_id=query.sequence_id,
    )


def read_query(request: pb.ScoreRequest) -> ScoreQuery:
    """A proposer's query, in time linear in its size. Counts are checked before anything is built.

    Raises:
        InvalidRequestError: more positions than tokens, or positions, counts and candidates do not
            fit together.
    """
    counts = _checked_counts(request)
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


def _checked_counts(request: pb.ScoreRequest) -> list[int]:
    tokens = len(request.token_ids)
    positions = len(request.positions)
    candidates = len(request.candidate_ids)
    if positions > tokens:
        raise InvalidRequestError(
            f"positions: {positions} given for {tokens} token_ids; each position is one "
            "of the tokens, and given once"
        )
    given = len(request.candidate_counts)
    if given != positions:
        raise InvalidRequestError(
            f"candidate_counts: {given} given for {positions} "
            "positions; send one for each (it may be 0)"
        )
    counts = list(request.candidate_counts)
    if sum(counts) != candidates:
        raise InvalidRequestError(
            f"candidate_counts add up to {sum(counts)}, but there are {candidates} candidate_ids"
        )
    if max(counts, default=0) > MAX_CANDIDATES:
        raise InvalidRequestError(f"candidate_counts: at most {MAX_CANDIDATES} per position")
    return counts


def write_reply(reply: ScoreReply, tokenizer_digest: str) -> pb.ScoreResponse:
    """`cached` is the caller's own knowledge and is not sent."""
    log_probs: list[float] = []
    for position in reply.positions:
        log_probs.extend(position.log_probs)
    return pb.ScoreResponse(
        log_probs=log_probs,
        top_ids=[position.top_id for position in reply.positions],
        llm_digest=reply.llm_digest,
        tokenizer_digest=tokenizer_digest,
    )


def read_reply(query: ScoreQuery, response: pb.ScoreResponse) -> ScoreReply:
    """The selector's reply to `query`.

    Raises:
        SelectorUnavailableError: the reply has other counts than the query.
    """
    counts = [len(group) for group in query.candidate_ids]
    fits = len(response.top_ids) == len(counts) and len(response.log_probs) == sum(counts)
    if not fits:
        raise SelectorUnavailableError(
            "a selector's reply does not fit its query; are its versions the same?"
        )
    log_probs = iter(response.log_probs)
    positions = []
    for count, top_id in zip(counts, response.top_ids, strict=True):
        positions.append(PositionScores(tuple(islice(log_probs, count)), top_id))
    return ScoreReply(tuple(positions), response.llm_digest)
