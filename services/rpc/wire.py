"""The border between our types and the wire: proto <-> types, errors <-> gRPC status. Nothing else
knows both.

Needs grpcio and protobuf only, so that a client can use it without torch or Ray.
"""

from __future__ import annotations

import uuid
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from s2t_shared import errors
from s2t_shared.pb.v1 import admin_pb2 as admin
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2 as selection
from s2t_shared.types import (
    MAX_CANDIDATES,
    Answer,
    AnswerPiece,
    CandidateRule,
    ChosenBy,
    DecodeOptions,
    FinishReason,
    LabelCounts,
    LabelOptions,
    LabelRule,
    Message,
    Mode,
    Policy,
    PositionScores,
    Prompt,
    Proposals,
    PublishedVersion,
    Sampling,
    ScoreQuery,
    ScoreReply,
    ServiceDescription,
    Step,
    Trigger,
    Usage,
    Versions,
)

if TYPE_CHECKING:
    from s2t_shared.config import DefaultsConfig
    from s2t_shared.types import GenerateRequest

MODES = {pb.Mode.Value(f"MODE_{m.name}"): m for m in Mode}
TRIGGERS = {pb.Trigger.Value(f"TRIGGER_{t.name}"): t for t in Trigger}
PROPOSALS = {pb.Proposals.Value(f"PROPOSALS_{p.name}"): p for p in Proposals} | {0: Proposals.BASE}
CHOSEN_BY = {c: pb.ChosenBy.Name(pb.ChosenBy.Value(f"CHOSEN_BY_{c.name}")) for c in ChosenBy}
FINISH = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
NO_SELECTOR = "none"
ERROR_KIND = "s2t-error"  # trailing metadata

