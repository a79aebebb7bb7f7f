"""Trains the bundled pair from nothing: `python -m s2t_shared.bundled.train [--out DIR]`.

The pair has one word-level tokenizer, one task (`problems`) and two Llama models. The small one is
stopped while it still guesses at the decision; the larger one has learnt to search. Both are
written as ordinary Hugging Face folders, `slm/` and `llm/`, and served like any other model.

Every problem has the same number of tokens, so a batch needs no padding. Axis names:
B problems, T tokens of prompt + solution + <eos>, P tokens of the prompt, V vocabulary.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from s2t_shared.bundled import PAIR_DIR
from s2t_shared.bundled.problems import DECISION_STEP, NAMES, Problem, is_correct, problems

NUM_RESERVED = 16
MAX_NUMBER = 60
PUNCTUATION = [".", ",", "?", "-", "="]
PROMPT_WORDS = ["Prices", "are", "has", "coins", "Which", "two", "cost"]
SOLUTION_WORDS = ["Let", "us", "see", "takes", "the", "first", "is", "left", "So", "buys", "and"]
REPORT_EVERY = 50
SUPPORT = 64  # ids over which the KL between the two models is taken, as the engine does
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %} {% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model's shape and schedule. Training is one pass over `steps * batch` problems.

    muon_lr: for the matrices of the blocks. adamw_lr: for embeddings, head and norms.
    decay_share: the last part of training, over which the rate falls linearly to zero.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    batch: int
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup: int = 50
    decay_share: float = 0.4


SLM = Recipe(name="slm", hidden=64, layers=3, heads=2, intermediate=176, steps=450, batch=64)
LLM = Recipe(name="llm", hidden=128, layers=4, heads=4, intermediate=336, steps=3000, batch=64)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: splits at whitespace, joins with single spaces, adds nothing of its own."""
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(NUM_RESERVED)]
    numbers = [str(number) for number in range(MAX_NUMBER + 1)]
    words = [
        "<pad>",
        "<eos>",
        *reserved,
        "<unk>",
        *PUNCTUATION,
        *PROMPT_WORDS,
        *SOLUTION_WORDS,
        *NAMES,
        *numbers,
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(batch: Iterable[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, int]:
    """Problems as ids [B, T], and the number of prompt tokens P, which all of them share."""
    vocabulary = tokenizer.get_vocab()
    rows = []
    prompt_lengths = set()
    for problem in batch:
        prompt = problem.prompt.split()
        words = [*prompt, *problem.solution.split(), "<eos>"]
        rows.append([vocabulary[word] for word in words])
        prompt_lengths.add(len(prompt))
    (prompt_length,) = prompt_lengths
    return torch.tensor(rows), prompt_length


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights. Untied: a shared matrix would serve the head and Muon badly."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        initializer_range=recipe.hidden**-0.5 / 2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update is made orthogonal, so that every direction moves equally.

    torch.optim.Muon works in bf16, which takes over a second a step on a CPU. This one stays in
    fp32 and handles all matrices of one shape at once.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                grads = torch.stack([param.grad for param in params if param.grad is not None])
                state = self.state[params[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(grads))
                momentum.lerp_(grads, 1 - group["momentum"])
                updates = orthogonalize(grads.lerp(momentum, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.sub_(update, alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal matrices nearest to matrices [N, rows, columns], roughly.

    5 Newton-Schulz steps, whose coefficients trade exactness for speed: singular values end in
    about 0.7..1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate's factor: linear warm-up, flat, linear decay to zero."""
    left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return min((step + 1) / recipe.warmup, left, 1.0)


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Train one model on fresh problems. The loss covers solutions only: prompts are noise."""
    torch.manual_seed(seed)
    ids, prompt_length = encode(problems("train", recipe.steps * recipe.batch, seed), tokenizer)
    model = build_model(recipe, tokenizer)
    matrices = [param for param in model.model.layers.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if all(param is not m for m in matrices)]
    optimizers = (
        Muon(matrices, lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    base_rates = (recipe.muon_lr, recipe.adamw_lr)
    start = time.monotonic()
    recent = torch.zeros(ids.shape[1] - prompt_length)  # summed losses per solution step
    for step, batch in enumerate(ids.split(recipe.batch)):
        losses = solution_losses(model, batch, prompt_length)
        losses.mean().backward()
        for optimizer, base_rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base_rate * rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        recent += losses.detach().mean(0)
        if (step + 1) % REPORT_EVERY == 0:
            means = recent / REPORT_EVERY
            line = (
                f"{recipe.name} step {step + 1}/{recipe.steps}  loss {means.mean():.4f}  "
                f"at the decision {means[DECISION_STEP]:.3f}  {time.monotonic() - start:.0f} s"
            )
            print(line, flush=True)
            recent.zero_()
    return model.eval()


def solution_losses(model: LlamaForCausalLM, ids: Tensor, prompt_length: int) -> Tensor:
    """Cross-entropy [B, T - P] of every solution token of ids [B, T]."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, prompt_length - 1 :])  # [B, T - P, V]
    targets = ids[:, prompt_length:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@torch.no_grad()
def greedy(model: LlamaForCausalLM, ids: Tensor, prompt_length: int) -> Tensor:
    """Greedy solutions [B, T - P] for the prompts of ids [B, T]. Short: it needs no KV cache."""
    tokens = ids[:, :prompt_length]
    for _ in range(ids.shape[1] - prompt_length):
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, -1]
        tokens = torch.cat([tokens, model.lm_head(hidden).argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompt_length:]


def accuracy(batch: list[Problem], solutions: Tensor, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of right answers among solutions [B, T - P]."""
    texts = tokenizer.batch_decode(solutions, skip_special_tokens=True)
    return sum(map(is_correct, batch, texts)) / len(batch)


@torch.no_grad()
def local_sufficiency(
    slm: LlamaForCausalLM, llm: LlamaForCausalLM, rollouts: Tensor, prompt_length: int
) -> tuple[float, float]:
    """Hit@1 and Hit@8: how often the LLM's top-1 is among the SLM's first 1 and first 8 tokens.

    Measured at the 5 % of steps of the SLM rollouts [B, T] where the two diverge most.
    """
    small = solution_log_probs(slm, rollouts, prompt_length)
    large = solution_log_probs(llm, rollouts, prompt_length)
    support = small.topk(SUPPORT).indices
    p_small = small.gather(-1, support).log_softmax(-1)
    p_large = large.gather(-1, support).log_softmax(-1)
    divergence = (p_small.exp() * (p_small - p_large)).sum(-1).flatten()
    ranks = (support == large.argmax(-1, keepdim=True)).int().argmax(-1).flatten()
    at_top = ranks[divergence.topk(len(divergence) // 20).indices]
    return (at_top < 1).float().mean().item(), (at_top < 8).float().mean().item()


def solution_log_probs(model: LlamaForCausalLM, ids: Tensor, prompt_length: int) -> Tensor:
    """Log-probabilities [B, T - P, V] at every solution token of ids [B, T]."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return logits[:, prompt_length - 1 :].log_softmax(-1)


def report(
    slm: LlamaForCausalLM, llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Print what the pair does on held-out problems."""
    held_out = problems("test", 400)
    ids, prompt_length = encode(held_out, tokenizer)
    by_slm = greedy(slm, ids, prompt_length)
    by_llm = greedy(llm, ids, prompt_length)
    rollouts = torch.cat([ids[:, :prompt_length], by_slm], dim=1)
    hit_1, hit_8 = local_sufficiency(slm, llm, rollouts, prompt_length)
    print(f"{len(held_out)} test problems, greedy:")
    print(f"  slm accuracy {accuracy(held_out, by_slm, tokenizer):.3f}")
    print(f"  llm accuracy {accuracy(held_out, by_llm, tokenizer):.3f}")
    print(f"  top 5 % divergent steps: Hit@1 {hit_1:.3f}, Hit@8 {hit_8:.3f}")


def main() -> None:
    """Train both models, write them, and print how well they do."""
    parser = argparse.ArgumentParser(description="Train the bundled tiny pair from nothing.")
    parser.add_argument("--out", type=Path, default=PAIR_DIR, help="gets the folders slm and llm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    tokenizer = build_tokenizer()
    models: dict[str, LlamaForCausalLM] = {}
    for recipe in (SLM, LLM):
        model = train(recipe, tokenizer, arguments.seed)
        model.save_pretrained(arguments.out / recipe.name)
        tokenizer.save_pretrained(arguments.out / recipe.name)
        models[recipe.name] = model
    report(models["slm"], models["llm"], tokenizer)
    print(f"trained in {time.monotonic() - start:.0f} s, written to {arguments.out}")


if __name__ == "__main__":
    main()
