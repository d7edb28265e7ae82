"""This machine as a hardware file: its rates measured, in a minute or so. PyTorch is imported by what measures."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from armillary.planner.hardware import gpu_of_device

MATRICES = {"cuda": (2048, 4096, 8192), "cpu": (256, 512, 1024)}
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes
ATTENDED = {"cuda": (4096, 16, 128), "cpu": (1024, 4, 64)}  # positions, heads, dimensions
SENT = {"cuda": 2**28, "cpu": 2**24}  # bytes
MESSAGES = 30  # small ones, for the latency
LEAST_SECONDS = 0.3  # that a rate is taken over


def measure(say: Callable[[str], None] = lambda line: None) -> dict:
    """The tables of a hardware file (planner.hardware.Gpu) of this machine's first GPU, or of its processors."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = gpu_of_device(torch.cuda.get_device_name()) if device == "cuda" else None
    source = f"measured on {socket.gethostname()}, {time.strftime('%Y-%m-%d')}, by armillary plan --calibrate"
    rates = {name: _products(dtype, device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    say(f"products of matrices: {rates['bf16']:.4g} TFLOP/s in bf16, {rates['fp32']:.4g} in fp32")
    copied = _copies(device)
    say(f"memory: {copied / 1e12:.4g} TB/s")
    forward, backward = _attention(device)
    say(f"attention: {forward:.4g} TFLOP/s forward, {backward:.4g} backward")
    kernel = _kernel(device)
    say(f"starting a kernel: {kernel * 1e6:.3g} microseconds")
    link, latency = _link(device)
    say(f"between two processes: {link / 1e9:.4g} GB/s, {latency * 1e6:.4g} microseconds")

    def figure(value: float, where: str = source) -> dict:
        return {"value": float(f"{value:.4g}"), "source": where}

    peak = known.bf16_tflops.value if known else rates["bf16"]
    if device == "cpu":  # attention was measured in fp32, and stands in the file for bf16
        forward, backward = (rate * rates["bf16"] / rates["fp32"] for rate in (forward, backward))
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _host_memory()
    return {
        "name": f"{socket.gethostname()}-{device}",
        "link": "measured",
        "network": "measured",
        "host": "measured",
        "triton": device == "cuda",
        "memory_gib": figure(memory / 2**30),
        "bf16_tflops": figure(peak, known.bf16_tflops.source if known else source),
        "fp32_tflops": figure(rates["fp32"] / (rates["bf16"] / peak)),
        "matmul_share": figure(rates["bf16"] / peak),
        "attention_forward_tflops": figure(forward),
        "attention_backward_tflops": figure(backward),
        "memory_tb_s": figure(copied / 1e12),
        "kernel_us": figure(kernel * 1e6),
        "power_w": figure(known.power_w.value if known else 0, known.power_w.source if known else "not measured"),
        "price_hour": figure(known.price_hour.value if known else 0, known.price_hour.source if known else "unknown"),
        "links": {
            "measured": {"gb_s": float(f"{link / 1e9:.4g}"), "latency_us": float(f"{latency * 1e6:.4g}"),
                         "source": source},
        },
    }  # fmt: skip


def write(tables: dict, path: Path) -> None:
    """Write a hardware file that `--gpu FILE.toml` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(tables))


def default_path() -> Path:
    """Where a calibration is kept if nobody says where."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "armillary" / "hardware" / f"{socket.gethostname()}.toml"


def _host_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of one call: the best of three batches of calls, each of LEAST_SECONDS / 3 at least."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    wait()
    best, calls = float("inf"), 1
    for _ in range(3):
        while True:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            spent = time.perf_counter() - begin
            if spent >= LEAST_SECONDS / 3:
                break
            calls *= 2
        best = min(best, spent / calls)
    return best


def _products(dtype, device: str) -> float:
    """TFLOP/s of the fastest size of square matrices."""
    import torch

    rates = []
    for size in MATRICES[device]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device) / 1e12)
    return max(rates)


def _copies(device: str) -> float:
    """Bytes read and written a second."""
    import torch

    there = torch.empty(COPIED[device] // 4, device=device).normal_()
    to = torch.empty_like(there)
    return 2 * COPIED[device] / _seconds(lambda: to.copy_(there), device)


def _attention(device: str) -> tuple[float, float]:
    """TFLOP/s of causal attention (forward, backward); the pairs that are masked do not count."""
    import torch
    import torch.nn.functional as F

    positions, heads, width = ATTENDED[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, heads, positions, width, device=device, dtype=dtype) for _ in range(3))
    done = 4 * heads * width * positions**2 / 2
    forward = _seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    given = torch.randn_like(out)
    backward = _seconds(lambda: torch.autograd.grad(out, inputs, given, retain_graph=True), device)
    return done / forward / 1e12, 2.5 * done / backward / 1e12


def _kernel(device: str) -> float:
    """Seconds that an operation on next to nothing takes, with the record for its gradient."""
    import torch

    x = torch.ones(8, device=device, requires_grad=True)
    return _seconds(lambda: x * 2.0, device)


def _link(device: str) -> tuple[float, float]:
    """(bytes a second one way, seconds of a small message) of a ring between two processes: gloo, or NCCL where there
    are two GPUs."""
    import torch
    import torch.multiprocessing as processes

    kind = "cuda" if device == "cuda" and torch.cuda.device_count() > 1 else "cpu"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = processes.get_context("spawn")
    results = context.SimpleQueue()
    processes.start_processes(_exchange, (kind, port, results), nprocs=2, start_method="spawn")
    return results.get()


def _exchange(rank: int, kind: str, port: int, results) -> None:
    """One of two processes: an all-reduce moves its bytes once over each link, both ways."""
    import torch
    import torch.distributed as dist

    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    large = torch.ones(SENT[kind] // 4, device=kind)
    small = torch.ones(1, device=kind)

    def timed(tensor, times: int) -> float:
        dist.all_reduce(tensor.clone())
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
            tensor.mul_(0.5)
        if kind == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    latency, whole = timed(small, MESSAGES), timed(large, 5)
    if rank == 0:
        results.put((SENT[kind] / max(whole - latency, 1e-9), latency))
    dist.destroy_process_group()