# Subclasses before their bases: the first match wins.
STATUS: dict[type[errors.S2TError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EvaluationSplitError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.TokenizerMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelLoadError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SelectorUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StoreError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
}

E = TypeVar("E")


def status_of(error: errors.S2TError) -> grpc.StatusCode:
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


async def abort(context: Any, error: errors.S2TError) -> None:
    """End a call with the error's status and text; its class travels along, for our own clients."""
    await context.abort(status_of(error), str(error), ((ERROR_KIND, type(error).__name__),))


def error_of(error: grpc.RpcError) -> errors.S2TError:
    """A call's failure, as the error the server raised (for clients and proposers)."""
    code, details = error.code(), error.details() or "no details"
    names = {kind.__name__: kind for kind in STATUS}
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KIND and value in names:
            return names[value](details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.SelectorUnavailableError(
            f"the service cannot be reached or is not ready ({details})"
        )
    for kind, status in STATUS.items():
        if status is code:
            return kind(details)
    return errors.S2TError(f"{code.name}: {details}")


def _known(value: int, table: dict[int, E], field: str) -> E:
    if value not in table:
        raise errors.InvalidRequestError(f"{field}={value}: unknown; known are {sorted(table)}")
    return table[value]


# -- generation -----------------------------------------------------------------------------------


def read_request(
    request: pb.StreamGenerateRequest | pb.GenerateRequest,
    defaults: DefaultsConfig,
    call_timeout_s: float | None,
) -> GenerateRequest:
    """A client's request with the deployment's defaults filled in.

    call_timeout_s: seconds left to the RPC, None for no limit. The nearer of it and the request's
    own stands.

    Raises:
        InvalidRequestError: an unknown enum value, or no prompt.
    """
    p = request.parameters
    from s2t_shared.types import GenerateRequest  # models' side: not needed by clients

    mode = _known(p.mode, MODES, "mode") if p.mode else defaults.mode
    trigger = _known(p.trigger, TRIGGERS, "trigger") if p.trigger else defaults.trigger
    when = p.WhichOneof("when")
    policy = Policy(
        mode=mode,
        trigger=trigger,
        threshold=p.threshold if when == "threshold" else 0.0,
        candidates=CandidateRule(
            p.candidates if p.HasField("candidates") else defaults.candidates, p.candidate_ratio
        ),
        proposals=_known(p.proposals, PROPOSALS, "proposals"),
    )
    timeouts = [t for t in (p.timeout_seconds, call_timeout_s or 0.0) if t > 0]
    budget = {"budget": p.budget, "threshold": None, None: defaults.budget}[when]
    sampling = Sampling(
        p.sampling.temperature if p.sampling.HasField("temperature") else 0.7,
        p.sampling.top_p if p.sampling.HasField("top_p") else 1.0,
        p.sampling.top_k,
        p.sampling.seed,
    )
    request_id = request.request_id or uuid.uuid4().hex
    selector = p.version if p.HasField("version") else None
    return GenerateRequest(
        request_id=request_id,
        prompt=read_prompt(p),
        budget=budget,
        samples=p.samples if p.HasField("samples") else 8,
        stop=tuple(p.stop),
        timeout_s=min(timeouts, default=0.0),
        return_steps=p.return_steps,
        stream_steps=isinstance(request, pb.StreamGenerateRequest) and request.stream_steps,
        labels=LabelOptions(
            store=p.labels.store if p.labels.HasField("store") else defaults.store_labels,
            task=p.labels.task,
            problem_id=p.labels.problem_id,
            split=p.labels.split or "train",
            triggers=tuple(_known(t, TRIGGERS, "labels.triggers") for t in p.labels.triggers),
            budget=p.labels.budget if p.labels.HasField("budget") else 0.1,
            rules=tuple(
                LabelRule(_known(r.trigger, TRIGGERS, "labels.rules"), r.threshold)
                for r in p.labels.rules
            ),
            durable=p.labels.durable,
            collect=p.labels.collect,
        ),
        answer_pattern=defaults.answer_pattern,
        options=DecodeOptions(
            policy=policy,
            sampling=sampling,
            max_new_tokens=p.max_new_tokens
            if p.HasField("max_new_tokens")
            else defaults.max_new_tokens,
            version="" if selector == NO_SELECTOR else selector,
            score_rollout=p.score_rollout,
            fresh_selections=p.fresh_selections,
        ),
    )


def read_prompt(p: pb.GenerationParameters) -> Prompt:
    form = p.WhichOneof("prompt")
    if form == "text":
        return Prompt(text=p.text)
    if form == "messages":
        return Prompt(messages=tuple(Message(m.role, m.content) for m in p.messages.messages))
    if form == "token_ids":
        return Prompt(token_ids=tuple(p.token_ids.ids))
    raise errors.InvalidRequestError("prompt: missing; give text, messages or token_ids")


def write_piece(request_id: str, piece: AnswerPiece) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(
        request_id=request_id,
        text=piece.text,
        steps=[write_step(step) for step in piece.steps],
        answer=write_answer(piece.answer) if piece.answer is not None else None,
    )


def write_answer(answer: Answer) -> pb.Answer:
    u, v = answer.usage, answer.versions
    return pb.Answer(
        token_ids=answer.token_ids,
        text=answer.text,
        finish_reason=FINISH[answer.finish_reason],
        usage=pb.Usage(
            prompt_tokens=u.prompt_tokens,
            completion_tokens=u.completion_tokens,
            triggers=u.triggers,
            flips=u.flips,
            llm_forwards=u.llm_forwards,
            degraded_steps=u.degraded_steps,
        ),
        versions=pb.Versions(slm=v.slm, llm=v.llm, local_selector=v.local_selector),
        steps=[write_step(step) for step in answer.steps],
        labels_stored=answer.labels_stored,
        rollout=answer.rollout,
    )


def write_step(step: Step) -> pb.Step:
    return pb.Step(
        index=step.index,
        token_id=step.token_id,
        chosen_by=CHOSEN_BY[step.chosen_by],
        triggered=step.triggered,
        signal=step.signal,
        candidate_ids=step.candidate_ids,
        scores=step.scores,
        slm_top_id=step.slm_top_id,
        llm_top_id=step.llm_top_id,
        llm_top_rank=step.llm_top_rank,
        kl=step.kl,
        entropy=step.entropy,
        degraded=step.degraded,
        text=step.text,
    )


def write_description(d: ServiceDescription) -> pb.DescribeServiceResponse:
    return pb.DescribeServiceResponse(
        slm_digest=d.slm_digest,
        tokenizer_digest=d.tokenizer_digest,
        template_digest=d.template_digest,
        llm_digest=d.llm_digest,
        proposers=d.proposers,
        max_length=d.max_length,
        live_version=d.live_version,
        canary_version=d.canary_version,
        canary_share=d.canary_share,
        calibrated_triggers=[f"TRIGGER_{t.name}" for t in d.calibrated_triggers],
        running_sequences=d.running_sequences,
        waiting_sequences=d.waiting_sequences,
        live_kv_slots=d.live_kv_slots,
    )


def write_version(v: PublishedVersion) -> admin.Version:
    return admin.Version(
        name=v.name,
        kind=v.kind,
        reads=v.reads,
        live=v.live,
        created_at=v.created_at,
        metrics=v.metrics,
        share=v.share,
    )


def write_label_counts(counts: LabelCounts) -> admin.CountLabelsResponse:
    return admin.CountLabelsResponse(
        queued=counts.queued,
        in_lake=counts.in_lake,
        dead_letters=counts.dead_letters,
        dropped=counts.dropped,
    )


def write_request(r: GenerateRequest) -> pb.GenerateRequest:
    o = r.options
    p = pb.GenerationParameters(
        mode=f"MODE_{o.policy.mode.name}",
        trigger=f"TRIGGER_{o.policy.trigger.name}",
        candidates=o.policy.candidates.k,
        candidate_ratio=o.policy.candidates.ratio,
        proposals=f"PROPOSALS_{o.policy.proposals.name}",
        sampling=pb.Sampling(
            temperature=o.sampling.temperature,
            top_p=o.sampling.top_p,
            top_k=o.sampling.top_k,
            seed=o.sampling.seed,
        ),
        samples=r.samples,
        max_new_tokens=o.max_new_tokens,
        stop=r.stop,
        timeout_seconds=r.timeout_s,
        version=NO_SELECTOR if o.version == "" else o.version,
        return_steps=r.return_steps,
        score_rollout=o.score_rollout,
        fresh_selections=o.fresh_selections,
        labels=pb.LabelOptions(
            store=r.labels.store,
            task=r.labels.task,
            problem_id=r.labels.problem_id,
            split=r.labels.split,
            triggers=[f"TRIGGER_{t.name}" for t in r.labels.triggers],
            budget=r.labels.budget,
            rules=[
                pb.LabelRule(trigger=f"TRIGGER_{x.trigger.name}", threshold=x.threshold)
                for x in r.labels.rules
            ],
            durable=r.labels.durable,
            collect=r.labels.collect,
        ),
    )
    if r.budget is not None:
        p.budget = r.budget
    else:
        p.threshold = o.policy.threshold
    if r.prompt.text is not None:
        p.text = r.prompt.text
    elif r.prompt.messages:
        p.messages.messages.extend(
            pb.Message(role=m.role, content=m.content) for m in r.prompt.messages
        )
    else:
        p.token_ids.ids.extend(r.prompt.token_ids)
    return pb.GenerateRequest(request_id=r.request_id, parameters=p)


def read_answer(a: pb.Answer) -> Answer:
    u, v = a.usage, a.versions
    finish = {code: reason for reason, code in FINISH.items()}
    return Answer(
        token_ids=tuple(a.token_ids),
        text=a.text,
        finish_reason=finish[a.finish_reason],
        usage=Usage(**{f.name: getattr(u, f.name) for f in u.DESCRIPTOR.fields}),
        versions=Versions(v.slm, v.llm, v.local_selector),
        steps=tuple(map(read_step, a.steps)),
        labels_stored=a.labels_stored,
        rollout=a.rollout,
    )


def read_step(m: pb.Step) -> Step:
    def maybe(name: str) -> Any:
        return getattr(m, name) if m.HasField(name) else None

    return Step(
        index=m.index,
        token_id=m.token_id,
        chosen_by=ChosenBy[pb.ChosenBy.Name(m.chosen_by).removeprefix("CHOSEN_BY_")],
        triggered=m.triggered,
        signal=maybe("signal"),
        candidate_ids=tuple(m.candidate_ids),
        scores=tuple(m.scores),
        slm_top_id=maybe("slm_top_id"),
        llm_top_id=maybe("llm_top_id"),
        llm_top_rank=maybe("llm_top_rank"),
        kl=maybe("kl"),
        entropy=maybe("entropy"),
        degraded=m.degraded,
        text=m.text,
    )


def read_piece(m: pb.StreamGenerateResponse) -> AnswerPiece:
    answer = read_answer(m.answer) if m.HasField("answer") else None
    return AnswerPiece(m.text, tuple(map(read_step, m.steps)), answer)


def read_description(m: pb.DescribeServiceResponse) -> ServiceDescription:
    fields = {f.name: getattr(m, f.name) for f in m.DESCRIPTOR.fields}
    triggers = tuple(TRIGGERS[t] for t in m.calibrated_triggers)
    return ServiceDescription(**{**fields, "calibrated_triggers": triggers})


def read_version(m: admin.Version) -> PublishedVersion:
    fields = {f.name: getattr(m, f.name) for f in m.DESCRIPTOR.fields}
    return PublishedVersion(**{**fields, "metrics": dict(m.metrics)})


def read_label_counts(m: admin.CountLabelsResponse) -> LabelCounts:
    return LabelCounts(m.queued, m.in_lake, m.dead_letters, m.dropped)


# -- selection ------------------------------------------------------------------------------------


def write_query(query: ScoreQuery) -> selection.ScoreRequest:
    return selection.ScoreRequest(
        token_ids=query.token_ids,
        positions=query.positions,
        candidate_ids=[i for group in query.candidate_ids for i in group],
        candidate_counts=[len(group) for group in query.candidate_ids],
        excluded_ids=query.excluded_ids,
        vocab_size=query.vocab_size,
        sequence_id=query.sequence_id,
    )


def read_query(request: selection.ScoreRequest) -> ScoreQuery:
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


def write_reply(reply: ScoreReply) -> selection.ScoreResponse:
    return selection.ScoreResponse(
        log_probs=[x for p in reply.positions for x in p.log_probs],
        top_ids=[p.top_id for p in reply.positions],
        llm_digest=reply.llm_digest,
    )


def read_reply(query: ScoreQuery, response: selection.ScoreResponse) -> ScoreReply:
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
