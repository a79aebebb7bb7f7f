"""The `s2t` command."""
