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


@pytest.fixture(scope="module")
def loose_pilots():
    """Where the stages of a run are tested, and not its numbers: the flow of a network that is as good as untrained is rough,
    and placing the likelihood's steps would take up to 1,806 evaluations. Loosely, as in a dry run, it takes 240 at most."""
    from workflow import dry_run, score

    pilot_grid = score.pilot_grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            score, "pilot_grid", lambda *more, attempts, **named: pilot_grid(*more, attempts=dry_run._PILOTS, **named)
        )
        yield
