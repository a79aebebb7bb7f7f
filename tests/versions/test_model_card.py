"""Model cards, as Hugging Face reads them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from s2t_shared.model.local_selector import SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.registry import Registry
from tests.helpers.versions import BINS, publish


def test_model_card_is_hugging_faces(registry: Registry, runtime: ModelRuntime) -> None:
    version = publish(registry, runtime)
    card = ModelCard.load(registry.folder(version) / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("acme/tiny-slm", "adapter")
    assert card.data.library_name == "peft"
    assert {"lora", "kind-joint"} <= set(card.data.tags)
    assert card.data.license is None
    assert card.data.datasets is None
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured == {"agree_at_1": 0.812, "slm_agree_at_1": 0.7, "spearman": 0.5, "lm_kl": 0.01}
    assert card.data.model_name == version
    for text in (
        "1,201 labels",
        "snap1",
        "0.0005",
        "9,000",
        "held out",
        "## Limits",
        BINS,
        runtime.digest,
    ):
        assert text in card.text, text


def test_model_card_shows_no_folder_of_ours(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path]
) -> None:
    version = publish(
        registry,
        runtime,
        SelectorKind.PREFIX,
        base_model=str(models["slm"]),
        metrics={},
        training={},
    )
    card = ModelCard.load(registry.folder(version) / "README.md")
    assert card.data.base_model is None
    assert str(models["slm"].parent) not in card.content
    assert BINS not in card.text
    assert "Nothing was measured" in card.text
