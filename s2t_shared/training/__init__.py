"""Distils a local selector from labels."""
