"""Nothing that comes from outside is unpickled: a bomb, wherever it lies, is refused and does not
go off."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import redis
import torch

from s2t_shared.bundled import SLM_DIR
from s2t_shared.data.prompts import PromptSource, read
from s2t_shared.decode.selection_cache import CACHE_PREFIX, CachedSelector, selection_key
from s2t_shared.errors import ConfigError, InvalidRequestError, ModelLoadError, VersionError
from s2t_shared.labels.dead_letters import read_dead_letters
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.spool import HEADER, Spool
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.registry import Registry
from services.launch.redis_server import RedisServer
from tests.decode.test_selection_cache import INFO, QUERY, CountingSelector, ask
from tests.helpers.redis import eventually
from tests.helpers.versions import publish, rehash


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def bomb(canary: Path) -> bytes:
    content = pickle.dumps(Bomb(canary))
    pickle.loads(content)  # noqa: S301 - it is one
    assert canary.exists()
    canary.unlink()
    return content


def test_a_bomb_in_the_stream_is_a_dead_letter(
    bomb: bytes, canary: Path, store: LabelStream, lake: Lake
) -> None:
    store.append([bomb])
    assert Drain(store, lake).flush() == 0
    [letter] = read_dead_letters(store)
    assert letter.text == bomb and letter.matches("task", "canary")  # listed, and searched
    assert not canary.exists()


def test_a_bomb_in_the_cache_is_a_miss(
    bomb: bytes, canary: Path, server: RedisServer, client: redis.Redis
) -> None:
    inner = CountingSelector()
    cached = CachedSelector(inner, server.url, lookup_timeout_s=2.0)
    client.set(CACHE_PREFIX + selection_key(QUERY, INFO), bomb)
    assert ask(cached, QUERY) == [inner.reply(QUERY)] and inner.asked == 1
    cached.close()
    assert not canary.exists()


@pytest.mark.parametrize("framed", [True, False])
def test_a_bomb_in_the_spool_is_delivered_as_bytes_or_not_at_all(
    framed: bool, bomb: bytes, canary: Path, store: LabelStream, lake: Lake, tmp_path: Path
) -> None:
    """As an entry, and as a file in place of entries."""
    left = Spool(tmp_path / "spool", 1 << 20)
    left.append([bomb])
    left.seal()
    [segment] = left.segments()
    if not framed:
        segment.write_bytes(HEADER.pack(len(bomb), 0) + bomb)
    left.close()
    writer = LabelWriter(store, tmp_path / "spool")
    eventually(lambda: not segment.exists())
    writer.close()
    assert Drain(store, lake).flush() == 0
    assert store.counts().dead_letters == framed
    assert not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "extra.pt"])
def test_a_bomb_in_an_adapter_folder_is_refused(
    name: str, bomb: bytes, canary: Path, tmp_path: Path
) -> None:
    runtime = ModelRuntime.load(str(SLM_DIR))
    registry = Registry(tmp_path / "versions")
    folder = registry.folder(publish(registry, runtime))
    (folder / name).write_bytes(bomb)
    rehash(folder)
    with pytest.raises(VersionError):
        registry.load(folder.name, runtime, "tok")
    assert not canary.exists()


def test_a_bomb_in_a_model_folder_is_refused(bomb: bytes, canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SLM_DIR, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    torch.save({"weights": Bomb(canary)}, folder / "model.pt")
    with pytest.raises(ModelLoadError):
        ModelRuntime.load(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["train.jsonl", "train.json", "train.parquet", "train.arrow", "train.csv", "train.pkl", "d.pt"],
)
def test_a_bomb_in_a_data_set_is_refused(
    name: str, bomb: bytes, canary: Path, tmp_path: Path
) -> None:
    """As the file that is named, and as one of a folder."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / name
    file.write_bytes(bomb)
    for source in (file, file.parent):
        try:
            rows = list(read(PromptSource(source=str(source), split="train")))
        except (ConfigError, InvalidRequestError):
            continue
        assert all(isinstance(prompt, InvalidRequestError) for _, prompt in rows)
    assert not canary.exists()


def test_the_script_of_a_data_set_is_not_run(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises((ConfigError, InvalidRequestError)):
        list(read(PromptSource(source=str(folder), split="train")))
    assert not canary.exists()
