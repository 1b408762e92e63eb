"""Fast dropout on the CPU. It uses 16 random bits per number, from numpy's generator instead of torch's."""

import math

import numpy as np
import torch
from torch import Tensor, nn


def keep_mask(shape: tuple[int, ...], probability: float, device: torch.device) -> Tensor:
    """A dropout mask: True for each number that is kept, bool [shape].

    On the CPU this is ten times as fast as torch.rand. torch's generator draws the seed for numpy's generator, so
    torch's seed and state determine the result.
    """
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= probability
    generator = np.random.SFC64(int(torch.randint(2**62, ())))
    size = math.prod(shape)
    drawn = generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
    return torch.from_numpy(drawn >= round(probability * (1 << 16))).view(shape)


def forward(module: nn.Dropout, x: Tensor) -> Tensor:
    """`nn.Dropout.forward`, float [...] -> float [...]."""
    if not module.training or not module.p or x.device.type != "cpu":
        return nn.Dropout.forward(module, x)
    kept = keep_mask(x.shape, module.p, x.device).numpy()
    return x * torch.from_numpy(np.multiply(kept, np.float32(1 / (1 - module.p)), dtype=np.float32))
