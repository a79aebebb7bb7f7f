"""One causal language model: weights, attention, KV pool, adapters, tokenizer. Knows no policy and
no requests."""
