"""Several processes, started by torchrun: each takes its share of every batch, and all hold the same parameters.

Every process draws the random numbers of the whole batch and takes its rows of them, so that a run does not depend on
how many processes share it, rounding apart; gradients are averaged by torch's DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PROCESS_PATIENCE = timedelta(seconds=60)  # that a process waits for the others


class Workers:
    """The processes of a job: how many, and which this one is; a job of one needs no torch.distributed."""

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu"):
        self.rank, self.count, self.device = rank, count, device  # device: where sums are taken

    @property
    def first(self) -> bool:
        """Whether this one reports and writes."""
        return self.rank == 0

    def share(self, rows: Tensor, axis: int = 0) -> Tensor:
        """This process's rows."""
        index = torch.arange(self.rank, rows.shape[axis], self.count, device=rows.device)
        return rows if self.count == 1 else rows.index_select(axis, index)

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.count == 1:
            return values
        shared = values.to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.to(values.device)

    def gathered(self, rows: Tensor, size: int) -> Tensor:
        """The rows (size, ...) of which each process has its :meth:`share`, in their order."""
        if self.count == 1:
            return rows
        whole = rows.new_zeros(size, *rows.shape[1:])
        whole[self.rank :: self.count] = rows
        return self.total(whole)

    def module(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over processes."""
        return module if self.count == 1 else DistributedDataParallel(module)


ALONE = Workers()


@contextlib.contextmanager
def workers() -> Iterator[Workers]:
    """The processes that torchrun has started, or this one alone.

    Raises LostWorker, in one line, where another process has ended or does not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend, device = ("nccl", "cuda") if torch.cuda.is_available() else ("gloo", "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=PROCESS_PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # none leaves while another still listens to it
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        lost = f"process {dist.get_rank()} of {dist.get_world_size()} lost another one"
        raise LostWorker(f"{lost}; go on from the last checkpoint by --resume") from None
    finally:
        dist.destroy_process_group()


class LostWorker(RuntimeError):
    """Another process of the job has ended or does not answer."""
