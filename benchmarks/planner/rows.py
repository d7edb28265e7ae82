"""Published rows of performance_tables.json as the planner's own inputs: model, layout, machines, software, seconds.

What a table does not print is said here, with where it is from; what differs from this project's software is said in a
`Software` for each codebase. Nothing here is fitted.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from armillary.model.config import ModelConfig
from armillary.planner.hardware import Cluster, cluster, find_gpu
from armillary.planner.software import Software
from armillary.planner.stages import Step
from armillary.training.layout import Layout

FORMULA = ("korthikanti2022_fig7_pct",)  # percentages of a formula: no measurement, nothing to compare with

# Megatron-LM of 2021: LayerNorm, bias-dropout-add and bias-GELU each in one kernel; scores are written to memory.
# Gradients are fp32 and all-reduced after the backward pass, the optimizer's state is on every replica; tensor-parallel
# ranks send shares between stages (Narayanan et al. 2021, section 4.1).
MEGATRON_2021 = Software(
    mlp_matrices=2, images=False, attention="unfused", norm_traffic=11, activation_traffic=2, rope_traffic=0,
    logit_bytes=30, backward_overlap=False, shared_optimizer=False, scattered_sends=True,
)  # fmt: skip
# Korthikanti et al. 2022, section 4.2.2: communication beside the products of the backward pass.
MEGATRON_2022 = replace(MEGATRON_2021, backward_overlap=True, selective="attention")
# The baseline of MegaScale: Megatron-LM of 2023, with FlashAttention-2 and the distributed optimizer.
MEGATRON_2023 = replace(MEGATRON_2022, attention="flash2", shared_optimizer=True)
# Jiang et al. 2024, sections 3.1 and 3.2: attention and MLP side by side, a sliding window (half a row: its width is
# not printed), tensor-parallel communication hidden behind products, data-parallel communication behind passes, fewer
# kernels for norms and GELU.
MEGASCALE = replace(
    MEGATRON_2023, norm_traffic=7, tensor_collectives=1, tensor_overlap=True, data_overlap=True, window=1024
)
# llm-foundry, 2023: FSDP, FlashAttention-1 in Triton, norms in low precision, no dropout, no biases, ALiBi or learned
# positions; the loss in fp32.
MPT = Software(
    mlp_matrices=2, images=False, attention="flash1", norm_traffic=10, activation_traffic=2, rope_traffic=0,
    logit_bytes=30, data_overlap=True, gradient_bytes=2,
)  # fmt: skip
# torchtitan, December 2024: FSDP2; without torch.compile each operation of a norm, the rotation and SwiGLU is a kernel.
TORCHTITAN = Software(
    images=False, norm_traffic=30, activation_traffic=5, rope_traffic=12, logit_bytes=40, data_overlap=True,
    weight_bytes=4, selective="products", whole_logits=14, joint_qkv=False, gathered_keys=False, bucket_bytes=0.0,
)  # fmt: skip
TORCHTITAN_COMPILED = replace(TORCHTITAN, norm_traffic=10, activation_traffic=3, rope_traffic=4, logit_bytes=16)
# nanotron, 2024: a fused RMSNorm, FlashAttention-2, SwiGLU in two kernels; gradients are added up in fp32 and reduced
# after the backward pass.
NANOTRON = Software(
    images=False, norm_traffic=10, activation_traffic=5, rope_traffic=8, logit_bytes=30,
    kept_gradient_bytes=6, kept_activations=1.0, kept_gathered=True, whole_logits=10, joint_qkv=False, bucket_bytes=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published measurement. layer: the figure is of one layer's forward and backward pass."""

    table: str
    number: int  # of the row in the file
    label: str
    model: ModelConfig
    layout: Layout
    step: Step
    cluster: Cluster
    software: Software
    seconds: float
    gib: float = 0.0  # of memory, where that was measured
    layer: bool = False


def reference_file() -> Path:
    """Where the tables are, if they are on this machine."""
    folder = os.environ.get("ARMILLARY_REFERENCE_DATA") or Path(__file__).parents[3] / "shared" / "data"
    return Path(folder) / "performance_tables.json"


def read(path: Path) -> list[Row]:
    """Every measured row of the file, in its order."""
    readers = {
        "narayanan2021_table1": _narayanan,
        "korthikanti2022_table5": _korthikanti,
        "korthikanti2022_table4": _one_layer,
        "megascale_table2": _megascale,
        "torchtitan_2024_t1_t3": _torchtitan,
        "torchtitan_2024_t2": _torchtitan,
        "mosaic_mpt": _mpt,
        "nanotron_best": _nanotron,
    }
    published = json.loads(path.read_text())
    return [
        row
        for number, one in enumerate(published)
        if one["table"] not in FORMULA
        for row in readers[one["table"]](number, one)
    ]


