"""Forwards, cache rows, adapters and model loading, each against plain transformers or PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from s2t_shared.errors import InvalidRequestError, ModelLoadError, VersionError
from s2t_shared.model.kv_pool import Slot
from s2t_shared.model.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    load_adapter,
    merge,
    new_adapter,
    save_adapter,
)
from s2t_shared.model.runtime import ModelRuntime, Segment
from tests.helpers.models import SPECS

ARCHITECTURES = ["slm", "qwen2", "qwen2_tied", "padding", "gemma2", "mistral"]


def random_adapter(runtime: ModelRuntime, seed: int = 0, rank: int = 3) -> Adapter:
    """An adapter that changes the model's mind: B is not zero."""
    adapter = new_adapter(runtime.model, rank, 2.0 * rank, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return Adapter(
        rank=rank,
        alpha=adapter.alpha,
        weights={
            path: (a.detach(), torch.randn(b.shape, generator=generator) * 0.15)
            for path, (a, b) in adapter.weights.items()
        },
    )


def plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def new_row(runtime: ModelRuntime, columns: int = 128, adapter_key: object = None) -> Slot:
    row = runtime.pool.allocate((), columns, adapter_key)
    assert row is not None
    return row


def read(
    runtime: ModelRuntime, row: Slot, ids: list[int], start: int = 0, adapter: Adapter | None = None
) -> torch.Tensor:
    """Hidden states [t, hidden] of one segment."""
    hidden, (place,) = runtime.forward(
        [Segment(slot=row, token_ids=ids, start=start, siblings=(), adapter=adapter)]
    )
    return hidden[place]


# -- forwards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_extending_in_ragged_pieces_equals_one_plain_forward(
    models: dict[str, Path], name: str
) -> None:
    """Law 2, cached == uncached: a wrong mask, position or window shows here before any role is
    involved."""
    runtime = ModelRuntime.load(str(models[name]))
    torch.manual_seed(0)
    contexts = [torch.randint(5, 48, (n,)).tolist() for n in (17, 4, 11)]
    rows = [new_row(runtime) for _ in contexts]
    got: list[list[torch.Tensor]] = [[] for _ in contexts]
    done = [0, 0, 0]
    for cuts in (
        [5, 1, 3],
        [6, 3, 1],
        [1, 0, 7],
        [5, 0, 0],
    ):  # several rows at several starts, padded
        live = [i for i, n in enumerate(cuts) if n]
        hidden, places = runtime.forward(
            [
                Segment(
                    slot=rows[i], token_ids=contexts[i][done[i] : done[i] + cuts[i]], start=done[i]
                )
                for i in live
            ]
        )
        for i, place in zip(live, places, strict=True):
            got[i].append(runtime.logits(hidden[place]))
            done[i] += cuts[i]
    assert done == [17, 4, 11]
    for context, pieces in zip(contexts, got, strict=True):
        torch.testing.assert_close(
            torch.cat(pieces), plain_logits(models[name], context), atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_and_reserved_logits_equal_the_whole_heads(models: dict[str, Path], name: str) -> None:
    """Scoring skips the head; a forgotten bias, scale or soft cap would shift every score."""
    runtime = ModelRuntime.load(str(models[name]))
    hidden = (
        torch.randn(3, 5, runtime.config.hidden_size, generator=torch.Generator().manual_seed(1))
        * 3
    )
    whole = runtime.logits(hidden)
    ids = torch.randint(
        0, runtime.vocab_rows, (3, 5, 4), generator=torch.Generator().manual_seed(2)
    )
    torch.testing.assert_close(
        runtime.row_logits(hidden, ids), whole.gather(-1, ids), atol=1e-5, rtol=1e-5
    )
    reserved = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    torch.testing.assert_close(
        runtime.reserved_logits(hidden, reserved, None), whole[..., -16:], atol=1e-5, rtol=1e-5
    )
    virtual = tuple(range(runtime.vocab_rows, runtime.vocab_rows + 16))
    assert not runtime.reserved_logits(hidden, virtual, None).any()
    assert runtime.reserved_logits(hidden, virtual, torch.ones(16, hidden.shape[-1])).any()


def test_candidates_leave_no_trace(models: dict[str, Path]) -> None:
    """Looking at candidates (over the base KV, or behind new tokens of an adapter's own row) must
    change nothing that a later token sees."""
    runtime = ModelRuntime.load(str(models["slm"]))
    row = new_row(runtime)
    read(runtime, row, [5, 6, 7, 8])
    adapter = random_adapter(runtime)
    runtime.forward(
        [
            Segment(
                slot=row, token_ids=[8], start=3, siblings=(9, 10, 11), adapter=adapter, keep=False
            )
        ]
    )
    runtime.forward(
        [Segment(slot=row, token_ids=(), start=4, siblings=(12, 13), adapter=adapter, keep=False)]
    )
    assert row.token_ids == [5, 6, 7, 8]
    logits = runtime.logits(read(runtime, row, [20, 21], 4))
    torch.testing.assert_close(
        logits, plain_logits(models["slm"], [5, 6, 7, 8, 20, 21])[4:], atol=2e-5, rtol=1e-5
    )
    hidden, (place,) = runtime.forward(
        [Segment(slot=row, token_ids=[22], start=6, siblings=(9, 10))]
    )
    assert row.token_ids[6:] == [22]
    for i, candidate in enumerate((9, 10)):
        expected = plain_logits(models["slm"], [5, 6, 7, 8, 20, 21, 22, candidate])[-1]
        torch.testing.assert_close(
            runtime.logits(hidden[place])[1 + i], expected, atol=2e-5, rtol=1e-5
        )


def test_a_freed_row_starts_clean(models: dict[str, Path]) -> None:
    """What a longer, ended sequence left behind in the row must not be seen by the next one."""
    runtime = ModelRuntime.load(str(models["slm"]))
    row = new_row(runtime)
    read(runtime, row, list(range(5, 45)))
    runtime.pool.release(row)
    runtime.pool.clear()
    logits = runtime.logits(read(runtime, new_row(runtime), [9, 8, 7]))
    torch.testing.assert_close(logits, plain_logits(models["slm"], [9, 8, 7]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_packed_forward_of_everything_at_once(models: dict[str, Path], name: str) -> None:
    """Prefill chunks, single tokens of rows with holes between them, a long chunk behind a prefix,
    and candidates, in one forward and any order: each is what a plain forward of its own says."""
    runtime = ModelRuntime.load(str(models[name]))
    torch.manual_seed(1)
    contexts = [torch.randint(5, 48, (n,)).tolist() for n in (9, 90, 30, 5, 100, 12, 3)]
    stored = [8, 20, 29, 0, 99, 12, 2]
    rows = [new_row(runtime, 256 if i == 4 else 128) for i in range(len(contexts))]
    for row, context, n in zip(rows, contexts, stored, strict=True):
        if n:
            read(runtime, row, context[:n])
    segments = [
        Segment(slot=row, token_ids=context[n:], start=n)
        for row, context, n in zip(rows, contexts, stored, strict=True)
    ]
    segments[5] = Segment(slot=rows[5], token_ids=(), start=12, siblings=(40, 41, 42), keep=False)
    hidden, places = runtime.forward([segments[i] for i in (3, 5, 0, 6, 1, 4, 2)])
    for i, place in zip((3, 5, 0, 6, 1, 4, 2), places, strict=True):
        logits = runtime.logits(hidden[place])
        if i == 5:
            expected = torch.stack(
                [plain_logits(models[name], [*contexts[5], c])[-1] for c in (40, 41, 42)]
            )
        else:
            expected = plain_logits(models[name], contexts[i])[stored[i] :]
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)
    runtime.pool.check()


def test_adapters_act_on_their_own_tokens_only(models: dict[str, Path]) -> None:
    """Two versions and none in one forward, each row as if alone."""
    runtime = ModelRuntime.load(str(models["qwen2"]))
    one, two = random_adapter(runtime, 1), random_adapter(runtime, 7)
    ids = [5, 9, 40, 7]
    alone = [
        read(runtime, new_row(runtime, adapter_key=a and a.key), ids, 0, a)
        for a in (None, one, two)
    ]
    rows = [new_row(runtime, adapter_key=a and a.key) for a in (None, one, two)]
    hidden, places = runtime.forward(
        [
            Segment(slot=r, token_ids=ids, start=0, siblings=(), adapter=a)
            for r, a in zip(rows, (None, one, two), strict=True)
        ]
    )
    for place, expected in zip(places, alone, strict=True):
        torch.testing.assert_close(hidden[place], expected, atol=2e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1 and (alone[1] - alone[2]).abs().max() > 0.1


def test_merged_weights_are_the_adapter(models: dict[str, Path]) -> None:
    runtime = ModelRuntime.load(str(models["qwen2"]))
    adapter = random_adapter(runtime)
    gated = read(runtime, new_row(runtime, adapter_key=1), [5, 9, 40, 7], 0, adapter)
    merge(adapter, runtime.model)
    merged = read(runtime, new_row(runtime, adapter_key=1), [5, 9, 40, 7], 0, adapter)
    assert not torch.equal(gated, merged)
    torch.testing.assert_close(gated, merged, atol=2e-5, rtol=1e-5)


def test_bfloat16_smoke(models: dict[str, Path]) -> None:
    """A float32 tensor mixed into a bfloat16 model raises only on the machine with the GPU, if not
    here."""
    runtime = ModelRuntime.load(str(models["gemma2"]), dtype="bfloat16")
    plain = plain_logits(models["gemma2"], [5, 6, 7, 8])
    row = new_row(runtime)
    adapter = random_adapter(runtime)
    with_adapter = read(runtime, row, [5, 6, 7], 0, adapter)
    hidden = read(runtime, row, [5, 6, 7])
    branch = runtime.forward(
        [Segment(slot=row, token_ids=(), start=3, siblings=(8, 9), keep=False)]
    )[0][None]
    assert hidden.dtype == torch.bfloat16 and runtime.logits(hidden).dtype == torch.float32
    assert not torch.equal(hidden, with_adapter)
    torch.testing.assert_close(runtime.logits(branch[0, 0]), plain[3], atol=0.8, rtol=0.1)
    assert (
        runtime.reserved_logits(branch, tuple(range(48, 64)), torch.zeros(16, 32)).isfinite().all()
    )
    assert runtime.row_logits(branch[:, 0], torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize("ids", [(5, -1), (5, 64), (1 << 40,)])
def test_ids_without_an_embedding_row_are_refused(
    models: dict[str, Path], ids: tuple[int, ...]
) -> None:
    """An id past the table is an index error that would kill the whole batch."""
    with pytest.raises(InvalidRequestError, match="token_ids"):
        ModelRuntime.load(str(models["slm"])).check_ids(ids)


# -- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slm", "qwen2", "gemma2"])
def test_an_adapter_file_means_to_peft_what_it_means_to_us(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The files are PEFT's: if its logits differed, a version trained elsewhere would mean
    something else here."""
    from peft import PeftModel

    runtime = ModelRuntime.load(str(models[name]))
    saved = random_adapter(runtime)
    save_adapter(saved, tmp_path, str(models[name]))
    loaded = load_adapter(tmp_path, ModelRuntime.load(str(models[name])).model)
    assert loaded.rank == saved.rank and loaded.alpha == saved.alpha
    ids = [5, 9, 40, 7, 30, 22, 11]
    ours = runtime.logits(read(runtime, new_row(runtime), ids, 0, loaded))
    base = AutoModelForCausalLM.from_pretrained(
        models[name], dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours, theirs(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-5
        )
    assert (ours - plain_logits(models[name], ids)).abs().max() > 0.1


def test_installed_layers_change_nothing_while_no_adapter_is_active(
    models: dict[str, Path],
) -> None:
    """Law 4: bit for bit, before the layers are wrapped, after, after an adapter was used, and
    after one raised."""
    runtime = ModelRuntime.load(str(models["qwen2"]))
    row = new_row(runtime)

    def logits() -> torch.Tensor:
        return runtime.logits(read(runtime, row, [5, 9, 40, 7]))

    before = logits()
    adapter = random_adapter(runtime)
    assert not runtime.switch.active and torch.equal(logits(), before)
    assert not torch.equal(runtime.logits(read(runtime, row, [5, 9, 40, 7], 0, adapter)), before)
    assert torch.equal(logits(), before)
    with pytest.raises(KeyError):
        read(runtime, row, [5], 0, Adapter(rank=1, alpha=1.0, weights={}))
    assert not runtime.switch.active and torch.equal(logits(), before)


def test_a_fresh_adapter_is_the_base_model(models: dict[str, Path]) -> None:
    """B starts at zero, so training starts from the base model and not from noise."""
    runtime = ModelRuntime.load(str(models["slm"]))
    base = read(runtime, new_row(runtime), [5, 9])
    fresh = new_adapter(runtime.model, 2, 4.0, seed=0)
    with torch.no_grad():
        assert torch.equal(read(runtime, new_row(runtime), [5, 9], 0, fresh), base)
    assert all(p.requires_grad for p in fresh.parameters()) and any(
        p.any() for p in fresh.parameters()
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            fresh.parameters(), new_adapter(runtime.model, 2, 4.0, seed=0).parameters(), strict=True
        )
    )


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / ADAPTER_CONFIG
        config = {
            k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None
        }
        file.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return edit


BROKEN_ADAPTERS: dict[str, Callable[[Path], object]] = {
    "missing folder": shutil.rmtree,
    "missing config": lambda f: (f / ADAPTER_CONFIG).unlink(),
    "missing weights": lambda f: (f / ADAPTER_WEIGHTS).unlink(),
    "config is no JSON": lambda f: (f / ADAPTER_CONFIG).write_text("{"),
    "config is a list": lambda f: (f / ADAPTER_CONFIG).write_text("[]"),
    "config without rank": edit_config(r=None),
    "corrupt safetensors": lambda f: (f / ADAPTER_WEIGHTS).write_bytes(
        b"\x08\0\0\0\0\0\0\0garbage!"
    ),
    "truncated safetensors": lambda f: (f / ADAPTER_WEIGHTS).write_bytes(
        (f / ADAPTER_WEIGHTS).read_bytes()[:-9]
    ),
    "NaN weight": edit_weights(lambda t, k: t[k].view(-1)[0:1].fill_(float("nan"))),
    "infinite weight": edit_weights(lambda t, k: t[k].view(-1)[0:1].fill_(float("inf"))),
    "wrong shape": edit_weights(lambda t, k: t.update({k: t[k][:, :-1].contiguous()})),
    "other rank": edit_config(r=5),
    "rank zero": edit_config(r=0),
    "missing layer": edit_weights(lambda t, k: t.pop(k)),
    "unknown layer": edit_weights(
        lambda t, k: t.update({"base_model.model.x.lora_A.weight": torch.ones(1, 1)})
    ),
    "NaN alpha": edit_config(lora_alpha=float("nan")),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    """A version that loads although broken would score noise (or NaN) live; the old one must keep
    serving."""
    runtime = ModelRuntime.load(str(models["slm"]))
    folder = tmp_path / "v1"
    folder.mkdir()
    save_adapter(random_adapter(runtime), folder, "base")
    load_adapter(folder, runtime.model)
    BROKEN_ADAPTERS[case](folder)
    with pytest.raises(VersionError, match="v1"):
        load_adapter(folder, runtime.model)


def test_scalings_peft_would_apply_are_not_silently_ignored(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT scales by alpha / sqrt(r) with use_rslora: ignoring it serves another model than was
    trained."""
    runtime = ModelRuntime.load(str(models["slm"]))
    adapter = random_adapter(runtime)
    save_adapter(adapter, tmp_path, "base")
    edit_config(use_rslora=True)(tmp_path)
    try:
        loaded = load_adapter(tmp_path, runtime.model)
    except VersionError:
        return
    assert loaded.scale == pytest.approx(adapter.alpha / adapter.rank**0.5)


# -- loading --------------------------------------------------------------------------------------


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_model_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


BROKEN_MODELS: dict[str, Callable[[Path], object]] = {
    "missing folder": shutil.rmtree,
    "no config": lambda f: (f / "config.json").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "unknown model type": edit_model_config(model_type="nonesuch"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "corrupt weights": lambda f: (f / "model.safetensors").write_bytes(
        b"\x08\0\0\0\0\0\0\0garbage!"
    ),
    "truncated weights": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-99]
    ),
    "a tensor is missing": drop_a_tensor,
    "a tensor has another shape": reshape_a_tensor,
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_folder_is_refused(
    models: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """A broken download must stop the start with a typed error; random weights in place of a lost
    tensor are worse."""
    folder = tmp_path / "model"
    shutil.copytree(models["slm"], folder)
    ModelRuntime.load(str(folder))
    BROKEN_MODELS[case](folder)
    with pytest.raises(ModelLoadError):
        ModelRuntime.load(str(folder))


def test_unknown_dtype_and_layer_types_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """A model with layers we cannot mask (Mamba, chunked attention) would run and be wrong."""
    with pytest.raises(ModelLoadError, match="float16"):
        ModelRuntime.load(str(models["slm"]), dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(models["slm"])
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelLoadError, match="chunked_attention"):
        ModelRuntime(model, "", frozenset())


def test_the_digest_follows_the_weights(models: dict[str, Path], tmp_path: Path) -> None:
    """Versions and labels name the SLM by its digest: one changed number must change it, a copy
    must not."""
    first = ModelRuntime.load(str(models["slm"])).digest
    shutil.copytree(models["slm"], tmp_path / "copy")
    assert ModelRuntime.load(str(tmp_path / "copy")).digest == first
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert ModelRuntime.load(str(tmp_path / "copy")).digest != first
    assert len({ModelRuntime.load(str(path)).digest for path in models.values()}) == len(SPECS)
