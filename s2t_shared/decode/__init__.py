"""The decode loop: an SLM that proposes, an LLM that selects, and the engine between them."""