def text_model(hidden: int, layers: int, heads: int, vocab: int, **dims) -> ModelConfig:
    """A decoder alone: the image encoder is a token one, which Software(images=False) leaves out."""
    given = {"ffn_hidden_size": 4 * hidden, "num_query_groups": heads, "tied_embeddings": True} | dims
    return ModelConfig(
        depth=layers, hidden_size=hidden, num_heads=heads, vocab_size=vocab, vision_layers=1, vision_hidden_size=64,
        vision_num_heads=1, **given,
    )  # fmt: skip


def _step(seq: int, rows: int) -> Step:
    return Step(seq, rows, float(seq), 0.0, "bf16")


def _narayanan(number: int, one: dict):
    """Seconds from the printed TFLOP/s, which count recomputation: equation 3 of the paper."""
    b, s, h, layers, v = one["gbs"], one["seq"], one["hidden"], one["layers"], one["vocab"]
    flops = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    part = one["layers_per_virtual_stage"]
    layout = Layout(
        data=one["dp"], tensor=one["tp"], pipeline=one["pp"], micro_batch=one["mbs"], recompute="full",
        virtual=layers // one["pp"] // part if part else 1,
    )  # fmt: skip
    yield Row(
        one["table"], number, one["model"], text_model(h, layers, one["heads"], v), layout, _step(s, b),
        cluster(find_gpu("a100-80"), one["gpus"]), MEGATRON_2021, flops / (one["gpus"] * one["tflops_per_gpu"] * 1e12),
    )  # fmt: skip


def _korthikanti(number: int, one: dict):
    model = text_model(one["hidden"], one["layers"], one["heads"], one["vocab"])
    for recompute, key in (("full", "iter_s_full_recompute"), ("selective", "iter_s_selective_plus_sp")):
        layout = Layout(
            tensor=one["tp"], pipeline=one["pp"], micro_batch=one["mbs"], virtual=one["interleave_stages"],
            recompute=recompute, sequence_parallel=recompute == "selective",
        )  # fmt: skip
        yield Row(
            one["table"], number, f"{one['model']} {recompute}", model, layout, _step(one["seq"], one["gbs"]),
            cluster(find_gpu("a100-80"), one["gpus"]), MEGATRON_2022, one[key],
        )  # fmt: skip


def _one_layer(number: int, one: dict):
    name = one["experiment"]
    recompute = "full" if "full" in name else "selective" if "selective" in name else "none"
    layout = Layout(tensor=one["tp"], micro_batch=one["mbs"], sequence_parallel="sequence" in name, recompute=recompute)
    yield Row(
        one["table"], number, name, text_model(6144, 48, 64, 51200), layout, _step(one["seq"], one["mbs"]),
        cluster(find_gpu("a100-80"), one["tp"]), MEGATRON_2022, one["total_ms"] / 1e3, layer=True,
    )  # fmt: skip


def _megascale(number: int, one: dict):
    """Not in the table: a vocabulary of 64,000, six interleaved parts (section 6.1), 200 Gb/s for each GPU (3.6). Not
    printed at all, and assumed: micro-batches of one row, no recomputation."""
    layout = Layout(
        data=one["dp"], tensor=one["tp"], pipeline=one["pp"], virtual=6, sequence_parallel=True, micro_batch=1
    )
    yield Row(
        one["table"], number, f"{one['method']} {one['gpus']}",
        text_model(one["hidden"], one["layers"], one["heads"], 64000), layout, _step(one["seq"], one["gbs"]),
        cluster(find_gpu("a100-80"), one["gpus"], interconnect="roce-200"),
        MEGASCALE if one["method"] == "MegaScale" else MEGATRON_2023, one["iter_s"],
    )  # fmt: skip


