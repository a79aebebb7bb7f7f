"""From logits to ids: the most likely, the drawn, and the signals of a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2t_shared import policy
from s2t_shared.decode import reductions
from s2t_shared.decode.interfaces import SamplingInput
from s2t_shared.decode.reductions import draw, signals, top_k
from s2t_shared.types import Sampling, Trigger


@pytest.mark.parametrize("vocabulary", [80, 20000, 49152 + 5])
@pytest.mark.parametrize("excluded", ["none", "some", "nearly all", "clustered"])
def test_top_k_is_torch_topk(vocabulary: int, excluded: str) -> None:
    """The support is what everything is selected from: a lost id is a token that can never be
    chosen."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator) * 4
    if excluded == "some":
        shuffled = torch.randperm(vocabulary, generator=generator)
        logits[:, shuffled[: vocabulary // 9]] = -torch.inf
    elif excluded == "nearly all":
        shuffled = torch.randperm(vocabulary, generator=generator)
        logits[:, shuffled[: vocabulary - 64]] = -torch.inf
    elif excluded == "clustered":
        # All of the best lie in one block, at its end and in the last, ragged one.
        logits[:, -40:] += 100
        logits[:, 3 : 3 + 30] += 90
    values, ids = top_k(logits, 64)
    expected = logits.topk(64)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)
    assert torch.isfinite(values).all()


def test_top_k_of_a_tiny_vocabulary() -> None:
    """A model with fewer ids than the support is wide: all of them, best first."""
    logits = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    values, ids = top_k(logits, 48)
    assert torch.equal(values, logits.sort(descending=True).values)
    assert ids.sort().values.tolist() == [[*range(48)]] * 3


# -- signals --------------------------------------------------------------------------------------


def test_signals_are_the_policys() -> None:
    """Thresholds are calibrated with one and compared with the other."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(6, 64, generator=generator).mul(3).sort(descending=True).values
    log_probs[2, 40:] = -torch.inf  # fewer ids than the support is wide
    wanted = [Trigger.ENTROPY, Trigger.MARGIN, Trigger.ENTROPY, None, Trigger.KL, Trigger.MARGIN]
    found = signals(log_probs, wanted).tolist()
    for row, trigger, value in zip(log_probs.tolist(), wanted, found, strict=True):
        reference = {Trigger.ENTROPY: policy.entropy, Trigger.MARGIN: policy.margin}.get(trigger)
        assert value == pytest.approx(reference(row) if reference else 0.0, abs=1e-12)
    assert signals(log_probs, [Trigger.ENTROPY] * 6)[0] == found[0]


# -- drawing --------------------------------------------------------------------------------------

CUTS = [
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(1.0, top_p=0.8),
    Sampling(2.0, top_p=0.9, top_k=40),
    Sampling(3.0, top_p=0.9999),  # more ids than are looked at first
    Sampling(0.0),
]


def reference_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """float64 [V], by the definition."""
    if sampling.temperature == 0.0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probs = (logits.double() / sampling.temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    before = probs[order].cumsum(0) - probs[order]
    kept = before[ranks] < sampling.top_p
    if sampling.top_k:
        kept &= ranks < sampling.top_k
    return probs * kept / (probs * kept).sum()


@pytest.mark.parametrize("vocabulary", [48, 5000])
@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_drawn_ids_follow_the_distribution(vocabulary: int, sampling: Sampling) -> None:
    """4,000 steps of one row: no id outside the cut, and every likely id as often as it should."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 3
    logits[7] = -torch.inf
    expected = reference_probabilities(logits, sampling)
    steps = 4000
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for start in range(0, steps, 250):
        inputs = [SamplingInput(sampling, step) for step in range(start, start + 250)]
        drawn = draw(logits.expand(250, -1).clone(), inputs)
        counts += torch.bincount(drawn, minlength=vocabulary)
    assert not counts[expected == 0].any()
    deviation = (expected * (1 - expected) / steps).sqrt()
    likely = expected > 5 / steps
    assert ((counts / steps - expected).abs()[likely] <= 5 * deviation[likely]).all()


def test_a_draw_does_not_depend_on_its_batch() -> None:
    """A request's answer must be repeatable beside any other traffic."""
    logits = torch.randn(30, 3000, generator=torch.Generator().manual_seed(1)) * 2
    inputs = [SamplingInput(replace(CUTS[i % len(CUTS)], seed=i), i) for i in range(30)]
    together = draw(logits, inputs).tolist()
    for i in range(30):
        assert draw(logits[i : i + 1], inputs[i : i + 1]).tolist() == together[i : i + 1]


def test_the_last_likely_id_is_drawn_at_the_end_of_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounding must not lead behind the ids that have any probability."""
    monkeypatch.setattr(reductions, "_random_number", lambda drawing: 1.0)
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 400]] = torch.tensor([0.0, 1.0])
    assert draw(logits, [SamplingInput(Sampling(1.0), 0)]).item() == 400
    assert draw(logits, [SamplingInput(Sampling(1.0, top_p=0.99), 0)]).item() == 3
