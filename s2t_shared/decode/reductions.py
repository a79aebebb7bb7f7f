"""From logits to what a step decides on: first choices, supports, signals and drawn ids.

Everything is reduced on the logits' device, for all rows at once. A row's result does not depend
on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from s2t_shared.decode.interfaces import NextTokenInput, Proposal, SamplingInput
from s2t_shared.types import Support, Trigger

TOP_BLOCK = 128  # the vocabulary is searched in blocks of so many ids
NUCLEUS_IDS = 256  # top_p is looked for among so many ids before the whole vocabulary is sorted

# -- proposals ------------------------------------------------------------------------------------


def read_proposals(
    logits: Tensor, inputs: Sequence[NextTokenInput], support_size: int
) -> list[Proposal]:
    """Reduce [n, V] logits, -inf at what is never generated, to what each input asks for.

    There is one transfer to the host.
    """
    best = top_1(logits)
    wanting = [i for i, item in enumerate(inputs) if item.wants_support]
    drawing = [i for i, item in enumerate(inputs) if item.sampling is not None]
    parts = [best.double()]
    if wanting:
        triggers = [inputs[i].signal for i in wanting]
        parts += _supports(_rows(logits, wanting), triggers, support_size)
    if drawing:
        sampling = [item.sampling for item in inputs if item.sampling is not None]
        parts.append(draw(_rows(logits, drawing), sampling).double())
    numbers = iter(torch.cat(parts).tolist())
    top_ids = [int(top_id) for top_id in islice(numbers, len(inputs))]
    found: list[float | None] = [None] * len(inputs)
    readers: list[Callable[[], Support] | None] = [None] * len(inputs)
    drawn: list[int | None] = [None] * len(inputs)
    for i, signal in zip(wanting, list(islice(numbers, len(wanting))), strict=True):
        if inputs[i].signal in SIGNALS:
            found[i] = signal
    for i in wanting:
        ids = list(islice(numbers, support_size))
        log_probs = list(islice(numbers, support_size))
        readers[i] = partial(_support, top_ids[i], ids, log_probs)
    for i, drawn_id in zip(drawing, numbers, strict=True):
        drawn[i] = int(drawn_id)
    return [
        Proposal(top_id=top_id, drawn_id=drawn_id, signal=signal, read_support=reader)
        for top_id, drawn_id, signal, reader in zip(top_ids, drawn, found, readers, strict=True)
    ]


def _supports(
    logits: Tensor, triggers: Sequence[Trigger | None], support_size: int
) -> list[Tensor]:
    """Of [n, V] logits: the signals [n], then [n * 2 S] ids and log-probabilities by row."""
    norm = logits.logsumexp(-1, keepdim=True)
    values, ids = top_k(logits, support_size)
    log_probs = values - norm
    rows = torch.cat([ids.double(), log_probs.double()], dim=1)
    return [signals(log_probs, triggers), rows.flatten()]


def _support(top_id: int, numbers: list[float], log_probs: list[float]) -> Support:
    """Best first. Among equals (common in bfloat16) the first choice stays first."""
    ids = list(map(int, numbers))
    log_probs = list(log_probs)
    if ids[0] != top_id:
        assert top_id in ids
        at = ids.index(top_id)
        ids.insert(0, ids.pop(at))
        log_probs.insert(0, log_probs.pop(at))
    return Support(tuple(ids), tuple(log_probs))


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


# -- first choices --------------------------------------------------------------------------------


def top_1(logits: Tensor) -> Tensor:
    """The first greatest id of each row of [n, V]: by blocks, on CPU several times as fast as
    argmax."""
    n, v = logits.shape
    if v % TOP_BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(n, -1, TOP_BLOCK)
    best = blocks.amax(-1).argmax(-1)
    rows = torch.arange(n, device=logits.device)
    return best * TOP_BLOCK + blocks[rows, best].argmax(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of [n, V], best first, by way of each block's maximum.

    The top k lie in the k blocks with the greatest maxima: one pass over V instead of a selection
    over it.
    """
    n, v = logits.shape
    if v <= 2 * k * TOP_BLOCK:
        values, ids = logits.topk(k)
        return values, ids
    blocks = _blocks(logits, -torch.inf)
    best = blocks.amax(-1).topk(k).indices
    candidates = blocks.gather(1, best[..., None].expand(-1, -1, TOP_BLOCK)).flatten(1)
    values, at = candidates.topk(k)
    return values, best.gather(1, at // TOP_BLOCK) * TOP_BLOCK + at % TOP_BLOCK


def _blocks(rows: Tensor, padding: float) -> Tensor:
    """[n, V] -> [n, blocks, TOP_BLOCK]."""
    n, v = rows.shape
    return F.pad(rows, (0, -v % TOP_BLOCK), value=padding).view(n, -1, TOP_BLOCK)


# -- signals --------------------------------------------------------------------------------------


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)


