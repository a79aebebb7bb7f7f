"""Writes a version's model card: README.md with Hugging Face metadata.

Every number in it comes from the manifest. Format: https://huggingface.co/docs/hub/model-cards
(`model-index` carries the measured results).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from s2t_shared.types import Reading, Scoring, SelectorKind
from s2t_shared.versions.manifest import BINS, Manifest

METRICS = {  # name in the manifest -> text of the card
    "agree_at_1": "Agree@1 (the selector selects what the LLM selects)",
    "slm_agree_at_1": "Agree@1 of the SLM's own first choice, for comparison",
    "spearman": "Spearman's rho of its scores against the LLM's log-probabilities",
    "hit_at_1": "Hit@1 of the labels (the LLM's top-1 is the SLM's top-1)",
    "hit_at_2": "Hit@2",
    "hit_at_4": "Hit@4",
    "hit_at_8": "Hit@8",
    "lm_kl": "LM-KL (adapted against base, nats per token)",
    "loss": "selection loss (nats)",
}
SCORES = {
    SelectorKind.RESERVED: "{reserved}, read behind each candidate",
    SelectorKind.PREFIX: "the adapted model's log-probability of each candidate at the divergence "
    "point, renormalised on the candidates",
    SelectorKind.JOINT: "both the adapted model's renormalised log-probability of each candidate "
    "and {reserved}, read behind it",
}
RESERVED = {
    Scoring.EXPECTED: "the expected value of {bins} reserved output rows",
    Scoring.BINARY: "the logit of the second of {bins} reserved output rows",
}
READS = {
    Reading.BASE: "only on the tokens being scored, over the base model's own KV cache",
    Reading.ADAPTED: "on the whole context, with a KV cache of its own",
}


def model_card(manifest: Manifest) -> str:
    """The card's text, YAML header included."""
    return f"{card_header(manifest, 'adapter', _metadata(manifest))}\n{_text(manifest)}"


def card_header(manifest: Manifest, relation: str, metadata: dict[str, Any]) -> str:
    """YAML header of a card. relation: to the base model, "adapter" or "merge".

    The base model is named only where the Hub knows it. There is no license: the licenses of the
    base model and of the data are not known here.
    """
    base = _hub_id(manifest.base_model)
    content = dict(metadata)
    if base is not None:
        content = {"base_model": base, "base_model_relation": relation, **content}
    header = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n"


def _hub_id(base_model: str) -> str | None:
    """`base_model` where it is a name on the Hub. None for a folder, whose path is private."""
    is_path = base_model.count("/") > 1 or base_model.startswith((".", "/", "~"))
    if not base_model or is_path or Path(base_model).exists():
        return None
    return base_model


def _metadata(m: Manifest) -> dict[str, Any]:
    tags = ["select-to-think", "local-selector", "lora", "safetensors"]
    return {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*tags, f"kind-{m.kind.value}", f"reads-{m.reads.value}"],
        "model-index": [_measured(m)] if m.metrics else [],
    }


def _measured(m: Manifest) -> dict[str, Any]:
    metrics = []
    for name, value in m.metrics.items():
        if name != "n":
            metrics.append({"type": name, "value": value, "name": METRICS.get(name, name)})
    result = {
        "task": {"type": "text-generation", "name": "selection at divergence points"},
        "dataset": {
            "type": "selection-labels",
            "name": f"held-out selection labels, snapshot {m.snapshot}",
            "split": "held-out",
        },
        "metrics": metrics,
    }
    return {"name": m.version, "results": [result]}


def _score(m: Manifest) -> str:
    reserved = RESERVED[m.scoring].format(bins=m.bins)
    if m.standardise:
        reserved += ", standardised over the candidates"
    return SCORES[m.kind].format(reserved=reserved)


def _what_it_is(m: Manifest) -> str:
    if m.always_on:
        return "- Always on: the adapter acts on every token; it was trained by plain distillation."
    return (
        f"- Kind `{m.kind.value}`: a candidate's score is {_score(m)}.\n"
        f"- Reads `{m.reads.value}`: the adapter acts {READS[m.reads]}."
    )


def _how_it_serves(m: Manifest) -> str:
    if m.always_on:
        return "The adapter is on for every\ntoken, and nothing triggers."
    return "The proposals stay the base model's own; the\nadapter only scores."


def _use_with_peft(m: Manifest) -> str:
    text = (
        "With PEFT: `PeftModel.from_pretrained(base, folder)`. It then acts on every token, "
        "as with `proposals: adapted`."
    )
    if m.kind is SelectorKind.PREFIX:
        return text
    return (
        f"{text}\n`PeftModel` loads the LoRA matrices only: the {m.bins} reserved rows' deltas in "
        f"`{BINS}`, without which\nthis kind cannot score, are added by the service or by "
        "`s2t versions export --merged`."
    )


def _text(m: Manifest) -> str:
    base = _hub_id(m.base_model) or Path(m.base_model).name
    training = [(name, _number(value)) for name, value in m.training.items()]
    return f"""# {m.version}

A local selector for [Select-to-Think](https://arxiv.org/abs/2604.26940): a LoRA adapter with which
a small language model (SLM) chooses among its own candidate tokens, at the steps where it is
unsure, as a large one (LLM) would. It was distilled from the LLM's selections; at run time no LLM
is needed.

- Base model (SLM): `{base}`, digest `{m.slm_digest}`; tokenizer digest `{m.tokenizer_digest}`
- LLM it imitates: digest `{m.llm_digest}`
{_what_it_is(m)}

## Use

With the service that published it: `s2t versions promote {m.version}`, then ask in mode
`s2t_local`; a request may also name the version. {_how_it_serves(m)}

{_use_with_peft(m)}

## Measured on held-out labels

{_results(m)}

## Training

{_table(("setting", "value"), training)}

## Data

Selection labels of snapshot `{m.snapshot}`: {_count(m, "training_labels")} to train on and
{_count(m, "held_out_labels")} held out (whole problems, never seen in training).
A label is a context, the SLM's candidates there and the LLM's log-probability of each. The labels
hold text of the deployment that collected them and are not part of this folder.

## Limits

- It fits this base model and tokenizer only; the service refuses it for any other digest.
- It was trained on contexts like those of its labels: on other tasks, languages or triggers nothing
  was measured.
- It selects among the SLM's candidates: where the right token is not among them (see Hit@K) it
  cannot help.
- It inherits what is wrong with both models.
"""


def _results(m: Manifest) -> str:
    if not m.metrics:
        return "Nothing was measured."
    figures = dict(m.metrics)
    n = figures.pop("n", None)
    rows = [(METRICS.get(name, name), _number(value)) for name, value in figures.items()]
    table = _table(("metric", "value"), rows)
    return f"{n:,.0f} labels.\n\n{table}" if n else table


def _table(columns: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in [columns, ("---", "---"), *rows])


def _count(m: Manifest, name: str) -> str:
    value = m.training.get(name)
    return f"{value:,}" if isinstance(value, int) else "an unknown number"


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
