"""Tokenizers of the two usual families, so small that words and characters are several tokens."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from s2t_shared.model.tokenizer import Tokenizer

CORPUS = [
    "the answer is 3.14 and the end",
    "东京 北京 你好世界",
    "🙂🙃👍🏽 family 👩‍👩‍👧",
    "naïve café the the answer",
] * 3


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE (GPT/Qwen/Llama-3 style) so small that most emoji and hanzi are several
    tokens."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"))


@cache
def metaspace() -> Tokenizer:
    """A SentencePiece-like tokenizer (Llama-2/Gemma style): decoding drops the leading space of a
    text."""
    words = ["<unk>", "<sep>", "\u2581", *(f"\u2581{w}" for w in "abcdefgh"), *"abcdefgh"]
    scores = [(word, -float(len(words) - i)) for i, word in enumerate(words)]
    core = tokenizers.Tokenizer(models.Unigram(scores, 0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", additional_special_tokens=["<sep>"]
        )
    )


def word_level(tokens: list[str]) -> Tokenizer:
    """A tokenizer whose ids are the places of `tokens`; the first stands for unknown words."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, unk_token=tokens[0]))
