"""Random selectors for tests."""

import torch


def drawn(rank=5, width=256, offsets=31, seed=3) -> dict[str, torch.Tensor]:
    """A selector that changes drafts, with gates of about 1, for the embedded checkpoint where nothing else
    is asked."""
    g = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(width, rank, generator=g) for name in ("front", "behind", "gate")}
    found |= {"gate": 0.1 * found["gate"], "front": 2 * found["front"], "behind": 2 * found["behind"]}
    factors = torch.rand(2, 2, offsets, 2, generator=g) + 0.5
    return found | {"places": torch.randn(2, offsets, rank, generator=g), "calibration": factors}
