"""Model folders: where a model lies, and what identifies it. Nothing is loaded, so no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from s2t_shared.bundled import BUNDLED, LLM_DIR, SLM_DIR
from s2t_shared.errors import ModelLoadError

Role = Literal["slm", "llm"]
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # and what is small beside them
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]
DIGEST_WHOLE_FILE_BYTES = 64 << 20
DIGEST_END_BYTES = 8 << 20


def resolve_model(model: str, role: Role = "slm", weights: bool = True) -> Path:
    """The local folder of a model.

    model: a folder, a hub id, or "bundled" (the bundled pair's model of this role). weights: of a
    hub id, download them too; without them the folder does for a tokenizer.

    Raises:
        ModelLoadError: neither a folder with a config.json nor an id the hub answers for.
    """
    if model == BUNDLED:
        return SLM_DIR if role == "slm" else LLM_DIR
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"model folder {model!r} has no config.json; give a Hugging Face model folder"
            )
        return folder
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise ModelLoadError(f"model folder {model!r} does not exist; check the path")
    return _download(model, HUB_FILES if weights else TOKENIZER_FILES)


def _download(model: str, files: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=files))
    except Exception as error:  # the border to the hub client, whose error types vary by transport
        raise ModelLoadError(
            f"model {model!r} is neither a folder here nor could it be downloaded from the hub "
            f"({type(error).__name__}); check the name, or download it and give the folder"
        ) from error


def model_digest(folder: Path) -> str:
    """16 hex digits that identify a model's config and weights.

    Small files count whole; large ones by size, first and last bytes.
    """
    digest = hashlib.sha256()
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= DIGEST_WHOLE_FILE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(DIGEST_END_BYTES))
                stream.seek(-DIGEST_END_BYTES, 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]
