"""Requests, answers, Steps and descriptions <-> `generation.proto`.

`write_request` sets every field. `write_settings` sets the fields that a caller named and leaves
the others unset; `read_request` fills those with the deployment's defaults.
"""

from __future__ import annotations

import uuid
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from s2t_shared.errors import InvalidRequestError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.requests import DEFAULT_SAMPLES, PromptLike, as_prompt, by_name, parse_mode
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    CandidateRule,
    ChosenBy,
    DecodeOptions,
    FinishReason,
    GenerateRequest,
    LabelOptions,
    LabelRule,
    Message,
    Mode,
    OnLLMFailure,
    Policy,
    Prompt,
    Proposals,
    Sampling,
    ServiceDescription,
    Step,
    Trigger,
    Usage,
    Versions,
)

if TYPE_CHECKING:
    from s2t_shared.config import DefaultsConfig

NO_VERSION = "none"  # on the wire; "" inside
DEFAULT_SPLIT = LabelOptions().split
E = TypeVar("E", bound=Enum)


def _by_number(kind: type[E], values: Any, prefix: str) -> dict[int, E]:
    """The enum's members by their number in the proto."""
    return {values.Value(f"{prefix}_{member.name}"): member for member in kind}


MODES = _by_number(Mode, pb.Mode, "MODE")
TRIGGERS = _by_number(Trigger, pb.Trigger, "TRIGGER")
PROPOSALS = _by_number(Proposals, pb.Proposals, "PROPOSALS")
ON_LLM_FAILURE = _by_number(OnLLMFailure, pb.OnLlmFailure, "ON_LLM_FAILURE")
CHOSEN_BY = _by_number(ChosenBy, pb.ChosenBy, "CHOSEN_BY")
FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def _number(table: dict[int, E], member: E) -> Any:
    return next(number for number, known in table.items() if known is member)


def _member(table: dict[int, E], number: int, field: str) -> E:
    if number not in table:
        raise InvalidRequestError(
            f"{field}={number}: unknown; known are {sorted(table)}", field=field
        )
    return table[number]


# -- requests -------------------------------------------------------------------------------------


def write_request(request: GenerateRequest) -> pb.GenerationParameters:
    """Every field of the request is set, so that no default of the deployment applies."""
    options = request.options
    policy = options.policy
    message = pb.GenerationParameters(
        mode=_number(MODES, policy.mode),
        trigger=_number(TRIGGERS, policy.trigger),
        candidates=policy.candidates.k,
        candidate_ratio=policy.candidates.ratio,
        proposals=_number(PROPOSALS, policy.proposals),
        sampling=_write_sampling(options.sampling),
        samples=request.samples,
        max_new_tokens=options.max_new_tokens,
        stop=request.stop,
        timeout_seconds=request.timeout_s,
        return_steps=request.return_steps,
        score_rollout=options.score_rollout,
        labels=_write_label_options(request.labels),
        fresh_selections=options.fresh_selections,
        on_llm_failure=_number(ON_LLM_FAILURE, options.on_llm_failure),
    )
    if request.budget is not None:
        message.budget = request.budget
    else:
        message.threshold = policy.threshold
    if options.version is not None:
        message.version = options.version or NO_VERSION
    _write_prompt(message, request.prompt)
    return message


def write_settings(prompt: PromptLike, **settings: Any) -> pb.GenerationParameters:
    """Settings by keyword: mode, trigger and on_llm_failure by name, and any field of
    `GenerationParameters`.

    `sampling` and `labels` are a `Sampling` and a `LabelOptions`, or dictionaries of some of their
    fields. Fields that are not given stay unset, so that the deployment's defaults apply.

    Raises:
        InvalidRequestError: an unknown name or field, or budget and threshold together.
    """
    if settings.get("budget") is not None and settings.get("threshold") is not None:
        raise InvalidRequestError("give a threshold or a budget, not both", field="budget")
    mode = settings.pop("mode", None)
    if mode:
        kind, samples = parse_mode(mode.lower())
        settings["mode"] = _number(MODES, kind)
        if "@" in mode:
            settings["samples"] = samples
    trigger = settings.pop("trigger", None)
    if trigger:
        kind_of_trigger = by_name(Trigger, trigger.lower(), "trigger")
        settings["trigger"] = _number(TRIGGERS, kind_of_trigger)
    on_llm_failure = settings.pop("on_llm_failure", None)
    if on_llm_failure:
        choice = by_name(OnLLMFailure, on_llm_failure.lower(), "on_llm_failure")
        settings["on_llm_failure"] = _number(ON_LLM_FAILURE, choice)
    if isinstance(settings.get("sampling"), Sampling):
        settings["sampling"] = _write_sampling(settings["sampling"])
    if isinstance(settings.get("labels"), LabelOptions):
        settings["labels"] = _write_label_options(settings["labels"])
    try:
        message = pb.GenerationParameters(**settings)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"unknown setting, or a wrong value: {error}") from error
    try:
        _write_prompt(message, as_prompt(prompt))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"prompt: {error}", field="prompt") from error
    return message


