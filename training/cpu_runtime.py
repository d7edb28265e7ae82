"""What Megatron-core 0.16.1 needs to run on a CPU-only PyTorch: stand-ins for the few CUDA calls it makes.

What is replaced here raises (or, seeding, does nothing) on a CPU-only PyTorch, so nothing that worked changes; where
CUDA is there, `install` does nothing. The stand-ins record which line of Megatron-core called them, so that a test can
tell when a new version calls something else.
"""

import collections
import contextlib
import functools
import sys

import torch

CPU = torch.device("cpu")
HITS: collections.Counter = collections.Counter()  # (caller's "file:line" in Megatron-core, stand-in) -> calls


def install() -> None:
    """Put the stand-ins in place, once, before a model is built."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_armillary_stand_ins", False):
        return
    torch.cuda._armillary_stand_ins = True
    _replace("current_device", lambda: CPU)
    _replace("synchronize", lambda device=None: None)
    _replace("manual_seed", torch.manual_seed)
    _replace("get_rng_state", lambda device=None: torch.get_rng_state())
    torch.zeros = _on_cpu(torch.zeros)
    _replace_rng_tracker()


def _replace(name: str, stand_in) -> None:
    """Put `stand_in` in place of torch.cuda.`name`."""

    @functools.wraps(stand_in)
    def recorded(*args, **kwargs):
        _record(f"torch.cuda.{name}")
        return stand_in(*args, **kwargs)

    setattr(torch.cuda, name, recorded)


def _record(what: str) -> None:
    frame = sys._getframe(2)
    _, separator, inside = frame.f_code.co_filename.partition("megatron/core/")
    if separator:
        HITS[f"{inside}:{frame.f_lineno}", what] += 1


def _on_cpu(factory):
    """A tensor factory that takes a literal device="cuda" for the CPU."""

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            _record(f"torch.{factory.__name__}")
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _replace_rng_tracker() -> None:
    """Megatron-core's tracker of named random states, on the CPU's generator instead of a GPU's."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CPURngStatesTracker(megatron_random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name=megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker = CPURngStatesTracker
