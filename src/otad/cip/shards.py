"""The processes that share the points: who holds which rows, and what they tell each other."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["Shards", "check_on_every_process"]

VISIT = 2**24  # bytes of the rows that one process shows to the others at a time


def check_on_every_process(
    problem: str | None, device: torch.device, process_group: dist.ProcessGroup | None = None
) -> None:
    """Raise on every process where one of them has a problem, so that none waits for the others.

    Raises:
        ValueError: the problem, or that another process has one.
    """
    if process_group is not None:
        found = torch.tensor(float(problem is not None), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=process_group)
        if found and problem is None:
            raise ValueError("what another process passed is not valid; its own error says why")
    if problem is not None:
        raise ValueError(problem)


class Shards:
    """Rows 0 .. n - 1 in blocks: the first with process 0, the next with process 1, and so on.

    All methods are collective: every process of the group calls them in the same order. One process is a group
    of its own, to whom they cost nothing.

    Args:
        rows: the rows of this process, shape (own, d), own >= 1.
        process_group: of `torch.distributed`; None: this process has all rows.

    Attributes:
        rank, world: this process, and their number.
        start, stop: the place of its rows among all.
        n: number of all rows.

    Raises:
        ValueError: a process has no rows, or rows of another width or dtype; on all processes alike.
    """

    def __init__(self, rows: Shaped[Tensor, "own d"], process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.world = 1 if process_group is None else dist.get_world_size(process_group)
        shape = torch.tensor([[len(rows), rows.shape[1], rows.element_size()]], device=rows.device)
        shapes = self._all(shape)
        if len({(part[0, 1].item(), part[0, 2].item()) for part in shapes}) > 1:
            raise ValueError("all processes need rows of one width and one dtype")
        self.counts = [int(part[0, 0]) for part in shapes]
        if min(self.counts) == 0:
            raise ValueError(f"every process needs at least one row; they have {self.counts}")
        self.start = sum(self.counts[: self.rank])
        self.stop = self.start + len(rows)
        self.n = sum(self.counts)

    def owns(self, indices: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Which of the rows are with this process."""
        return (indices >= self.start) & (indices < self.stop)

    def total(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Sum over the processes; may overwrite the tensor."""
        if self.world > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def largest(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Largest over the processes; may overwrite the tensor."""
        if self.world > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def first(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """What process 0 has; may overwrite the tensor."""
        if self.world > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor

    def gather(self, rows: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The rows of all processes, one after the other; each may bring any number of them."""
        if self.world == 1:
            return rows
        counts = [int(count) for count in self._all(torch.tensor([len(rows)], device=rows.device))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self._all(padded), counts, strict=True)])

    def visits(self, *own: Shaped[Tensor, "own ..."]) -> Iterator[tuple[slice, list[Tensor]]]:
        """All rows of some tensors, a block of one process after the other, with the place of each block.

        No process ever holds more than its own rows and one block.
        """
        if self.world == 1:
            yield slice(0, self.n), list(own)
            return
        most = max(1, VISIT // max(1, sum(t[:1].nbytes for t in own)))
        start = 0
        for owner, count in enumerate(self.counts):
            for part in torch.arange(count).split(most):
                low, size = int(part[0]), len(part)
                blocks = [
                    t[low : low + size].contiguous() if owner == self.rank else t.new_empty(size, *t.shape[1:])
                    for t in own
                ]
                for block in blocks:
                    dist.broadcast(block, group=self.process_group, group_src=owner)
                yield slice(start + low, start + low + size), blocks
            start += count

    def check_same(self, tensor: Shaped[Tensor, "..."], name: str) -> None:
        """Raise on every process where they have not all brought the same.

        Raises:
            ValueError: shape, dtype or entries differ.
        """
        if self.world == 1:
            return
        form = torch.tensor([tensor.element_size(), tensor.ndim, len(tensor), tensor.numel()], device=tensor.device)
        same = all(torch.equal(form, other) for other in self._all(form))
        if same:
            own = tensor.detach()
            difference = ~torch.isclose(self.first(own.clone()), own, rtol=0, atol=0, equal_nan=True)
            same = not self.largest(difference.any().to(torch.uint8))
        if not same:
            raise ValueError(f"every process must pass the same {name}")

    def _all(self, tensor: Tensor) -> list[Tensor]:
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=self.process_group)
        return parts
