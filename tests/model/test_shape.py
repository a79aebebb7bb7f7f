"""A model's size from its config.json equals what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.errors import ModelLoadError
from s2t_shared.model.device_memory import weight_bytes
from s2t_shared.model.kv_pool import BatchLayout
from s2t_shared.model.loading import CPU, DTYPES
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.shape import model_shape


@pytest.mark.parametrize(("role", "folder"), [("slm", SLM_DIR), ("llm", LLM_DIR)])
def test_bundled_shape_is_that_of_the_loaded_model(role, folder: Path) -> None:
    """A shape that forgot a layer, or counted a tied head twice, would plan too little or much."""
    shape = model_shape("bundled", role, "float32")
    runtime = ModelRuntime.load("bundled", role=role)
    assert shape.parameters == sum(p.numel() for p in runtime.model.parameters())
    assert shape.weight_bytes(4, 4) == weight_bytes(folder, DTYPES["float32"])
    assert shape.kv_bytes_per_token == runtime.pool.bytes_per_token
    assert shape.max_length == runtime.max_length


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494, 12_288),
        ("1.5B", 1.544, 28_672),
        ("7B", 7.616, 57_344),
        ("Qwen/Qwen2.5-32B-Instruct", 32.764, 262_144),
    ],
)
def test_known_names_need_no_network(name: str, billions: float, kv_bytes: int) -> None:
    """As the models' cards say. A hub id that is looked up would hang where there is no network."""
    shape = model_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert shape.kv_bytes_per_token == kv_bytes


def test_kv_slots_are_those_of_the_pool() -> None:
    """The plan's contexts are what the runtime's pool really gives out."""
    runtime = ModelRuntime.load("bundled", kv_bytes=1 << 20)
    shape = model_shape("bundled", "slm", "float32")
    planned = shape.kv_slots(1 << 20, 100, "cpu")
    given = 0
    while runtime.pool.allocate((), 100) is not None:
        given += 1
    assert given == planned > 3
    assert runtime.pool.layout == BatchLayout.for_device(CPU)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no config.json"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError):
        model_shape(str(tmp_path))
