"""How many random examples do the tests draw? The environment variable HYPOTHESIS_PROFILE says: ci or nightly."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# The tests run in several processes and their tensors are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# Layers draw their weights when they are made, some while the tests are collected: every run sees the same ones.
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_weights_in_every_run() -> None:
    torch.manual_seed(0)


# What somebody has calibrated on this machine must not decide what the tests see; subprocesses inherit this.
_CACHE = tempfile.TemporaryDirectory(prefix="rgc-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Models are slow to build, and the first call of an operator is slower than the next: neither is a fault of a test.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=_SLOW
)
settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
