"""How attention is divided among programs, for each kind of GPU: no larger than its registers and shared memory hold,
as `benchmarks/kernels/gate.py` compiles it ahead of time."""

from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """What a program works on: `queries` by `keys` positions at once, with `warps` warps, loads in `stages` stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Plan:
    """Those of the three kernels with loops: the forward, and the backward of queries and of keys with values. `tma`:
    they load by TMA; `specialised`: the forward has warps that only load."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    tma: bool = False
    specialised: bool = False

    @property
    def of_forward(self) -> dict[str, int]:
        """For its launch."""
        return {**self.forward.options, "TMA": self.tma, "SPECIALISED": self.specialised}

    @property
    def of_queries(self) -> dict[str, int]:
        """For the launch of the backward of queries."""
        return {**self.queries.options, "TMA": self.tma}

    @property
    def of_keys(self) -> dict[str, int]:
        """For the launch of the backward of keys."""
        return {**self.keys.options, "TMA": self.tma}


# Of 16-bit numbers: by target, then by the least power of two that is no less than the head's dimensions, from 64 on.
PLANS = {
    "sm_80": {
        64: Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
        128: Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
        256: Plan(Tiles(64, 64, 8, 1), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1)),
    },
    "sm_90": {
        64: Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), tma=True),
        128: Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2), tma=True),
        256: Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(16, 64, 8, 3), tma=True),
    },
    "sm_100": {
        64: Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 1)),
        128: Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 1)),
        256: Plan(Tiles(128, 32, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 8, 1)),
    },
    "gfx942": {
        64: Plan(Tiles(64, 64, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 64, 4, 1)),
        128: Plan(Tiles(64, 64, 4, 1), Tiles(128, 32, 8, 1), Tiles(32, 64, 4, 1)),
        256: Plan(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1)),
    },
}

# The backward of float32, which is multiplied without tensor cores on NVIDIA's: of queries, and of keys.
FEW, MORE, LONG, LONGEST = Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 64, 8, 1)
FLOAT32 = {
    "sm_80": {64: (MORE, FEW), 128: (MORE, MORE), 256: (FEW, MORE)},
    "sm_90": {64: (FEW, FEW), 128: (Tiles(32, 16, 8, 1), LONGEST), 256: (FEW, LONG)},
    "sm_100": {64: (FEW, FEW), 128: (MORE, LONGEST), 256: (FEW, LONG)},
    "gfx942": {64: (FEW, FEW), 128: (FEW, FEW), 256: (FEW, FEW)},
}

# For sm_90, in the place of PLANS' forwards: one loop with masks for all keys. Nobody has measured yet which is faster.
SPECIALISED = {d: replace(PLANS["sm_90"][d], forward=Tiles(128, 64, 4, 3), specialised=True) for d in (64, 128)}


def plan(d: int, dtype: torch.dtype, window: int, target: str) -> Plan:
    """For heads of d dimensions, on one of `choose.target`'s GPUs."""
    head = max(64, triton.next_power_of_2(d))
    if dtype == torch.float32:
        queries, keys = FLOAT32[target][head]
        return Plan(Tiles(32, 16, 8, 1) if d <= 64 else Tiles(16, 16, 8, 2), queries, keys)
    found = PLANS[target][head]
    fewer = window and found.keys.stages == 2  # the masks take the registers of a load ahead
    return replace(found, keys=replace(found.keys, stages=1)) if fewer else found
