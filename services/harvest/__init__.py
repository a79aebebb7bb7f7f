"""Labels from training prompts."""
