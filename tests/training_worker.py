"""One process of a distributed training test: `torchrun ... tests/training_worker.py FOLDER JSON`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from training_cases import options, points, tiny_model

from training import DSM, Adaptive, LikelihoodWeighting, TrainingError, process_group, train


def digest(model):
    sha = hashlib.sha256()
    for p in model.parameters():
        value = p.full_tensor() if hasattr(p, "full_tensor") else p
        sha.update(value.detach().numpy().tobytes())
    return sha.hexdigest()


def work(folder, settings, group):
    torch.set_num_threads(1)
    poison = settings.pop("poison", None)
    act = settings.pop("act", None)
    resume = settings.pop("resume", False)
    adaptive = settings.pop("adaptive", False)
    model = tiny_model(wild=True)
    if act:
        rank, step, action = act
        once = folder / f"acted_{step}"
        inner = model.noise

        def noise(*args):  # called at every step in every process
            noise.calls += 1
            if group.rank == rank and noise.calls == step and not once.exists():
                once.write_text("")
                os.kill(os.getpid(), signal.SIGKILL if action == "kill" else getattr(signal, action))
            return inner(*args)

        noise.calls = 0
        model.noise = noise
    if poison is not None:
        rank, step = poison
        inner_noise = model.noise
        calls = iter(range(10**6))

        def bad(*args):
            value = inner_noise(*args)
            return value * float("nan") if next(calls) == step and group.rank == rank else value

        model.noise = bad
    objective = DSM(weighting=LikelihoodWeighting(), times=Adaptive()) if adaptive else DSM()
    try:
        result = train(
            model, points(labels=None), None, options(**settings), objective=objective, folder=folder, resume=resume
        )
        report = {"losses": result.losses, "digest": digest(model), "steps": result.steps}
    except TrainingError as error:
        report = {
            "error": type(error).__name__,
            "message": str(error),
            "digest": digest(model),
            "code": error.exit_code,
        }
    (folder / f"report_{group.rank}.json").write_text(json.dumps(report))
    return report.get("code", 0)


def main():
    folder = Path(sys.argv[1])
    with process_group() as group:
        return work(folder, json.loads(sys.argv[2]), group)


if __name__ == "__main__":
    sys.exit(main())