def _margin(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    second = p[:, 1] if p.shape[1] > 1 else 0.0
    return 1.0 - (p[:, 0] - second)


# Of log-probabilities [n, S], best first, renormalised on the support: `policy`'s, by row.
SIGNALS: Mapping[Trigger, Callable[[Tensor], Tensor]] = {
    Trigger.ENTROPY: _entropy,
    Trigger.MARGIN: _margin,
}


def signals(log_probs: Tensor, triggers: Sequence[Trigger | None]) -> Tensor:
    """Each row's signal, float64 [n]; 0 where its trigger has none of SIGNALS.

    log_probs: [n, S], of the support, best first.
    """
    rows = log_probs.double()
    found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    if SIGNALS.keys().isdisjoint(triggers):
        return found
    log_p = rows - rows.logsumexp(-1, keepdim=True)
    for trigger, signal in SIGNALS.items():
        wanting = [i for i, wanted in enumerate(triggers) if wanted is trigger]
        if len(wanting) == len(triggers):
            return signal(log_p)
        if wanting:
            found[wanting] = signal(log_p[wanting])
    return found


# -- drawing --------------------------------------------------------------------------------------


def draw(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """One id per row of [n, V], after temperature, top-k and top-p: int64 [n].

    A row's random number depends on its seed and step only. Cuts act on the whole vocabulary's
    probabilities: top_p counts what top_k left as it was, not renormalised.
    """
    n = len(inputs)
    drawn = torch.empty(n, dtype=torch.int64, device=logits.device)
    greedy = [i for i, item in enumerate(inputs) if item.sampling.temperature <= 0.0]
    if greedy:
        drawn[greedy] = top_1(logits[greedy])
    random = [i for i in range(n) if inputs[i].sampling.temperature > 0.0]
    cut = [i for i in random if _is_cut(inputs[i])]
    uncut = [i for i in random if not _is_cut(inputs[i])]
    for members, draw_rows in ((cut, _draw_cut), (uncut, _draw_uncut)):
        if members:
            group = [inputs[i] for i in members]
            temperatures = _column([item.sampling.temperature for item in group], logits)
            scaled = logits[members] / temperatures
            points = torch.tensor([[_random_number(item)] for item in group], dtype=torch.float64)
            drawn[members] = draw_rows(scaled, group, points.to(logits.device))
    return drawn


def _is_cut(drawing: SamplingInput) -> bool:
    return drawing.sampling.top_k > 0 or drawing.sampling.top_p < 1.0


def _random_number(drawing: SamplingInput) -> float:
    """In [0, 1), of the sequence's seed and step."""
    seed = hash((drawing.sampling.seed, drawing.step)) & 0x7FFFFFFFFFFFFFFF
    generator = torch.Generator().manual_seed(seed)
    return float(torch.rand(1, generator=generator, dtype=torch.float64))


def _draw_uncut(scaled: Tensor, inputs: Sequence[SamplingInput], points: Tensor) -> Tensor:
    """From all ids. One pass over V: first a block is drawn, then an id in it."""
    probs = _blocks(scaled.softmax(-1), 0.0)
    masses = probs.sum(-1).double()
    block, rest = _draw_index(masses, points * masses.sum(-1, keepdim=True))
    chosen = probs.gather(1, block[:, :, None].expand(-1, -1, TOP_BLOCK))[:, 0]
    index, _ = _draw_index(chosen.double(), rest)
    return (block * TOP_BLOCK + index)[:, 0]


def _draw_cut(scaled: Tensor, inputs: Sequence[SamplingInput], points: Tensor) -> Tensor:
    """From the best ids. Rows whose nucleus has more than NUCLEUS_IDS sort the vocabulary."""
    vocabulary = scaled.shape[1]
    top_ks = [item.sampling.top_k or vocabulary for item in inputs]
    top_ps = _column([item.sampling.top_p for item in inputs], scaled).double()
    wanted = max(NUCLEUS_IDS, *(k for k in top_ks if k < vocabulary), 1)
    kept = min(wanted, vocabulary)
    norm = scaled.logsumexp(-1, keepdim=True)
    values, ids = top_k(scaled, kept)
    probs = (values - norm).double().exp()
    unlimited = torch.tensor(top_ks, device=scaled.device)[:, None] > kept
    if bool((unlimited & (probs.sum(-1, keepdim=True) < top_ps)).any()):
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        probs = (values - norm).double().exp()
    ranks = torch.arange(probs.shape[1], device=scaled.device)
    limits = torch.tensor(top_ks, device=scaled.device)[:, None]
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((ranks >= limits) | (before >= top_ps), 0.0)
    index, _ = _draw_index(probs, points * probs.sum(-1, keepdim=True))
    return ids.gather(1, index)[:, 0]


def _draw_index(masses: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where each point lies in its row's cumulated masses, and how far behind that place's start.

    masses: float64 [n, m]. points: float64 [n, 1], from 0 to the row's sum. Returns [n, 1] each.
    """
    cumulated = masses.cumsum(-1)
    index = torch.searchsorted(cumulated, points, right=True)
    # Rounding may put a point behind the last place that has any mass.
    last = (cumulated < cumulated[:, -1:]).sum(-1, keepdim=True)
    index = index.minimum(last)
    start = cumulated.gather(1, index) - masses.gather(1, index)
    return index, (points - start).clamp(min=0.0)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """float32 [n, 1] on the device of `like`."""
    return torch.tensor(numbers, dtype=torch.float32, device=like.device)[:, None]
