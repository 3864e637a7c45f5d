"""Threads: the tests run in two processes on two cores, so each keeps to one thread. Seeds: fresh weights are drawn from
torch's global generator, so that is set before each test, which then does not depend on those before it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
