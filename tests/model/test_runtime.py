"""Packed forwards and logits, each against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.errors import InvalidRequestError, ModelLoadError
from s2t_shared.model.kv_pool import BatchLayout
from s2t_shared.model.runtime import ModelRuntime, Segment
from tests.helpers.forwards import new_slot, plain_logits, random_adapter, read, with_layout

# A GPU's layout works on any device.
GPU_LAYOUT = BatchLayout.for_device(torch.device("cuda"), max_num_seqs=8)
ARCHITECTURES = ["slm", "qwen2", "qwen2_tied", "padding", "gemma2", "mistral"]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


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
    slots = [new_slot(runtime) for _ in contexts]
    pieces: list[list[torch.Tensor]] = [[] for _ in contexts]
    read_so_far = [0, 0, 0]
    # Several slots at several starts, in pieces of several lengths.
    for lengths in ([5, 1, 3], [6, 3, 1], [1, 0, 7], [5, 0, 0]):
        reading = [i for i, length in enumerate(lengths) if length]
        segments = []
        for i in reading:
            start = read_so_far[i]
            ids = contexts[i][start : start + lengths[i]]
            segments.append(Segment(slot=slots[i], token_ids=ids, start=start))
        hidden, slices = runtime.forward(segments)
        for i, tokens in zip(reading, slices, strict=True):
            pieces[i].append(runtime.logits(hidden[tokens]))
            read_so_far[i] += lengths[i]
    assert read_so_far == [17, 4, 11]
    for context, logits in zip(contexts, pieces, strict=True):
        assert_near(torch.cat(logits), plain_logits(models[name], context))


def test_candidates_leave_no_trace(models: dict[str, Path]) -> None:
    """Looking at candidates (over the base KV, or after new tokens of an adapter's own slot) must
    change nothing that a later token sees."""
    runtime = ModelRuntime.load(str(models["slm"]))
    slot = new_slot(runtime)
    read(runtime, slot, [5, 6, 7, 8])
    adapter = random_adapter(runtime)
    last_token_again = Segment(
        slot=slot,
        token_ids=[8],
        start=3,
        siblings=(9, 10, 11),
        adapter=adapter,
        extends_slot=False,
    )
    siblings_only = Segment(
        slot=slot, token_ids=(), start=4, siblings=(12, 13), adapter=adapter, extends_slot=False
    )
    runtime.forward([last_token_again])
    runtime.forward([siblings_only])
    assert slot.token_ids == [5, 6, 7, 8]
    logits = runtime.logits(read(runtime, slot, [20, 21], 4))
    assert_near(logits, plain_logits(models["slm"], [5, 6, 7, 8, 20, 21])[4:])
    hidden, (tokens,) = runtime.forward(
        [Segment(slot=slot, token_ids=[22], start=6, siblings=(9, 10))]
    )
    assert slot.token_ids[6:] == [22]
    for i, candidate in enumerate((9, 10)):
        expected = plain_logits(models["slm"], [5, 6, 7, 8, 20, 21, 22, candidate])[-1]
        assert_near(runtime.logits(hidden[tokens])[1 + i], expected)


def test_a_freed_slot_starts_clean(models: dict[str, Path]) -> None:
    """What a longer, ended sequence left in the slot must not be seen by the next one."""
    runtime = ModelRuntime.load(str(models["slm"]))
    slot = new_slot(runtime)
    read(runtime, slot, list(range(5, 45)))
    runtime.pool.release(slot)
    runtime.pool.clear()
    logits = runtime.logits(read(runtime, new_slot(runtime), [9, 8, 7]))
    assert_near(logits, plain_logits(models["slm"], [9, 8, 7]))


@pytest.mark.parametrize("layout", [BatchLayout(), GPU_LAYOUT], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_packed_forward_of_everything_at_once(
    models: dict[str, Path], name: str, layout: BatchLayout
) -> None:
    """Prefill chunks, single tokens of slots with holes between them, a long chunk after a prefix,
    and candidates, in one forward and any order: each is what a plain forward of its own says."""
    runtime = with_layout(ModelRuntime.load(str(models[name])), layout)
    torch.manual_seed(1)
    contexts = [torch.randint(5, 48, (n,)).tolist() for n in (9, 90, 30, 5, 100, 12, 3)]
    cached = [8, 20, 29, 0, 99, 12, 2]
    columns = [128, 128, 128, 128, 256, 128, 128]
    slots = [new_slot(runtime, n) for n in columns]
    segments = []
    for slot, context, n in zip(slots, contexts, cached, strict=True):
        if n:
            read(runtime, slot, context[:n])
        segments.append(Segment(slot=slot, token_ids=context[n:], start=n))
    candidates = (40, 41, 42)
    segments[5] = Segment(
        slot=slots[5], token_ids=(), start=12, siblings=candidates, extends_slot=False
    )
    order = (3, 5, 0, 6, 1, 4, 2)
    hidden, slices = runtime.forward([segments[i] for i in order])
    for i, tokens in zip(order, slices, strict=True):
        logits = runtime.logits(hidden[tokens])
        if i == 5:
            rows = [plain_logits(models[name], [*contexts[5], c])[-1] for c in candidates]
            expected = torch.stack(rows)
        else:
            expected = plain_logits(models[name], contexts[i])[cached[i] :]
        assert_near(logits, expected, atol=5e-5)
    runtime.pool.check()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_steps_are_plain_forwards(models: dict[str, Path], name: str) -> None:
    """Decode steps of changing batches: of some slots and of all, with free, waiting and ended
    slots between them, which must not lose what they hold."""
    runtime = with_layout(ModelRuntime.load(str(models[name])), GPU_LAYOUT)
    runtime.use_decode_graphs()
    graphs = runtime._graphs
    assert graphs is not None
    torch.manual_seed(2)
    contexts = [torch.randint(5, 48, (n,)).tolist() for n in (9, 40, 90, 5, 30)]
    slots = [new_slot(runtime) for _ in contexts]
    for slot, context in zip(slots, contexts, strict=True):
        read(runtime, slot, context[:-4])
    runtime.pool.release(slots[2])  # ended, and kept for its prefix
    read_so_far = [len(context) - 4 for context in contexts]
    for step in ([0, 1, 3, 4], [4], [1, 3], [0, 1, 3, 4], [0, 3], [0, 1]):
        segments = []
        for i in step:
            start = read_so_far[i]
            segments.append(Segment(slot=slots[i], token_ids=[contexts[i][start]], start=start))
        hidden, slices = runtime.forward(segments)
        for i, tokens in zip(step, slices, strict=True):
            expected = plain_logits(models[name], contexts[i][: read_so_far[i] + 1])[-1]
            assert_near(runtime.logits(hidden[tokens])[0], expected, atol=5e-5)
            read_so_far[i] += 1
    assert len(graphs._slabs) == 1
    # The ended context is still what it was.
    again = runtime.pool.allocate(contexts[2], 128)
    assert again is not None and len(again.token_ids) == len(contexts[2]) - 4
    logits = runtime.logits(read(runtime, again, contexts[2][-4:], len(contexts[2]) - 4))
    assert_near(logits, plain_logits(models[name], contexts[2])[-4:], atol=5e-5)


def test_a_step_that_cannot_be_recorded_runs_as_usual(models: dict[str, Path]) -> None:
    """A full slot beside the step's has no column for the dummy."""
    runtime = with_layout(ModelRuntime.load(str(models["slm"])), GPU_LAYOUT)
    runtime.use_decode_graphs()
    full, slot = new_slot(runtime), new_slot(runtime)
    context = torch.randint(5, 48, (128,), generator=torch.Generator().manual_seed(1)).tolist()
    read(runtime, full, context)
    read(runtime, slot, context[:9])
    logits = runtime.logits(read(runtime, slot, context[9:10], 9))
    assert_near(logits[0], plain_logits(models["slm"], context[:10])[-1])
    assert full.token_ids == context


def test_adapters_act_on_their_own_tokens_only(models: dict[str, Path]) -> None:
    """Two versions and none in one forward, each sequence as if alone."""
    runtime = ModelRuntime.load(str(models["qwen2"]))
    adapters = (None, random_adapter(runtime, 1), random_adapter(runtime, 7))
    keys = [adapter.key if adapter is not None else None for adapter in adapters]
    ids = [5, 9, 40, 7]
    alone = []
    for adapter, key in zip(adapters, keys, strict=True):
        alone.append(read(runtime, new_slot(runtime, adapter_key=key), ids, 0, adapter))
    segments = []
    for adapter, key in zip(adapters, keys, strict=True):
        slot = new_slot(runtime, adapter_key=key)
        segments.append(Segment(slot=slot, token_ids=ids, start=0, adapter=adapter))
    hidden, slices = runtime.forward(segments)
    for tokens, expected in zip(slices, alone, strict=True):
        assert_near(hidden[tokens], expected)
    assert (alone[0] - alone[1]).abs().max() > 0.1
    assert (alone[1] - alone[2]).abs().max() > 0.1


def test_an_adapter_acts_on_segments_that_are_not_neighbours(models: dict[str, Path]) -> None:
    """Slots of other sequences lie between those of one version: the gate is then no slice."""
    runtime = ModelRuntime.load(str(models["qwen2"]))
    adapter = random_adapter(runtime)
    ids = [5, 9, 40, 7]
    plain = read(runtime, new_slot(runtime), ids)
    adapted = read(runtime, new_slot(runtime, adapter_key=adapter.key), ids, 0, adapter)
    segments = []
    for gated in (True, False, True):
        slot = new_slot(runtime, adapter_key=adapter.key if gated else None)
        segments.append(
            Segment(slot=slot, token_ids=ids, start=0, adapter=adapter if gated else None)
        )
    hidden, slices = runtime.forward(segments)
    for tokens, expected in zip(slices, (adapted, plain, adapted), strict=True):
        assert_near(hidden[tokens], expected)


def test_bfloat16_smoke(models: dict[str, Path]) -> None:
    """A float32 tensor mixed into a bfloat16 model raises only on the machine with the GPU, if not
    here."""
    runtime = ModelRuntime.load(str(models["gemma2"]), dtype="bfloat16")
    plain = plain_logits(models["gemma2"], [5, 6, 7, 8])
    slot = new_slot(runtime)
    with_adapter = read(runtime, slot, [5, 6, 7], 0, random_adapter(runtime))
    hidden = read(runtime, slot, [5, 6, 7])
    assert hidden.dtype == torch.bfloat16
    assert runtime.logits(hidden).dtype == torch.float32
    assert not torch.equal(hidden, with_adapter)
    siblings, _ = runtime.forward(
        [Segment(slot=slot, token_ids=(), start=3, siblings=(8, 9), extends_slot=False)]
    )
    torch.testing.assert_close(runtime.logits(siblings[0]), plain[3], atol=0.8, rtol=0.1)
    reserved = tuple(range(48, 64))
    assert runtime.reserved_logits(siblings, reserved, torch.zeros(16, 32)).isfinite().all()
    assert runtime.row_logits(siblings[:1], torch.tensor([[1, 2]])).isfinite().all()


# -- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_and_reserved_logits_equal_the_whole_heads(models: dict[str, Path], name: str) -> None:
    """Scoring skips the head; a forgotten bias, scale or soft cap would shift every score."""
    runtime = ModelRuntime.load(str(models[name]))
    rows = runtime.vocab_rows
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, runtime.config.hidden_size, generator=generator) * 3
    whole = runtime.logits(hidden)
    ids = torch.randint(0, rows, (3, 5, 4), generator=torch.Generator().manual_seed(2))
    assert_near(runtime.row_logits(hidden, ids), whole.gather(-1, ids), atol=1e-5)
    reserved = tuple(range(rows - 16, rows))
    assert_near(runtime.reserved_logits(hidden, reserved, None), whole[..., -16:], atol=1e-5)
    virtual = tuple(range(rows, rows + 16))
    assert not runtime.reserved_logits(hidden, virtual, None).any()
    assert runtime.reserved_logits(hidden, virtual, torch.ones(16, hidden.shape[-1])).any()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(5, -1), (5, 64), (1 << 40,)])
def test_ids_without_an_embedding_row_are_refused(
    models: dict[str, Path], ids: tuple[int, ...]
) -> None:
    """An id past the table is an index error that would kill the whole batch."""
    with pytest.raises(InvalidRequestError, match="token_ids"):
        ModelRuntime.load(str(models["slm"])).check_ids(ids)


def test_unknown_layer_types_are_refused(models: dict[str, Path]) -> None:
    """A model with layers we cannot mask (Mamba, chunked attention) would run and be wrong."""
    model = AutoModelForCausalLM.from_pretrained(models["slm"])
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelLoadError, match="chunked_attention"):
        ModelRuntime(model, "", frozenset())
