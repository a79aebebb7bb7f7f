"""Prompts from files, data sets and the hub."""
