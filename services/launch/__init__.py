"""Bringing a service up on this machine or a cluster."""
