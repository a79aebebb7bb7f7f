"""The training job on Ray Train, the gate, and following the lake."""

import os

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # read when ray.train is imported
