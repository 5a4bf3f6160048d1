"""Randomness that is a function of what it is for, and so the same in any process, worker and order of calls."""

import hashlib
import json

import torch


def generator_for(seed: int, *what: int | str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, such as `generator_for(seed, epoch, position, "noise")`.

    torch's CPU generator is seeded with 32 bits, so among a hundred thousand generators a pair may be alike by chance. That
    does no harm: such a pair serves samples far apart.
    """
    digest = hashlib.sha256(json.dumps([seed, *what]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
