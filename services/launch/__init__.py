"""Bringing a service up on this machine or a cluster."""

import os

# Ray reads these when it is imported, which the modules of this package do.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # Serve logs to files in Ray's session folder
