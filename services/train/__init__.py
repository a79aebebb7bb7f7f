"""The training job on Ray Train, the gate, and following the lake."""
