"""What SLM and LLM must agree on: one tokenizer, and the reserved ids R."""

from __future__ import annotations

from s2t_shared.errors import TokenizerMismatchError
from s2t_shared.model.tokenizer import PROBES, Tokenizer

RESERVED_COUNT = 16
SHOWN_DIFFERENCES = 3


def reserved_ids(tokenizer: Tokenizer, vocab_rows: int) -> tuple[int, ...]:
    """The reserved ids R, ascending: bins 0..15 of the reserved score (S2T paper).

    The first of these that the model has: the first 16 of Gemma's `<unused*>`; the last 16 of
    Llama's `<|reserved_special_token_*>`; the last 16 rows above the tokenizer. A model without
    spare rows gets 16 virtual ids, numbered from `vocab_rows` on.
    """
    unused = _ids_starting_with(tokenizer, "<unused")
    if len(unused) >= RESERVED_COUNT:
        return unused[:RESERVED_COUNT]
    named = _ids_starting_with(tokenizer, "<|reserved_special_token_")
    if len(named) >= RESERVED_COUNT:
        return named[-RESERVED_COUNT:]
    if vocab_rows - tokenizer.size >= RESERVED_COUNT:
        return tuple(range(vocab_rows - RESERVED_COUNT, vocab_rows))
    return tuple(range(vocab_rows, vocab_rows + RESERVED_COUNT))


def _ids_starting_with(tokenizer: Tokenizer, prefix: str) -> tuple[int, ...]:
    ids = [i for token, i in tokenizer.vocabulary.items() if token.startswith(prefix)]
    return tuple(sorted(ids))


def check_same_tokenizer(slm: Tokenizer, llm: Tokenizer) -> None:
    """Check that both models use one tokenizer. Their numbers of rows may differ.

    Raises:
        TokenizerMismatchError: the vocabularies, or the tokens of a probe text, differ.
    """
    if slm.digest == llm.digest:
        return
    difference = _vocabulary_difference(slm.vocabulary, llm.vocabulary)
    if difference is None:
        difference = _probe_difference(slm, llm)
    raise TokenizerMismatchError(
        f"SLM and LLM must share a tokenizer, but (SLM / LLM) {difference}; "
        "choose two models of one family"
    )


def _vocabulary_difference(slm: dict[str, int], llm: dict[str, int]) -> str | None:
    """Which entries differ; None: none."""
    tokens = slm.keys() | llm.keys()
    differing = sorted(token for token in tokens if slm.get(token) != llm.get(token))
    if not differing:
        return None
    shown = []
    for token in differing[:SHOWN_DIFFERENCES]:
        slm_id = slm.get(token, "absent")
        llm_id = llm.get(token, "absent")
        shown.append(f"{token!r} is {slm_id} / {llm_id}")
    return (
        f"{len(differing)} entries differ ({', '.join(shown)}; "
        f"vocabulary sizes {len(slm)} / {len(llm)})"
    )


def _probe_difference(slm: Tokenizer, llm: Tokenizer) -> str:
    """Which probe text becomes different tokens."""
    for probe in PROBES:
        slm_ids = slm.encode_text(probe)
        llm_ids = llm.encode_text(probe)
        if slm_ids != llm_ids:
            return f"the vocabularies agree but {probe!r} becomes {slm_ids} / {llm_ids}"
    raise AssertionError("equal vocabularies and probes, but different digests")
