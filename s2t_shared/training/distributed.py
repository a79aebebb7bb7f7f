"""What training needs of torch.distributed: who this worker is, how work is shared, sums over all.

Without a process group, a single process is the only worker.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This worker's rank, and the number of workers."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shared_turns(count: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` items this worker does, and whether its result counts.

    All workers do as many, if need be one that another does: with a sharded model a forward needs
    all workers.
    """
    rank, world = rank_and_world()
    for start in range(0, count, world):
        index = start + rank
        yield min(index, count - 1), index < count


def sum_over_workers(values: Tensor, device: torch.device) -> Tensor:
    """The element-wise sum of all workers' `values`, on the CPU. device: what the workers share."""
    if rank_and_world()[1] == 1:
        return values
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()
