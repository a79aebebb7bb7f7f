"""Budget -> threshold, measured by running the models on training prompts, and kept in a file for the next start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s2t_shared.decode.generate import GenerateRequest, Generator
from s2t_shared.errors import ConfigError
from s2t_shared.files import write_atomically
from s2t_shared.policy import Calibration
from s2t_shared.types import Answer, Policy, Prompt


def measure_calibration(generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int,
                        with_llm: bool) -> Calibration:
    """Greedy rollouts of training prompts; with an LLM each is scored in one prefill, for the KL thresholds.

    Raises:
        ConfigError: not one prompt could be rolled out.
    """
    requests = (GenerateRequest(f"calibration-{i}", prompt, Policy(), max_new_tokens=max_new_tokens,
                                score_rollout=with_llm, keep_support=True) for i, prompt in enumerate(prompts))
    outcomes = [outcome for _, outcome in generator.generate(requests)]
    answers = [o for o in outcomes if isinstance(o, Answer) and not o.usage.degraded_steps]
    if not answers:
        raise ConfigError(f"calibration failed: none of {len(outcomes)} training prompts could be rolled out "
                          f"({outcomes[0] if outcomes else 'there are none'})")
    return Calibration.measure([answer.steps for answer in answers])


def load_calibration(folder: Path, slm: str, llm: str) -> Calibration | None:
    """What an earlier start measured for this pair of digests, if it is there and readable."""
    try:
        return Calibration.from_json((folder / f"{slm}-{llm or 'none'}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store_calibration(folder: Path, slm: str, llm: str, calibration: Calibration) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{slm}-{llm or 'none'}.json", calibration.to_json())