def _torchtitan(number: int, one: dict):
    """Llama 3.1 8B (Grattafiori et al. 2024, table 3). The page says of its H100s: 2.4 TB/s, 500 W, 400 Gb/s each. Rows
    of 8,192 positions are its train_configs/llama3_8b.toml's, and agree with the 33 to 39 % MFU that the page has."""
    h100 = cluster(find_gpu("h100"), one["gpus"])
    slower = (500 / 700) ** (1 / 3)  # a clock goes with the cube root of power
    machines = replace(
        h100, memory_bytes=94 * 2**30, memory_bytes_s=2.4e12, matmul_share=h100.matmul_share * slower,
        attention_forward=h100.attention_forward * slower, attention_backward=h100.attention_backward * slower,
    )  # fmt: skip
    software = TORCHTITAN_COMPILED if "compile" in one["technique"] else TORCHTITAN
    model = text_model(
        4096, 32, 32, 128256, num_query_groups=8, ffn_hidden_size=14336, tied_embeddings=False, rope_theta=500000
    )
    context = one.get("cp", 1)
    layout = Layout(data=one["dp"], context=context, zero=3, micro_batch=one["local_batch"], recompute=one["recompute"])
    rows = one["dp"] * one["local_batch"]
    seconds = rows * one["seq"] / (one["tps_per_gpu"] * one["gpus"])
    yield Row(
        one["table"], number, f"{one['technique']} {one['gpus']} seq {one['seq']}", model, layout,
        _step(one["seq"], rows), machines, replace(software, fp8="float8" in one["technique"]),
        seconds, one["mem_gib"],
    )  # fmt: skip


MPT_DIMS = {  # hidden, layers, heads: llm-foundry's scripts/train/yamls/pretrain/mpt-*.yaml; vocabulary 50,368, tied
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
MPT_GPUS = {"h100_80gb": "h100", "a100_80gb": "a100-80", "a100_40gb": "a100-40"}


def _mpt(number: int, one: dict):
    """Seconds from throughput. FSDP in Composer: PURE gathers and reduces bf16, DEFAULT gathers fp32."""
    hidden, layers, heads = MPT_DIMS[one["Model"]]
    gpus, seq, rows = int(one["# GPUs"]), int(one["SeqLen (T)"]), int(one["GlobalBatchSize"])
    layout = Layout(
        data=gpus, micro_batch=int(one["MicroBatchSize"]), zero=3 if one["Sharding Strategy"] == "FULL_SHARD" else 2,
        recompute="full" if one["Activation Checkpointing"] == "True" else "none",
    )  # fmt: skip
    assert rows % (gpus * layout.micro_batch) == 0, number
    software = replace(MPT, fp8="fp8" in one["Precision"], gather_bytes=2 if one["MP Mode"] == "PURE" else 4)
    yield Row(
        one["table"], number, f"{one['Model']} {one['GPU']} x{gpus} seq {seq} {one['Precision']}",
        text_model(hidden, layers, heads, 50368), layout, _step(seq, rows),
        cluster(find_gpu(MPT_GPUS[one["GPU"]]), gpus), software,
        rows * seq / (float(one["Throughput (T/s/GPU)"]) * gpus),
    )  # fmt: skip


NANOTRON_DIMS = {  # hidden, layers, heads, MLP width, tied: found by the printed parameters, vocabulary 131,072
    1.34: (2048, 16, 32, 8192, True), 3.57: (3072, 28, 24, 8192, True), 8.86: (4096, 32, 32, 14336, False),
}  # fmt: skip


def _nanotron(number: int, one: dict):
    """Seconds from the printed MFU: nanotron's own count has whole attention, and 989 TFLOP/s for its peak. Rows of
    4,096 positions on nodes of eight H100s (The Ultra-Scale Playbook, "Benchmarking thousands of configurations"); AWS
    P5, 3,200 Gb/s for eight GPUs."""
    hidden, layers, heads, ffn, tied = NANOTRON_DIMS[one["params_b"]]
    vocab, seq = 131072, 4096
    token = layers * (8 * hidden**2 + 4 * hidden * seq + 6 * hidden * ffn) + 2 * hidden * vocab
    flops = 3 * token * seq * one["gbs"]
    layer, head = 4 * hidden**2 + 3 * hidden * ffn, hidden * vocab  # by which nanotron shares layers out
    layout = Layout(
        data=one["dp"], tensor=one["tp"], pipeline=one["pp"], micro_batch=one["mbs"], sequence_parallel=one["tp"] > 1,
        first_stage_layers=round((layers * layer + head) / 2 / layer) if one["pp"] == 2 else 0,
    )  # fmt: skip
    software = replace(NANOTRON, shared_optimizer=one["zero"] > 0)
    yield Row(
        one["table"], number, f"{one['params_b']}B x{one['gpus']}",
        text_model(hidden, layers, heads, vocab, ffn_hidden_size=ffn, tied_embeddings=tied), layout,
        _step(seq, one["gbs"]), cluster(find_gpu("h100"), one["gpus"], interconnect="efa-400"), software,
        flops / (one["mfu_pct"] / 100 * one["gpus"] * 989e12), one["mem_gb"],
    )  # fmt: skip
