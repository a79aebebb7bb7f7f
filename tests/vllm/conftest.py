"""The environment of vLLM on a small CPU; set before anything imports vLLM."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="make test-vllm has vLLM")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
