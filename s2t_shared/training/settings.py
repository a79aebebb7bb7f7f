"""Every setting of `s2t train`, with its default, its range and what it does.

Inert data: nothing here imports torch, so that a configuration can be read anywhere.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from s2t_shared.errors import ConfigError
from s2t_shared.types import Reading, Scoring, SelectorKind

# Settings that leave the trained weights as they are, so that runs which differ only in these may
# share a checkpoint.
WORKERS = ("workers", "gpus_per_worker", "cpus_per_worker", "sharding")
GATE = (
    "gate_problems",
    "gate_problem_count",
    "gate_budget",
    "gate_prompt_count",
    "gate_max_lm_kl",
    "gate_max_task_loss",
    "gate_min_groups",
)


class Objective(str, Enum):
    """What training minimises."""

    TOP1_CE = "top1_ce"  # cross-entropy of the LLM's choice, a hinge, and the listwise KL
    KL = "kl"  # the listwise KL alone
    PAIRWISE_MARGIN = "pairwise_margin"  # a hinge over all pairs that the LLM ranks
    PLAIN = "plain"  # distillation of the SLM itself, without a local selector: the control


class MarginFilter(str, Enum):
    """How the LLM's margin, its best candidate's probability minus its second's, counts."""

    NONE = "none"  # not at all
    WEIGHT = "weight"  # labels below `min_margin` are left out, the others weighted by it
    DROP = "drop"  # labels below `min_margin` are left out


