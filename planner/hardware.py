"""GPUs and links as data: `hardware/*.toml`, each figure with its source, or a file of one's own in the same form."""

import difflib
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, ValidationError

from armillary.errors import JobError
from armillary.table import Table

FOLDER = Path(__file__).parent / "hardware"
LINKS = "links"
MOST = 10_000_000  # GPUs: more than there are


class Figure(Table):
    """A number, and where it comes from."""

    value: float = Field(ge=0)
    source: str = Field(min_length=1)


class PositiveFigure(Figure):
    value: float = Field(gt=0)


class LinkTable(Table):
    """A link: bandwidth one way for each GPU (GB/s), latency of a message (microseconds)."""

    gb_s: float = Field(gt=0)
    latency_us: float = Field(ge=0)
    source: str = Field(min_length=1)


class Link(NamedTuple):
    """A link in bytes and seconds."""

    bytes_s: float
    latency_s: float


class Gpu(Table):
    """One kind of GPU. Rates are dense peaks; `matmul_share` of them is what large products of matrices reach."""

    name: str = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    link: str = Field(description="between GPUs of a node, of links.toml")
    triton: bool = Field(True, description="our Triton kernels run there; else their references do")
    network: str = Field(description="between nodes, of links.toml")
    host: str = Field(description="to the host's memory, of links.toml")
    memory_gib: PositiveFigure
    bf16_tflops: PositiveFigure
    fp32_tflops: PositiveFigure
    fp8_tflops: Figure = Figure(value=0, source="none")
    matmul_share: PositiveFigure
    attention_forward_tflops: PositiveFigure
    attention_backward_tflops: PositiveFigure
    memory_tb_s: PositiveFigure
    kernel_us: Figure
    power_w: Figure
    price_hour: Figure
    links: dict[str, LinkTable] = Field({}, description="links of its own, by name")


@dataclass(frozen=True)
class Cluster:
    """`gpus` GPUs in nodes of `node_gpus`, as plain numbers. Built by `cluster`, which checks them."""

    name: str
    gpus: int
    node_gpus: int
    triton: bool
    memory_bytes: float  # of one GPU
    bf16: float  # dense peak, FLOP/s; so are the next two
    fp32: float
    fp8: float
    matmul_share: float
    attention_forward: float  # FLOP/s
    attention_backward: float
    memory_bytes_s: float
    kernel_s: float
    power_w: float
    price_hour: float
    link: Link
    network: Link
    host: Link

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of one GPU in "bf16", "fp32" or "fp8"."""
        return getattr(self, precision)

    def matmul(self, precision: str) -> float:
        """FLOP/s that a large product of matrices reaches."""
        return getattr(self, precision) * self.matmul_share

    def of(self, gpus: int, **changes) -> "Cluster":
        """The same machines, another number of them."""
        return replace(self, gpus=gpus, **changes)


@cache
def known_gpus() -> dict[str, Gpu]:
    """The GPUs that come with the package, by name."""
    files = sorted(path for path in FOLDER.glob("*.toml") if path.stem != LINKS)
    return {gpu.name: gpu for gpu in map(read_gpu, files)}


@cache
def known_links() -> dict[str, LinkTable]:
    return {name: LinkTable.model_validate(link) for name, link in _read(FOLDER / f"{LINKS}.toml").items()}


def read_gpu(path: Path) -> Gpu:
    """A GPU from a file; JobError where it cannot be read or a figure is missing, malformed or without its source."""
    try:
        return Gpu.model_validate(_read(path))
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, one['loc']))}: {_reason(one)}" for one in error.errors())
        raise JobError(
            f"the hardware file is not of the right form: {reasons}", path,
            "each figure is a table with value and source; `armillary plan --calibrate --output FILE.toml` writes one",
        ) from None  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, alias or file (anything that ends in .toml); JobError names the nearest."""
    if name.endswith(".toml"):
        return read_gpu(Path(name))
    names = {key.lower(): gpu for gpu in known_gpus().values() for key in (gpu.name, *gpu.aliases)}
    if (gpu := names.get(name.lower())) is not None:
        return gpu
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    meant = f"did you mean {names[near[0]].name}? " if near else ""
    raise JobError(
        f"there is no GPU {name!r}", "--gpu", f"{meant}known are {', '.join(known_gpus())}, or give a file: FILE.toml"
    )


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that PyTorch calls `device`, or None where it is not known. "NVIDIA H100 80GB HBM3" is an H100.

    The longest alias whose words are all in the name wins, so that 40 and 80 GB are told apart.
    """
    words = set(device.lower().replace("-", " ").split())
    known = [(set(key.lower().replace("-", " ").split()), gpu) for gpu in known_gpus().values() for key in _keys(gpu)]
    found = [(len(key), gpu) for key, gpu in known if key <= words]
    return max(found, key=lambda one: one[0])[1] if found else None


def _keys(gpu: Gpu) -> tuple[str, ...]:
    return (gpu.name, *gpu.aliases)


def find_link(name: str, gpu: Gpu, where: str) -> Link:
    """The link of this name, of the GPU's own file or of links.toml; JobError names the nearest."""
    links = known_links() | gpu.links
    if name in links:
        return Link(links[name].gb_s * 1e9, links[name].latency_us * 1e-6)
    near = difflib.get_close_matches(name, links, n=1, cutoff=0.4)
    meant = f"did you mean {near[0]}? " if near else ""
    raise JobError(f"there is no link {name!r}", where, f"{meant}known are {', '.join(links)}")


