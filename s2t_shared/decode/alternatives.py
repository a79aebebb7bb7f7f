"""What a step's token could have been, as text with both models' log-probabilities: for people who
look at an answer, and for clients that want log-probabilities."""

from __future__ import annotations

from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.types import Alternative, ChosenBy, Step


class TokenTexts:
    """The text of single tokens, as each has it inside a text. Keeps what it was asked."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            # Behind itself: many tokenizers drop the space in front of a text's first token.
            alone = self._tokenizer.decode((token_id,))
            twice = self._tokenizer.decode((token_id, token_id))
            text = self._texts[token_id] = twice[len(alone) :]
        return text


def with_alternatives(step: Step, count: int, texts: TokenTexts) -> Step:
    """The Step with what it chose and could have chosen: all candidates, and at least the SLM's
    first `count` tokens. A Step without support stays as it is."""
    support = step.support
    if support is None:
        return step
    llm = step.llm.log_probs if step.llm is not None else ()
    local = step.scores if step.chosen_by is ChosenBy.LOCAL else ()

    def alternative(place: int) -> Alternative:
        return Alternative(
            token_id=support.ids[place],
            text=texts[support.ids[place]],
            slm=support.log_probs[place],
            llm=llm[place] if place < len(llm) else None,
            local=local[place] if place < len(local) else None,
        )

    if step.token_id in support.ids:
        chosen = alternative(support.ids.index(step.token_id))
    else:
        chosen = Alternative(token_id=step.token_id, text=texts[step.token_id])
    shown = min(len(support.ids), max(count, len(step.candidate_ids)))
    return step.changed(chosen=chosen, alternatives=tuple(alternative(i) for i in range(shown)))
