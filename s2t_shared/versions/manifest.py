"""The manifest of a published version, and checks of the version's files against it.

The checks here need no model: names, hashes, shapes, finite values. `weights.load_version` checks
that a version fits an SLM. Knows one folder; not which version is live.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from s2t_shared.errors import VersionError, VersionNotFoundError
from s2t_shared.files import sha256_file
from s2t_shared.model.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from s2t_shared.policy import Calibration
from s2t_shared.types import Reading, Scoring, SelectorKind

MANIFEST = "manifest.json"
CARD = "README.md"
BINS = "bins.safetensors"
# 2 adds `job`, `scoring` and `standardise`, 3 `always_on`. Older ones are read as the defaults.
SCHEMA_VERSION = 3
RANK_AXIS = {"lora_A": 0, "lora_B": 1}
# Files of other kinds, such as pickles, are never read.
DATA_SUFFIXES = {".safetensors", ".json", ".jsonl", ".md", ".svg", ".png", ".csv", ".txt"}


class Manifest(BaseModel):
    """What a version is, which models it fits, and what was measured of it.

    thresholds: trigger -> budget -> threshold. snapshot: id of the labels it was trained on. job:
    id of the training job that made it, "" for none. created_at: Unix seconds. files: SHA-256 of
    every other file of the folder, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    version: str
    kind: SelectorKind
    reads: Reading
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    fusion: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    scoring: Scoring = Scoring.EXPECTED
    standardise: bool = False
    always_on: bool = False
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
        """Thresholds per trigger and budget.

        Raises:
            VersionError: `thresholds` is not a calibration.
        """
        try:
            return Calibration.from_json(json.dumps(self.thresholds))
        except ValueError as error:
            raise VersionError(
                f"version {self.version!r}: thresholds are broken ({error})"
            ) from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the version in `folder`.

    Raises:
        VersionNotFoundError: the folder has none.
        VersionError: it is not JSON, or not of a schema that this program reads.
    """
    where = f"version {folder.name!r}"
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = content.get("schema_version", 1) if isinstance(content, dict) else 1
        if not 1 <= schema <= SCHEMA_VERSION:
            raise VersionError(
                f"{where} has schema {schema}, this program reads 1 to {SCHEMA_VERSION}; "
                "train it again, or read it with the program that made it"
            )
        return Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise VersionNotFoundError(
            f"{folder.name!r} has no {MANIFEST}: not a published version"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _broken_manifest(where, f"{first['loc']}: {first['msg']}") from error
    except (OSError, ValueError, TypeError) as error:
        raise _broken_manifest(where, str(error).splitlines()[0]) from error


def _broken_manifest(where: str, reason: str) -> VersionError:
    return VersionError(f"{where}: {MANIFEST} is broken ({reason}); publish it again")


# -- files ----------------------------------------------------------------------------------------


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare the files in `folder` with the manifest.

    Raises:
        VersionError: a file is missing, outside the folder, of a kind that is not read, or differs
            from its hash.
    """
    where = f"version {folder.name!r}"
    for name, digest in manifest.files.items():
        _verify_file(where, folder, name, digest)
    needed = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if manifest.kind is not SelectorKind.PREFIX:
        needed.add(BINS)
    missing = sorted(needed - set(manifest.files))
    if missing:
        raise VersionError(
            f"{where}: {missing[0]} is missing, which a version of kind "
            f"{manifest.kind.value!r} needs; publish it again"
        )


def _verify_file(where: str, folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        raise VersionError(
            f"{where}: file {name!r} is missing from its folder (it names a place elsewhere, "
            "which is never read); publish it again"
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
    if found != digest:
        raise VersionError(
            f"{where}: {name} does not match its hash in the manifest; "
            "it is damaged or was changed: publish it again"
        )


# -- weights --------------------------------------------------------------------------------------


def verify_weights(folder: Path, manifest: Manifest) -> None:
    """Check rank, pairs, shapes and finite values of the weights, without a model.

    Raises:
        VersionError: one of them is wrong, or a file cannot be read.
    """
    where = f"version {folder.name!r}"
    try:
        _verify_adapter(where, folder)
        if BINS in manifest.files:
            _verify_bins(where, folder, manifest.bins)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VersionError(
            f"{where}: the adapter cannot be read ({error}); publish it again"
        ) from error


def _verify_adapter(where: str, folder: Path) -> None:
    rank = int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
    sides_of: dict[str, set[str]] = {}
    for name, tensor in _tensors(folder / ADAPTER_WEIGHTS):
        path, _, side = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        if side not in RANK_AXIS or tensor.ndim != 2:
            raise VersionError(
                f"{where}: {ADAPTER_WEIGHTS} holds {name!r}, which is not a LoRA matrix"
            )
        if tensor.shape[RANK_AXIS[side]] != rank:
            raise VersionError(
                f"{where}: {name} has shape {tensor.shape}, "
                f"which does not fit rank {rank} of {ADAPTER_CONFIG}"
            )
        if not np.isfinite(tensor).all():
            raise VersionError(f"{where}: {name} has NaN or infinite values")
        sides_of.setdefault(path, set()).add(side)
    if not sides_of or any(len(sides) != 2 for sides in sides_of.values()):
        raise VersionError(f"{where}: {ADAPTER_WEIGHTS} lacks a LoRA matrix, or holds none")


def _verify_bins(where: str, folder: Path, bins: int) -> None:
    for name, tensor in _tensors(folder / BINS):
        if name != "deltas":
            continue
        shape = tensor.shape
        if len(shape) != 2 or shape[0] != bins or not np.isfinite(tensor).all():
            raise VersionError(
                f"{where}: {BINS} must be finite and of shape ({bins}, hidden), "
                f"it has shape {shape}"
            )


def _tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a safetensors file. Holds one tensor at a time in memory."""
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            yield name, opened.get_tensor(name)


# -- differences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One field in which two versions differ. section: a key of `SECTIONS` or `OPEN_SECTIONS`."""

    section: str
    name: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        """b - a where both are numbers, else None."""
        if not (_is_number(self.a) and _is_number(self.b)):
            return None
        difference = self.b - self.a
        return difference if math.isfinite(difference) else None


SECTIONS = {  # section -> fields of the manifest
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
OPEN_SECTIONS = ("training", "metrics", "thresholds", "files")  # fields that are dictionaries


def changes(a: Manifest, b: Manifest) -> list[Change]:
    """Fields in which `b` differs from `a`. None stands for a value that one of them lacks."""
    left = a.model_dump(mode="json")
    right = b.model_dump(mode="json")
    compared = []
    for section, names in SECTIONS.items():
        for name in names:
            compared.append(Change(section, name, left[name], right[name]))
    for section in OPEN_SECTIONS:
        for name in dict.fromkeys([*left[section], *right[section]]):
            old, new = left[section].get(name), right[section].get(name)
            compared.append(Change(section, name, old, new))
    return [change for change in compared if change.a != change.b]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