def read_request(
    request: pb.GenerateRequest | pb.StreamGenerateRequest,
    defaults: DefaultsConfig,
    call_timeout_s: float | None,
) -> GenerateRequest:
    """A client's request with the deployment's defaults filled in.

    call_timeout_s: seconds left to the RPC, None for no limit. The smaller of it and the request's
    own timeout applies.

    Raises:
        InvalidRequestError: an unknown enum value, or no prompt.
    """
    message = request.parameters
    timeouts = [t for t in (message.timeout_seconds, call_timeout_s or 0.0) if t > 0]
    when = message.WhichOneof("when")
    budget: float | None = defaults.budget
    if when is not None:
        budget = message.budget if when == "budget" else None
    stream_steps = isinstance(request, pb.StreamGenerateRequest) and request.stream_steps
    return GenerateRequest(
        request_id=request.request_id or uuid.uuid4().hex,
        prompt=_read_prompt(message),
        options=_read_options(message, defaults),
        budget=budget,
        samples=message.samples if message.HasField("samples") else DEFAULT_SAMPLES,
        stop=tuple(message.stop),
        timeout_s=min(timeouts, default=0.0),
        return_steps=message.return_steps,
        stream_steps=stream_steps,
        labels=_read_label_options(message.labels, defaults),
        answer_pattern=defaults.answer_pattern,
    )


def _read_options(message: pb.GenerationParameters, defaults: DefaultsConfig) -> DecodeOptions:
    max_new_tokens = defaults.max_new_tokens
    if message.HasField("max_new_tokens"):
        max_new_tokens = message.max_new_tokens
    version = message.version if message.HasField("version") else None
    on_llm_failure = defaults.on_llm_failure
    if message.on_llm_failure:
        on_llm_failure = _member(ON_LLM_FAILURE, message.on_llm_failure, "on_llm_failure")
    return DecodeOptions(
        policy=_read_policy(message, defaults),
        sampling=_read_sampling(message.sampling),
        max_new_tokens=max_new_tokens,
        version="" if version == NO_VERSION else version,
        score_rollout=message.score_rollout,
        fresh_selections=message.fresh_selections,
        on_llm_failure=on_llm_failure,
    )


def _read_policy(message: pb.GenerationParameters, defaults: DefaultsConfig) -> Policy:
    candidates = message.candidates if message.HasField("candidates") else defaults.candidates
    mode = defaults.mode
    if message.mode:
        mode = _member(MODES, message.mode, "mode")
    trigger = defaults.trigger
    if message.trigger:
        trigger = _member(TRIGGERS, message.trigger, "trigger")
    proposals = Proposals.BASE
    if message.proposals:
        proposals = _member(PROPOSALS, message.proposals, "proposals")
    return Policy(
        mode=mode,
        trigger=trigger,
        threshold=message.threshold if message.WhichOneof("when") == "threshold" else 0.0,
        candidates=CandidateRule(candidates, message.candidate_ratio),
        proposals=proposals,
    )


def _write_sampling(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
    )


def _read_sampling(message: pb.Sampling) -> Sampling:
    default = Sampling()
    return Sampling(
        message.temperature if message.HasField("temperature") else default.temperature,
        message.top_p if message.HasField("top_p") else default.top_p,
        message.top_k,
        message.seed,
    )


def _write_label_options(options: LabelOptions) -> pb.LabelOptions:
    rules = []
    for rule in options.rules:
        trigger = _number(TRIGGERS, rule.trigger)
        rules.append(pb.LabelRule(trigger=trigger, threshold=rule.threshold))
    return pb.LabelOptions(
        store=options.store,
        task=options.task,
        problem_id=options.problem_id,
        group=options.group,
        split=options.split,
        triggers=[_number(TRIGGERS, trigger) for trigger in options.triggers],
        budget=options.budget,
        rules=rules,
        durable=options.durable,
        collect=options.collect,
    )


def _read_label_options(message: pb.LabelOptions, defaults: DefaultsConfig) -> LabelOptions:
    rules = []
    for rule in message.rules:
        trigger = _member(TRIGGERS, rule.trigger, "labels.rules")
        rules.append(LabelRule(trigger, rule.threshold))
    return LabelOptions(
        store=message.store if message.HasField("store") else defaults.store_labels,
        task=message.task,
        problem_id=message.problem_id,
        group=message.group,
        split=message.split or DEFAULT_SPLIT,
        triggers=tuple(_member(TRIGGERS, t, "labels.triggers") for t in message.triggers),
        budget=message.budget if message.HasField("budget") else LabelOptions().budget,
        rules=tuple(rules),
        durable=message.durable,
        collect=message.collect,
    )


def _write_prompt(message: pb.GenerationParameters, prompt: Prompt) -> None:
    if prompt.text is not None:
        message.text = prompt.text
    elif prompt.messages:
        for m in prompt.messages:
            message.messages.messages.append(pb.Message(role=m.role, content=m.content))
    else:
        message.token_ids.ids.extend(prompt.token_ids)


