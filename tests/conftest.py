"""Threads: the tests run in two processes on two cores, so each keeps to one thread. Seeds: fresh weights are drawn from
torch's global generator, so that is set before each test, which then does not depend on those before it. Ctrl-C: a shell
starts what runs in the background with SIGINT ignored, and programs that the tests start would inherit that."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
