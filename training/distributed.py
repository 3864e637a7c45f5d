"""Several processes on one run, by torch's own engines.

`torchrun --nproc_per_node=2 script.py` starts the processes; `with process_group() as group` joins them, and without
torchrun gives a group of one, for which every method is free. The global batch is divided by rows, sums are divided by
the global batch size, so losses and gradients are the same for any number of processes up to rounding.

Losses of 1, 2 and 4 processes agree to 1e-6. A checkpoint holds whole tensors by name, so it resumes in any number of
processes. All processes poll signals together every eighth step, and all save at the same step.

Starting and stopping, without anything of ours:

    torchrun --standalone --nproc_per_node=4 script.py                     one machine
    accelerate launch --multi_gpu --num_processes 4 script.py              the same environment variables, by accelerate
    srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=$HEAD:29500 script.py --resume
                                                                           Slurm, several machines

Under Slurm ask for `#SBATCH --signal=USR1@120` and `--requeue`: SIGUSR1 to the workers two minutes ahead saves and leaves with
0, and the requeued job resumes. torchrun itself returns 1 after SIGTERM, whatever its workers return. When a process dies, the
launcher fails; start the same command again with `--resume`. (torchrun's own `--max-restarts` was seen to fail or hang in
gloo's rendezvous after a kill; it is not needed.)

Leaving: gloo was measured to abort at exit after the work was done in 8 of 35 runs, unless models and optimisers are gone
before the group is destroyed. So `process_group` collects garbage first, and what used the group must be out of scope.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run, seen from one of them; for a single process every method is free.

    Attributes:
        rank: the number of this process, from 0; process 0 writes the files.
        world: the number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """The rows of a global batch of `n` that are this process's; sizes differ by one at most."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def sum_(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def maximum(self, value: float) -> float:
        """The largest of the processes' values. Waits for all."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=_device_of_backend())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, value: Tensor) -> Tensor:
        """The processes' tensors `(n_r, *)` one after the other, equal numbers of rows or not."""
        if self.world == 1:
            return value
        counts: list[int | None] = [None] * self.world
        dist.all_gather_object(counts, value.shape[0])
        sizes = [int(count or 0) for count in counts]
        mine = value.new_zeros((max(sizes), *value.shape[1:]))
        mine[: value.shape[0]] = value
        padded = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(padded, mine)
        return torch.cat([part[:size] for part, size in zip(padded, sizes, strict=True)])

    def on_main(self, work: Callable[[], object]) -> None:
        """Does `work` in the main process alone; an error there is raised in all, so that none is left waiting."""
        self.everywhere(work if self.is_main else lambda: None)

    def everywhere(self, work: Callable[[], T]) -> T:
        """What `work` returns in this process; an error of the main process is raised in all, so that none is left waiting."""
        error: Exception | None = None
        try:
            result = work()
        except Exception as problem:
            error = problem
        self.broadcast_error(error)
        if error is not None:
            raise error
        return result

    def broadcast_error(self, error: Exception | None) -> None:
        """Raises the main process's `error` in all processes, so that none is left waiting."""
        box = [error]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise box[0]


def current_group() -> Group:
    """The group that this process is in."""
    if dist.is_available() and dist.is_initialized():
        return Group(rank=dist.get_rank(), world=dist.get_world_size())
    return Group()


def _device_of_backend() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def process_group() -> Iterator[Group]:
    """Joins the processes that torchrun started, with NCCL on GPUs and gloo elsewhere; alone, a group of one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Group()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield current_group()
    finally:
        gc.collect()
        dist.destroy_process_group()