def cluster(gpu: Gpu, gpus: int, node_gpus: int = 8, interconnect: str = "") -> Cluster:
    """`gpus` of this GPU in nodes of `node_gpus`; fewer GPUs than a node holds are one node.

    interconnect: the link between nodes, if not the GPU's usual one. JobError for numbers that make no sense.
    """
    if not 1 <= gpus <= MOST:
        raise JobError(f"--gpus {gpus} is not a number of GPUs", "command line", f"give one from 1 to {MOST:,}")
    if not 1 <= node_gpus <= 1024:
        raise JobError(f"--node-gpus {node_gpus} is not a number of GPUs of a node", "command line",
                       "give one from 1 to 1,024; most nodes have 8")  # fmt: skip
    if gpus > node_gpus and gpus % node_gpus:
        raise JobError(
            f"{gpus} GPUs do not fill nodes of {node_gpus}", "command line",
            f"--gpus {gpus // node_gpus * node_gpus} would, or set --node-gpus",
        )  # fmt: skip
    return Cluster(
        name=gpu.name,
        gpus=gpus,
        node_gpus=min(gpus, node_gpus),
        triton=gpu.triton,
        memory_bytes=gpu.memory_gib.value * 2**30,
        bf16=gpu.bf16_tflops.value * 1e12,
        fp32=gpu.fp32_tflops.value * 1e12,
        fp8=gpu.fp8_tflops.value * 1e12,
        matmul_share=gpu.matmul_share.value,
        attention_forward=gpu.attention_forward_tflops.value * 1e12,
        attention_backward=gpu.attention_backward_tflops.value * 1e12,
        memory_bytes_s=gpu.memory_tb_s.value * 1e12,
        kernel_s=gpu.kernel_us.value * 1e-6,
        power_w=gpu.power_w.value,
        price_hour=gpu.price_hour.value,
        link=find_link(gpu.link, gpu, gpu.name),
        network=find_link(interconnect or gpu.network, gpu, "--interconnect" if interconnect else gpu.name),
        host=find_link(gpu.host, gpu, gpu.name),
    )


def _read(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise JobError("there is no such hardware file", path, "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the hardware file cannot be read: {error}", path, "check the path and its form") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"the hardware file is not valid TOML: {error}", path, "correct that line") from None


def _reason(problem: dict) -> str:
    return {"missing": "it is missing", "extra_forbidden": "there is no such key"}.get(problem["type"], problem["msg"])
