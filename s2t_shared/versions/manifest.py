"""What a published version says of itself, and whether its files bear it out. Knows one folder; not
which is live.

The checks here need no model: names, hashes, shapes, finite values. That a version fits an SLM is
checked when it is loaded (`registry.load_version`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import sha256_file
from s2t_shared.model.local_selector import Reading, Scoring, SelectorKind
from s2t_shared.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from s2t_shared.policy import Calibration

MANIFEST = "manifest.json"
CARD = "README.md"
BINS = "bins.safetensors"
SCHEMA_VERSION = 2  # 2 adds `job`, `scoring` and `standardise`; 1 is read as their defaults
DATA_SUFFIXES = {
    ".safetensors",
    ".json",
    ".jsonl",
    ".md",
    ".svg",
    ".png",
    ".csv",
    ".txt",
}  # nothing that unpickles


class Manifest(BaseModel):
    """What a version is, what it fits, and what was measured of it.

    `job`: id of the training job that made it, "" for none. `scoring`: how reserved logits become a
    score. `files`: SHA-256 of every other file of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    version: str
    kind: SelectorKind
    reads: Reading
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    fusion: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    scoring: Scoring = Scoring.EXPECTED
    standardise: bool = False
    base_model: str
    slm_digest: str
    llm_digest: str
    tokenizer_digest: str
    reserved_ids: tuple[int, ...]
    bins: int
    thresholds: dict[str, dict[str, float]]
    metrics: dict[str, float]
    snapshot: str
    training: dict[str, float | int | str]
    job: str = ""
    created_at: float
    files: dict[str, str]

    @property
    def calibration(self) -> Calibration:
        """Thresholds per trigger and budget. Raises VersionError: not a calibration."""
        try:
            return Calibration.from_json(json.dumps(self.thresholds))
        except ValueError as error:
            raise VersionError(
                f"version {self.version!r}: thresholds are broken ({error})"
            ) from error


def read_manifest(folder: Path) -> Manifest:
    """Raises VersionError: missing, not JSON, or not of a schema this program reads."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = (
            content["schema_version"]
            if isinstance(content, dict) and "schema_version" in content
            else 1
        )
        if not 1 <= schema <= SCHEMA_VERSION:
            raise VersionError(
                f"version {folder.name!r} has schema {schema}, this program reads 1 to "
                f"{SCHEMA_VERSION}; train it again, or read it with the program that made it"
            )
        return Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise VersionNotFoundError(
            f"{folder.name!r} has no {MANIFEST}: not a published version"
        ) from error
    except (OSError, ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        reason = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            if isinstance(error, ValidationError)
            else str(error).splitlines()[0]
        )
        raise VersionError(
            f"version {folder.name!r}: {MANIFEST} is broken ({reason}); publish it again"
        ) from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises VersionError: a file is missing, leads elsewhere, is of a kind that is not read, or
    differs from its hash in the manifest."""
    where = f"version {folder.name!r}"
    needed = {
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        *({BINS} if manifest.kind is not SelectorKind.PREFIX else ()),
    }
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise VersionError(
                f"{where}: file {name!r} is missing from its folder (it names a place elsewhere, which "
                "is never read); publish it again"
            )
        if path.suffix not in DATA_SUFFIXES:
            raise VersionError(
                f"{where}: {name} is not a safetensors or data file, and nothing else is ever read; "
                "save the weights as safetensors and publish it again"
            )
        if not path.is_file():
            raise VersionError(f"{where}: file {name!r} is missing; publish it again")
        try:
            found = sha256_file(path)
        except OSError as error:
            raise VersionError(
                f"{where}: {name} cannot be read ({error.strerror}); check the registry's storage"
            ) from error
        if found != expected:
            raise VersionError(
                f"{where}: {name} does not match its hash in the manifest; it is damaged or was "
                "changed: publish it again"
            )
    if missing := sorted(needed - set(manifest.files)):
        raise VersionError(
            f"{where}: {missing[0]} is missing, which a version of kind {manifest.kind.value!r} needs; "
            "publish it again"
        )


def verify_weights(folder: Path, manifest: Manifest) -> None:
    """What of the weights can be checked without the model: rank, pairs, shapes, finite values.

    Raises:
        VersionError: one of them is wrong.
    """
    where = f"version {folder.name!r}"
    try:
        rank = int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
        layers: dict[str, dict[str, int]] = {}
        for name, tensor in _tensors(folder / ADAPTER_WEIGHTS):
            path, _, side = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            axis = {"lora_A": 0, "lora_B": 1}.get(side)
            if axis is None or tensor.dim() != 2:
                raise VersionError(
                    f"{where}: {ADAPTER_WEIGHTS} holds {name!r}, which is not a LoRA matrix"
                )
            if tensor.shape[axis] != rank:
                raise VersionError(
                    f"{where}: {name} has shape {tuple(tensor.shape)}, which does not fit rank {rank} "
                    f"of {ADAPTER_CONFIG}"
                )
            if not torch.isfinite(tensor).all():
                raise VersionError(f"{where}: {name} has NaN or infinite values")
            layers.setdefault(path, {})[side] = 1
        if not layers or any(len(sides) != 2 for sides in layers.values()):
            raise VersionError(f"{where}: {ADAPTER_WEIGHTS} lacks a LoRA matrix, or holds none")
        for name, tensor in _tensors(folder / BINS) if BINS in manifest.files else ():
            if name == "deltas" and (
                tensor.dim() != 2
                or tensor.shape[0] != manifest.bins
                or not torch.isfinite(tensor).all()
            ):
                raise VersionError(
                    f"{where}: {BINS} must be finite and of shape ({manifest.bins}, hidden), it has "
                    f"shape {tuple(tensor.shape)}"
                )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VersionError(
            f"{where}: the adapter cannot be read ({error}); publish it again"
        ) from error


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time: an adapter need not fit twice."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            yield name, opened.get_tensor(name)


@dataclass(frozen=True)
class Change:
    """One thing in which two versions differ. `section`: settings, training, metrics, data, models
    or files. `difference`: b - a where both are numbers, else None."""

    section: str
    name: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        numbers = all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in (self.a, self.b)
        )
        return self.b - self.a if numbers and math.isfinite(self.b - self.a) else None


SECTIONS = {
    "settings": (
        "kind",
        "reads",
        "temperature",
        "fusion",
        "scoring",
        "standardise",
        "bins",
        "reserved_ids",
    ),
    "data": ("snapshot", "job"),
    "models": ("base_model", "slm_digest", "llm_digest", "tokenizer_digest"),
}


def changes(a: Manifest, b: Manifest) -> list[Change]:
    """In what `b` differs from `a`; None stands for what one of them does not have."""
    left, right = a.model_dump(mode="json"), b.model_dump(mode="json")
    pairs = [
        (section, name, left[name], right[name])
        for section, names in SECTIONS.items()
        for name in names
    ]
    for section in ("training", "metrics", "thresholds", "files"):
        names = dict.fromkeys([*left[section], *right[section]])
        pairs += [
            (section, name, left[section].get(name), right[section].get(name)) for name in names
        ]
    return [Change(*pair) for pair in pairs if pair[2] != pair[3]]
