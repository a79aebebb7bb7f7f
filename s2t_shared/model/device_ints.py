"""The integers of one forward, sent to the device in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceInts:
    """Lists of integers that are added on the host, then read on the device.

    >>> ints = DeviceInts(torch.device("cpu"))
    >>> positions = ints.add([7, 8])
    >>> ints.send()
    >>> ints[positions].tolist()
    [7, 8]
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._numbers: list[int] = []
        self._lengths: list[int] = []
        self._sent: tuple[Tensor, ...] = ()

    def add(self, numbers: Sequence[int]) -> int:
        """Returns the list's place, by which it is read."""
        assert not self._sent, "sent already"
        self._numbers += numbers
        self._lengths.append(len(numbers))
        return len(self._lengths) - 1

    def send(self) -> None:
        """Start the transfer. Kernels that read the numbers wait for it, the host does not."""
        on_gpu = self.device.type == "cuda"
        host = torch.tensor(self._numbers, dtype=torch.int64, pin_memory=on_gpu)
        self._sent = host.to(self.device, non_blocking=on_gpu).split(self._lengths)

    def __getitem__(self, place: int) -> Tensor:
        """int64 [n] on the device."""
        return self._sent[place]