class TrainingSettings(BaseModel):
    """Settings of one training run, of its workers and of the gate that judges its version.

    loss = selection loss + reg_weight * regulariser; the selection loss of `top1_ce` is
    ce_weight * cross-entropy + hinge_weight * hinge + kl_weight * listwise KL.

    Raises:
        ConfigError: two settings contradict each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- the local selector -----------------------------------------------------------------------

    kind: SelectorKind = Field(SelectorKind.PREFIX, description="which tokens are scored")
    reads: Reading = Field(
        Reading.BASE, description="base: over the base model's KV; adapted: over the adapter's own"
    )
    scoring: Scoring = Field(Scoring.EXPECTED, description="how reserved logits become a score")
    standardise: bool = Field(
        False, description="reserved scores to mean 0, variance 1 over a context's candidates"
    )
    fusion: bool = Field(
        False, description="choose lambda, the weight of the SLM's log-probability in the score"
    )
    rank: int = Field(16, ge=1, description="of the LoRA adapter")
    alpha: float = Field(32.0, gt=0, description="of the LoRA adapter; its scale is alpha / rank")
    temperature: float = Field(0.1, gt=0, description="T of the reserved score")
    reserved_init_scale: float = Field(
        1.0, ge=0, description="random start of the reserved rows, in deviations of the head's rows"
    )
    init_from: str = Field(
        "", description="start from this version's weights, or from the 'live' one's"
    )

    # -- the loss ---------------------------------------------------------------------------------

    objective: Objective = Field(Objective.TOP1_CE, description="what training minimises")
    ce_weight: float = Field(1.0, ge=0, description="of the cross-entropy")
    kl_weight: float = Field(0.5, ge=0, description="of the listwise KL")
    hinge_weight: float = Field(0.1, ge=0, description="of the hinge")
    hinge_margin: float = Field(0.1, ge=0, description="in units of the selection logits")
    reg_weight: float = Field(
        0.1, ge=0, description="of KL(adapted || base) of the language model; reads: adapted"
    )
    teacher_temperature: float = Field(
        1.0, gt=0, description="of the LLM's distribution over the candidates"
    )
    teacher_margin: MarginFilter = Field(
        MarginFilter.NONE, description="what a small margin of the LLM does to a label"
    )
    margin_power: float = Field(
        1.0, ge=0, description="weight: a label counts (margin + margin_eps) ** margin_power"
    )
    margin_eps: float = Field(1e-3, ge=0, description="see margin_power")
    min_margin: float = Field(
        0.0, ge=0, le=1, description="weight, drop: labels with a smaller margin are left out"
    )
    min_mass: float = Field(
        1e-3,
        ge=0,
        le=1,
        description="labels with less LLM probability on the candidates are left out",
    )

    # -- the loop ---------------------------------------------------------------------------------

    steps: int = Field(1000, ge=1, description="optimizer steps at most")
    batch_labels: int = Field(64, ge=1, description="labels per step, of all workers together")
    max_tokens: int = Field(
        16_384, ge=1, description="tokens of one forward; more of a batch is accumulated"
    )
    learning_rate: float = Field(3e-4, gt=0, description="the peak")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate decays, to a tenth of the peak"
    )
    warmup_share: float = Field(0.05, ge=0, le=1, description="of the steps")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="larger gradients are scaled down")
    validate_every: int = Field(0, ge=0, description="steps; 0: a tenth of all")
    patience: int = Field(3, ge=1, description="validations without improvement before stopping")
    checkpoint_every: int = Field(100, ge=1, description="steps")
    held_out_labels: int = Field(
        4096, ge=1, description="to validate on, and as many to test on, at most"
    )
    context_cache_gib: float = Field(
        2.0, ge=0, description="reads: base, unsharded: memory for contexts that are read once"
    )
    seed: int = Field(0, description="of the initial weights and of the order of the labels")

    # -- the workers ------------------------------------------------------------------------------

    workers: int = Field(1, ge=1, description="Ray Train workers")
    gpus_per_worker: float = Field(0.0, ge=0, description="0: training runs on CPUs")
    cpus_per_worker: float = Field(0.5, gt=0, description="that Ray reserves")
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="fsdp: each worker holds a part of the SLM's layers"
    )

    # -- the gate ---------------------------------------------------------------------------------

    gate_problems: Path | None = Field(
        None,
        description='JSONL of training problems with "answer"; None: the bundled '
        "ones with the bundled SLM, else no task set",
    )
    gate_problem_count: int = Field(100, ge=0, description="problems of the task set at most")
    gate_budget: float = Field(
        0.05, gt=0, le=1, description="share of steps that may trigger on the task set"
    )
    gate_prompt_count: int = Field(
        200, ge=0, description="held-out prompts whose answers the LLM judges, at most"
    )
    gate_max_lm_kl: float = Field(0.1, gt=0, description="nats per token")
    gate_max_task_loss: float | None = Field(
        None, ge=0, le=1, description="None: only a significant loss is refused"
    )
    gate_min_groups: int = Field(
        5, ge=2, description="held-out groups of problems, below which nothing is judged"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> TrainingSettings:
        prefix = self.kind is SelectorKind.PREFIX
        if self.objective is Objective.PLAIN and not (prefix and self.reads is Reading.ADAPTED):
            raise ConfigError(
                "training.objective=plain distils the SLM itself: it needs training.kind=prefix "
                "and training.reads=adapted"
            )
        if prefix and (self.standardise or self.scoring is not Scoring.EXPECTED):
            raise ConfigError(
                "training.scoring and training.standardise change the reserved score, which kind "
                "prefix does not have; choose training.kind=joint or reserved"
            )
        return self

    @property
    def scored_tokens_per_label(self) -> int:
        """About how many tokens a label of 16 candidates adds to a forward, besides its context."""
        siblings = 0 if self.kind is SelectorKind.PREFIX else 16
        return siblings + int(self.reads is Reading.BASE)

    @property
    def device(self) -> str:
        """torch device of a worker."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def context_cache_bytes(self) -> int:
        """Memory for contexts that are read once."""
        return int(self.context_cache_gib * (1 << 30))

    def of_weights(self) -> dict[str, Any]:
        """The settings that decide the trained weights, as JSON values by name.

        The starting weights are not among them: `init_from` may name the live version, which
        changes.
        """
        return self.model_dump(mode="json", exclude={*WORKERS, *GATE, "init_from"})
