"""Which files of a source belong to a split, and that no evaluation split is ever read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from s2t_shared.data import hub
from s2t_shared.data.datasets import open_records
from s2t_shared.data.prompts import count, fingerprint, read, read_prompts
from s2t_shared.errors import ConfigError, EvaluationSplitError
from s2t_shared.types import Prompt
from tests.helpers import prompt_files
from tests.helpers.prompt_files import ROWS, read_prompts_of, source_of, write_jsonl

SOURCES = [
    prompt_files.jsonl,
    prompt_files.json_list,
    prompt_files.comma_separated,
    prompt_files.parquet,
    prompt_files.hub_layout,
    prompt_files.with_card,
    prompt_files.saved,
    prompt_files.saved_split,
]
UNCOUNTED = (prompt_files.json_list, prompt_files.comma_separated)
CARD = """---
license: mit
configs:
- config_name: en
  data_files: en/*
- config_name: de
  data_files: [de/train.jsonl]
---
"""


@pytest.fixture
def two_languages(tmp_path: Path) -> Path:
    """A folder whose card has two configurations, none of them the default."""
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "set/en/train.jsonl", [{"prompt": "one"}])
    write_jsonl(tmp_path / "set/de/train.jsonl", [{"prompt": "eins"}])
    write_card(tmp_path / "set", CARD)
    return tmp_path / "set"


def write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")


def read_all(source: Path | str, split: str = "train") -> list[Prompt]:
    return read_prompts_of(source, split=split)


# -- files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_same_rows_from_every_kind(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = source_of(make(tmp_path))
    rows = list(read(source))
    assert [row["id"] for row, _ in rows] == [r["id"] for r in ROWS]
    assert [prompt for _, prompt in rows] == [Prompt(text=r["prompt"]) for r in ROWS]
    assert [row["answer"] for row, _ in rows] == [r["answer"] for r in ROWS]
    assert count(source) == (None if make in UNCOUNTED else len(ROWS))
    assert fingerprint(source) == fingerprint(source)


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    """Notes beside the data files are left alone, however many they are."""
    write_jsonl(tmp_path / "set/1.jsonl", [{"prompt": "a"}])
    (tmp_path / "set/2.csv").write_text("prompt\nb\n", encoding="utf-8")
    for name in ("README.md", "NOTES.md", "LICENSE.txt", ".hidden.jsonl"):
        (tmp_path / "set" / name).write_text("# Not data\n", encoding="utf-8")
    assert read_all(tmp_path / "set") == [Prompt(text="a"), Prompt(text="b")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere.jsonl", "no such file"),
        ("data/nowhere.parquet", "no such file"),
        ("nowhere", "no such file"),
        ("org/name/deeper", "no such file"),
    ],
)
def test_nothing_there(source: str, message: str) -> None:
    for use in (lambda s: list(read(s)), fingerprint, count):
        with pytest.raises(ConfigError, match=message):
            use(source_of(source))


def test_folders_without_the_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "only/test.jsonl", ROWS[:1])
    with pytest.raises(ConfigError, match=r"no data files of split 'train' \(splits found: test"):
        read_all(tmp_path / "only")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no data files"):
        read_all(tmp_path / "empty")


def test_other_named_splits_can_be_chosen(tmp_path: Path) -> None:
    for split in ("train_sft", "train_gen", "test_sft"):
        write_jsonl(tmp_path / f"set/data/{split}-00000-of-00001.jsonl", [{"prompt": split}])
    assert read_all(tmp_path / "set", "train_gen") == [Prompt(text="train_gen")]


# -- saved data sets and dataset cards ------------------------------------------------------------


def test_saved_data_sets_and_cards_without_the_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'extra', but train, test"):
        read_all(prompt_files.saved(tmp_path), "extra")
    with pytest.raises(ConfigError, match="its card names no split 'extra', but train, test"):
        read_all(prompt_files.with_card(tmp_path), "extra")


def test_a_damaged_saved_data_set_is_named(tmp_path: Path) -> None:
    folder = prompt_files.saved(tmp_path)
    (folder / "dataset_dict.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="saved' cannot be read.*save_to_disk"):
        read_all(folder)


def test_configurations(two_languages: Path) -> None:
    assert read_all(f"{two_languages}:de") == [Prompt(text="eins")]
    assert read_all(f"{two_languages}:en") == [Prompt(text="one")]
    for source in (two_languages, f"{two_languages}:fr"):
        with pytest.raises(ConfigError, match=r"FOLDER:NAME \(there are: en, de\)"):
            read_all(source)
    write_card(two_languages, CARD.replace("name: de\n", "name: de\n  default: true\n"))
    assert read_all(two_languages) == [Prompt(text="eins")]


def test_a_configuration_may_be_a_folder(two_languages: Path) -> None:
    write_card(two_languages, "---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n")
    assert read_all(two_languages) == [Prompt(text="one")]


def test_a_configuration_needs_a_card(two_languages: Path) -> None:
    (two_languages / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"FOLDER:NAME \(there are: default\)"):
        read_all(f"{two_languages}:en")


@pytest.mark.parametrize("pattern", ["/etc/*", "**x", "nothing/*"])
def test_a_card_that_names_no_data_files(two_languages: Path, pattern: str) -> None:
    write_card(two_languages, CARD.replace("en/*", f"'{pattern}'"))
    with pytest.raises(ConfigError, match="cannot be read: .*mend its dataset card"):
        read_all(f"{two_languages}:en")


def test_a_card_names_no_files_outside_its_folder(two_languages: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "outside.jsonl", [{"prompt": "secret"}])
    for name in ("../outside.jsonl", str(tmp_path / "outside.jsonl")):
        write_card(two_languages, CARD.replace("en/*", name))
        with pytest.raises(ConfigError, match="outside.jsonl', outside of it"):
            read_all(f"{two_languages}:en")


@pytest.mark.parametrize("scheme", ["http", "hf", "s3"])
def test_a_card_asks_no_network_address(
    two_languages: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` would ask for the file before anybody looks where it lies."""
    monkeypatch.setattr(hub, "card_files", lambda *_: pytest.fail("datasets was asked"))
    write_card(two_languages, CARD.replace("en/*", f"{scheme}://127.0.0.1:1/train.jsonl"))
    with pytest.raises(ConfigError, match="network address"):
        read_all(f"{two_languages}:en")


def test_a_download_may_be_made_of_symbolic_links(two_languages: Path, tmp_path: Path) -> None:
    """The hub's client keeps the content elsewhere."""
    blob = write_jsonl(tmp_path / "blobs/ab12", [{"prompt": "linked"}])
    (two_languages / "en/train.jsonl").unlink()
    (two_languages / "en/train.jsonl").symlink_to(blob)
    assert read_all(f"{two_languages}:en") == [Prompt(text="linked")]


def test_a_card_that_is_no_yaml(two_languages: Path) -> None:
    write_card(two_languages, "---\nconfigs: [\n---\n")
    with pytest.raises(ConfigError, match="cannot be read: .*dataset card"):
        read_all(two_languages)


# -- evaluation splits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split", ["test", "Validation", "test_sft", "validation-matched", "held_out_2", "dev", ""]
)
def test_evaluation_splits_are_refused(tmp_path: Path, split: str) -> None:
    for use in (read, fingerprint, count):
        with pytest.raises(EvaluationSplitError):
            use(source_of(prompt_files.jsonl(tmp_path), split=split))


@pytest.mark.parametrize(
    "name", ["test.jsonl", "gsm8k_test.jsonl", "test-00000-of-00001.parquet", "val.parquet"]
)
def test_a_file_named_like_an_evaluation_split_is_refused(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, ROWS[:1])
    with pytest.raises(EvaluationSplitError, match="rename it"):
        open_records(str(tmp_path / name), "train")


def test_a_folder_named_like_an_evaluation_split_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "set/test/a.jsonl", ROWS[:1])
    for source in (file, file.parent):
        with pytest.raises(EvaluationSplitError, match="rename it"):
            open_records(str(source), "train")
    training = write_jsonl(tmp_path / "set/test/train.jsonl", ROWS[:1])
    assert open_records(str(training), "train").files == (training,)


def test_evaluation_files_may_be_answered(tmp_path: Path) -> None:
    """To answer is not to learn."""
    file = write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    assert len(list(read_prompts(file))) == 1


@pytest.mark.parametrize(("link", "content"), [("test", "ab12"), ("train", "test")])
def test_a_symbolic_link_hides_no_evaluation_split(tmp_path: Path, link: str, content: str) -> None:
    """The hub's client links test.jsonl to a file that is named by its hash."""
    write_jsonl(tmp_path / f"{content}.jsonl", ROWS[:1])
    (tmp_path / f"{link}.jsonl").symlink_to(tmp_path / f"{content}.jsonl")
    with pytest.raises(EvaluationSplitError, match=f"{link}.jsonl' is named like"):
        open_records(str(tmp_path / f"{link}.jsonl"), "train")


def test_a_saved_test_split_is_refused(tmp_path: Path) -> None:
    folder = prompt_files.saved(tmp_path) / "test"
    state = json.loads((folder / "state.json").read_text("utf-8"))
    (folder / "state.json").write_text(json.dumps({**state, "_split": "test"}), encoding="utf-8")
    with pytest.raises(EvaluationSplitError):
        open_records(str(folder), "train")


def test_a_card_makes_no_evaluation_file_a_training_file(two_languages: Path) -> None:
    """Neither by its word, nor where it leaves the choice to names that `datasets` knows not."""
    write_jsonl(two_languages / "en/heldout.jsonl", [{"prompt": "secret"}])
    (two_languages / "en/train.jsonl").rename(two_languages / "en/a.jsonl")
    by_folder = "---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n"
    for card in (CARD, by_folder):
        write_card(two_languages, card)
        with pytest.raises(EvaluationSplitError, match=r"heldout.jsonl' is named like"):
            read_all(f"{two_languages}:en")