def _read_prompt(message: pb.GenerationParameters) -> Prompt:
    form = message.WhichOneof("prompt")
    if form == "text":
        return Prompt(text=message.text)
    if form == "messages":
        messages = [Message(m.role, m.content) for m in message.messages.messages]
        return Prompt(messages=tuple(messages))
    if form == "token_ids":
        return Prompt(token_ids=tuple(message.token_ids.ids))
    raise InvalidRequestError("prompt: missing; give text, messages or token_ids", field="prompt")


# -- answers --------------------------------------------------------------------------------------


def write_answer(answer: Answer) -> pb.Answer:
    usage = answer.usage
    versions = answer.versions
    return pb.Answer(
        token_ids=answer.token_ids,
        text=answer.text,
        finish_reason=_number(FINISH_REASONS, answer.finish_reason),
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            triggers=usage.triggers,
            flips=usage.flips,
            llm_forwards=usage.llm_forwards,
            degraded_steps=usage.degraded_steps,
        ),
        versions=pb.Versions(
            slm=versions.slm, llm=versions.llm, local_selector=versions.local_selector
        ),
        steps=[write_step(step) for step in answer.steps],
        labels_stored=answer.labels_stored,
        rollout=answer.rollout,
    )


def read_answer(message: pb.Answer) -> Answer:
    usage = message.usage
    versions = message.versions
    return Answer(
        token_ids=tuple(message.token_ids),
        text=message.text,
        finish_reason=FINISH_REASONS[message.finish_reason],
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            triggers=usage.triggers,
            flips=usage.flips,
            llm_forwards=usage.llm_forwards,
            degraded_steps=usage.degraded_steps,
        ),
        versions=Versions(versions.slm, versions.llm, versions.local_selector),
        steps=tuple(read_step(step) for step in message.steps),
        labels_stored=message.labels_stored,
        rollout=message.rollout,
    )


def write_step(step: Step) -> pb.Step:
    """A Step without `support` and `llm`; the figures made of them are sent."""
    return pb.Step(
        index=step.index,
        token_id=step.token_id,
        chosen_by=_number(CHOSEN_BY, step.chosen_by),
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
        llm_digest=step.llm_digest,
    )


def read_step(message: pb.Step) -> Step:
    def known(field: str) -> Any:
        return getattr(message, field) if message.HasField(field) else None

    return Step(
        index=message.index,
        token_id=message.token_id,
        chosen_by=CHOSEN_BY[message.chosen_by],
        triggered=message.triggered,
        signal=known("signal"),
        candidate_ids=tuple(message.candidate_ids),
        scores=tuple(message.scores),
        slm_top_id=known("slm_top_id"),
        llm_top_id=known("llm_top_id"),
        llm_top_rank=known("llm_top_rank"),
        entropy=known("entropy"),
        kl=known("kl"),
        degraded=message.degraded,
        text=message.text,
        llm_digest=message.llm_digest,
    )


def write_piece(request_id: str, piece: AnswerPiece) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(
        request_id=request_id,
        text=piece.text,
        answer=write_answer(piece.answer) if piece.answer is not None else None,
        steps=[write_step(step) for step in piece.steps],
    )


def read_piece(message: pb.StreamGenerateResponse) -> AnswerPiece:
    return AnswerPiece(
        text=message.text,
        steps=tuple(read_step(step) for step in message.steps),
        answer=read_answer(message.answer) if message.HasField("answer") else None,
    )


# -- what a service runs --------------------------------------------------------------------------


def write_description(description: ServiceDescription) -> pb.DescribeServiceResponse:
    return pb.DescribeServiceResponse(
        slm_digest=description.slm_digest,
        tokenizer_digest=description.tokenizer_digest,
        template_digest=description.template_digest,
        llm_digest=description.llm_digest,
        llm_reachable=description.llm_reachable,
        max_length=description.max_length,
        live_version=description.live_version,
        canary_version=description.canary_version,
        canary_share=description.canary_share,
        calibrated_triggers=[_number(TRIGGERS, t) for t in description.calibrated_triggers],
        proposers=description.proposers,
        running_sequences=description.running_sequences,
        waiting_sequences=description.waiting_sequences,
        live_kv_slots=description.live_kv_slots,
    )


def read_description(message: pb.DescribeServiceResponse) -> ServiceDescription:
    return ServiceDescription(
        slm_digest=message.slm_digest,
        tokenizer_digest=message.tokenizer_digest,
        template_digest=message.template_digest,
        llm_digest=message.llm_digest,
        llm_reachable=message.llm_reachable,
        max_length=message.max_length,
        live_version=message.live_version,
        canary_version=message.canary_version,
        canary_share=message.canary_share,
        calibrated_triggers=tuple(TRIGGERS[t] for t in message.calibrated_triggers),
        proposers=message.proposers,
        running_sequences=message.running_sequences,
        waiting_sequences=message.waiting_sequences,
        live_kv_slots=message.live_kv_slots,
    )
