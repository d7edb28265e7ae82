"""Compile kernels for a GPU that is not there, and read what its assembler made of them.

A driver that has no device is set active, so that a kernel's `warmup` goes the very way of a launch, with the same
specialisation, and stops before anything is loaded. It is the process's driver from then on: use a process of its own.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
# Of a multiprocessor and of one block of threads (CUDA C++ Programming Guide, table of compute capabilities).
SHARED = {80: (164 * KIB, 163 * KIB), 90: (228 * KIB, 227 * KIB), 100: (228 * KIB, 227 * KIB)}
REGISTERS, THREADS, BLOCKS = 64 * KIB, 2048, 32  # of a multiprocessor
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel is. `spills`: instructions that keep registers in memory; `blocks`: of threads that one
    multiprocessor holds at once; `wide_loads`: of 16 bytes."""

    target: str
    registers: int
    spills: int
    shared: int
    blocks: int
    tensor_cores: str  # which instructions multiply matrices: wgmma, tcgen05, mma, mfma, or none
    wide_loads: int
    tma: bool
    specialised: bool  # warps have registers of their own number (setmaxnreg)
    atomic: bool  # it changes memory in an order that another run may not have

    def problems(self, dot: bool = False, wide: bool = True, tma: bool = False, specialised: bool = False) -> list[str]:
        """Why it is not fit to be shipped: with what it must have."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.blocks < 1:
            found.append(
                f"a multiprocessor has no room for {self.shared} bytes and {self.registers} registers a thread"
            )
        if self.atomic:
            found.append("atomic operations")
        wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[self.target]
        if dot and self.tensor_cores != wanted:
            found.append(f"matrices are multiplied by {self.tensor_cores}, not by {wanted}")
        if wide and not (self.wide_loads or self.tma):
            found.append("no load of 16 bytes")
        if tma and not self.tma:
            found.append("no TMA")
        if specialised and not self.specialised:
            found.append("warps are not specialised")
        return found

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


class _NoDevice(DriverBase):
    """Triton's compiler asks it for a target; kernels are cached by device number, so each target has its own."""

    def __init__(self, name: str):
        self.target, self.number = TARGETS[name], list(TARGETS).index(name)
        self.utils = self
        super().__init__()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        raise RuntimeError("there is no device")

    def get_device_properties(self, device: int) -> dict:
        shared = SHARED.get(self.target.arch, (0, 64 * KIB))[1]
        return {
            "max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": REGISTERS,
            "warpSize": self.target.warp_size,
        }  # fmt: skip

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name

    get_benchmarker = get_empty_cache_for_benchmark = get_device_interface

    def clear_cache(self, cache: object) -> None:
        """There is none."""


def compiled(kernel: triton.JITFunction, target: str, arguments: tuple, switches: Mapping[str, object]) -> Facts:
    """Compile a kernel as a launch with these arguments would; tensors may be of the device "meta"."""
    driver.set_active(_NoDevice(target))
    found = kernel.warmup(*arguments, **switches, grid=(1,))
    return _of_amd(found) if target == "gfx942" else _of_nvidia(found, target)


def _of_nvidia(found, target: str) -> Facts:
    ptx, arch = found.asm["ptx"], TARGETS[target].arch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _said_by("cuobjdump", "--dump-resource-usage", file.name)
        code = _said_by("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    threads, shared = found.metadata.num_warps * 32, found.metadata.shared
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED[arch][0] // (shared + KIB) if shared <= SHARED[arch][1] else 0
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"(?<!wg)\bmma\.sync"}
    return Facts(
        target=target,
        registers=registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=shared,
        blocks=min(by_registers, by_shared, THREADS // threads, BLOCKS),
        tensor_cores=next((name for name, pattern in kinds.items() if re.search(pattern, ptx)), "none"),
        wide_loads=len(re.findall(r"LDG\.E\S*\.128|LDGSTS\S*\.128", code)),
        tma="cp.async.bulk.tensor" in ptx,
        specialised="setmaxnreg" in ptx,
        atomic=bool(re.search(r"\b(?:atom|red)\.(?:global|relaxed|acq_rel)", ptx)),
    )


def _of_amd(found) -> Facts:
    code = found.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

    registers, shared = number("vgpr_count"), found.metadata.shared
    waves = min(512 // (-(-registers // 8) * 8), 8) * 4  # of the four units of a multiprocessor (CDNA 3)
    return Facts(
        target="gfx942",
        registers=registers,
        spills=number("vgpr_spill_count") + number("private_segment_fixed_size"),  # scalars spill to vector registers
        shared=shared,
        blocks=min(waves // found.metadata.num_warps, 64 * KIB // max(shared, 1)),
        tensor_cores="mfma" if "v_mfma" in code else "none",
        wide_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        tma=False,
        specialised=False,
        atomic=bool(re.search(r"(?:global|buffer|flat)_atomic", code)),
    )


def _said_by(tool: str, *words: str) -> str:
    return subprocess.run([TOOLS / tool, *words], capture_output=True, text=True, check=True).stdout
