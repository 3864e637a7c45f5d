"""What the training tests share: tiny models, data, and digests of checkpoints."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback

import torch
from torch import nn

import models
from data import Split
from numerics import expand_as
from sde_lib import VPSDE
from training import CheckpointFolder, TrainingError, TrainingOptions
from training.checkpoint import tensors


class OracleModel(nn.Module):
    """A noise predictor with the exact score of `oracle`, off by `shift` sigma in every direction of the score."""

    def __init__(self, oracle, sde, shift=0.0):
        super().__init__()
        self.sde, self.exact, self.shift = sde, oracle.score(sde), shift

    def noise(self, x, t, class_label=None):
        return -expand_as(self.sde.sigma(t), x) * self.exact(x, t) + self.shift


def tiny_model(sde=None, dim=2, dropout=0.0, seed=0, wild=False, **options):
    """A score model of a few hundred weights, always the same; `wild` makes it far from the zero it starts at."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DropoutMLP(dim, dropout) if dropout else models.MLP(dim=dim, width=16, depth=1, **options)
        if wild:
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.3)
        return models.ScoreModel(net, sde or VPSDE(), models.Preconditioned(data_std=1.0))


class DropoutMLP(nn.Module):
    def __init__(self, dim, p):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim + 1, 16), nn.SiLU(), nn.Dropout(p), nn.Linear(16, dim))

    def forward(self, x, label, class_label=None):
        return self.body(torch.cat([x.flatten(1), label.unsqueeze(1)], dim=1)).reshape(x.shape)


def points(n=64, dim=2, seed=0, labels=None):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return Split(x, labels, torch.arange(n))


def options(**changes):
    """Short and silent."""
    base = {
        "steps": 10,
        "batch_size": 16,
        "warmup": 3,
        "learning_rate": 1e-2,
        "log_every": 5,
        "progress": False,
        "tensorboard": False,
    }
    return TrainingOptions(**{**base, **changes})


def digest(run):
    """One hash of weights, averages and optimiser of the newest checkpoint, and its step."""
    found = CheckpointFolder(run / "checkpoints").read()
    sha = hashlib.sha256()
    for key in ("model", "ema", "power_ema", "optimizer", "scaler", "objective"):
        for tensor in tensors(found.content[key]):
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest(), found.step


def in_child(work, *, kill_after=None):
    """Runs `work()` in a forked process and returns its exit code (negative: the signal that killed it)."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        except TrainingError as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
