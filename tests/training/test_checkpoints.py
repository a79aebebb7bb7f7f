"""Checkpoints on disk: complete or absent."""

from __future__ import annotations

from pathlib import Path

import torch

from s2t_shared.training.checkpoints import load_checkpoint, save_checkpoint


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    """A damaged newest one is passed over, a half-written one never counts, old ones go."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((4,), float(step))}, {"epoch": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = load_checkpoint(tmp_path)
    assert (
        found is not None
        and found.step == 3
        and found.state == {"epoch": 3}
        and found.tensors["w"].sum() == 12
    )
    (tmp_path / "step-00000003" / "tensors.safetensors").write_bytes(b"torn")
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    (tmp_path / ".step-00000003.of-a-writer-that-died.tmp").mkdir()
    save_checkpoint(tmp_path, 3, {"w": torch.zeros(1)}, {})
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and not list(tmp_path.glob(".*"))
    (tmp_path / "step-00000003" / "state.json").unlink()
    (tmp_path / "step-00000002" / "state.json").write_text("[]", encoding="utf-8")
    assert load_checkpoint(tmp_path) is None
