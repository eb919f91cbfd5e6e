"""Random numbers that are the same in all processes and sessions."""

from __future__ import annotations

import zlib

import torch


def stable_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and a name, such as a module's, alone.

    torch's generator on the CPU looks at the low 32 bits of its seed only, so both must be in there.
    """
    mixed = (seed * 0x9E3779B1) ^ zlib.crc32(name.encode())
    return torch.Generator().manual_seed(mixed & 0xFFFFFFFF)
