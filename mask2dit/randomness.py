"""Random generators keyed by their purpose, so that they are equal in any process, worker and order of calls."""

import hashlib
import json

import torch


def generator_for(seed: int, *what: int | str) -> torch.Generator:
    """Returns a CPU generator that depends on its arguments alone, as in `generator_for(seed, epoch, position, "noise")`.

    torch's CPU generator is seeded with 32 bits, so among a hundred thousand generators two may be equal by chance. This is
    harmless, since such a pair serves samples far apart.
    """
    digest = hashlib.sha256(json.dumps([seed, *what]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
