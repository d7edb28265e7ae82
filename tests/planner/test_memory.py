"""Bytes by part, against published formulas and the schedule itself."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.model.flops import parameters
from armillary.planner.memory import activations, memory, states, tree_sums
from armillary.planner.simulate import schedule
from armillary.planner.software import ARMILLARY, Software
from armillary.planner.stages import Dims, Stage, in_flight, stages
from tests.conftest import ROOT
from tests.planner.jobs import EXPERTS, MODEL, STEP, layout

TENSOR = (1, 2, 4, 8)


def peak(keys, model=MODEL):
    return max(memory(model, layout(**keys), STEP), key=lambda stage: stage.total)


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_takes_what_its_paper_says(zero, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs, gradients of two bytes."""
    stage = Stage(0, 1, 1, True, True, 7.5e9, 0.0)
    software = Software(shared_optimizer=zero > 0)
    total = sum(states(stage, layout(data=64, zero=max(1, zero)), 2, 2, software))
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_activations_are_those_of_korthikanti():
    """Section 4.1 of Korthikanti et al. 2022 counts 34 s b h bytes a layer without the scores, of which dropout masks
    are 2, and a plain MLP of 4 h. Without masks that is: two norms' inputs and outputs (8), queries, keys, values and
    attention's output (8), the input and output of the MLP's activation (16). Flash attention keeps 4 bytes a row and
    head, and a norm 4 a row."""
    dims = Dims(4096, 32, 32, 128, 4 * 4096, 0, 1, 2)
    kept, whole = activations(dims, 1000, layout(), 2, replace(ARMILLARY, joint_qkv=False))
    assert kept == whole == 1000 * (32 * 4096 + 4 * 32 + 2 * 4)


@pytest.mark.parametrize("tensor", TENSOR)
def test_sequence_parallelism_divides_all_activations(tensor):
    """Korthikanti et al. 2022, equation 4: all of a layer's bytes over t; without it (equation 2) the norms' stay."""
    dims = Dims(4096, 32, 8, 128, 14336, 0, 1, 3)
    whole, _ = activations(dims, 1000, layout(), 2, ARMILLARY)
    divided, _ = activations(dims, 1000, layout(tensor=tensor), 2, ARMILLARY)
    assert divided == pytest.approx(whole / tensor)
    alone, _ = activations(dims, 1000, layout(tensor=tensor, sequence_parallel=False), 2, ARMILLARY)
    norms = 4 * 2 * 1000 * 4096 + 2 * 4 * 1000
    assert alone == pytest.approx((whole - norms) / tensor + norms)


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("keys", [{}, {"pipeline": 4}, {"pipeline": 3, "data": 2}], ids=str)
def test_the_stages_hold_the_model(model, keys):
    """Without tensor parallelism every parameter is on one stage, once."""
    held = sum(stage.alike * (stage.dense + stage.expert) for stage in stages(model, layout(**keys), ARMILLARY))
    assert held == parameters(model).total


def test_a_tensor_parallel_rank_holds_its_share_and_all_norms():
    whole, eighth = (stages(MODEL, layout(tensor=t), ARMILLARY)[0].dense for t in (1, 8))
    vectors = 2 * MODEL.depth * MODEL.hidden_size + MODEL.hidden_size
    vision = MODEL.vision_hidden_size
    vectors += 2 * MODEL.vision_layers * vision + (MODEL.patch_dim + MODEL.num_patches + 1) * vision
    assert eighth == pytest.approx((whole - vectors) / 8 + vectors)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 4]), st.sampled_from(["none", "selective", "full"]),
    st.sampled_from([MODEL, EXPERTS]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_more_tensor_ranks_never_need_more(pipeline, rows, recompute, model, data):
    keys = {"pipeline": pipeline, "micro_batch": rows, "recompute": recompute, "data": data}
    plans = [peak(keys | {"tensor": tensor}, model) for tensor in TENSOR]
    for fewer, more in itertools.pairwise(plans):
        for part in ("weights", "gradients", "optimizer", "activations", "total"):
            assert getattr(more, part) <= getattr(fewer, part), part


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TENSOR), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_what_saves_memory_saves_memory(tensor, rows, context):
    keys = {"tensor": tensor, "micro_batch": rows, "context": context, "data": 4}
    full, selective, none = (peak(keys | {"recompute": kind}).activations for kind in ("full", "selective", "none"))
    assert full < selective < none
    zero = [peak(keys | {"zero": stage}) for stage in (1, 2, 3)]
    assert zero[0].gradients > zero[1].gradients
    assert zero[1].weights > zero[2].weights
    assert peak(keys | {"offload": True}).optimizer == 0
    assert peak(keys | {"micro_batch": 2 * rows}).activations > peak(keys).activations


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 3]), st.integers(1, 6))
def test_micro_batches_in_flight_are_the_schedules(pipeline, virtual, groups):
    count = pipeline * groups
    shape = layout(pipeline=pipeline, virtual=virtual)
    for stage in range(pipeline):
        held = most = 0
        for operation in schedule(stage, pipeline, virtual, count):
            held += -1 if operation.backward else 1
            most = max(most, held)
        assert in_flight(shape, stage, count) == most / virtual


# In a process of its own: Triton's interpreter, under which the kernels keep what they keep on a GPU, is chosen when
# Triton is imported.
SAVED = """
import torch
from armillary.model.config import ModelConfig
from armillary.model.coordinates import initialize
from armillary.model.multimodal import Inputs, MultimodalModel
from armillary.planner.memory import activations
from armillary.planner.software import ARMILLARY
from armillary.planner.stages import decoder_dims
from armillary.training.layout import Layout
from armillary.training.process_group import join
from tests.conftest import free_port
from tests.groups import in_group

POSITIONS = 64

def kept(depth, layout):
    dims = ModelConfig(depth=depth, hidden_size=64, num_heads=4, num_query_groups=2, ffn_hidden_size=128,
                       vocab_size=256, vision_layers=1, vision_hidden_size=32, vision_num_heads=2, image_size=32)
    model = MultimodalModel(dims, False, torch.bfloat16)
    initialize([model], 0)
    weights, tensors, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, [], {}

    def keep(tensor):
        tensors.append(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    bounds = torch.tensor([0, POSITIONS], dtype=torch.int32)
    inputs = Inputs(torch.randint(256, (POSITIONS,)), torch.arange(POSITIONS), bounds,
                    torch.zeros(0, dims.num_patches, dims.patch_dim, dtype=torch.uint8), torch.zeros(0).long())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.eval()(inputs)
    dims, own = decoder_dims(dims, ARMILLARY), POSITIONS // layout.context
    return sum(sizes.values()), activations(dims, own, layout, 2, ARMILLARY)[0]

def print_kept(rank, context):
    layout = Layout(data=1, context=context)
    join(rank, layout)
    (fewer, planned), (more, _) = kept(2, layout), kept(3, layout)
    if rank.rank == 0:
        print(context, more - fewer, planned, flush=True)

if __name__ == "__main__":
    for context in (1, 2, 4):
        in_group(context, free_port(), print_kept, context)
"""


def test_a_layer_keeps_what_is_planned(tmp_path):
    """Bytes of all storages that the real model's decoder layer holds on to until its backward pass."""
    (tmp_path / "saved.py").write_text(SAVED)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "saved.py"], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    for context, real, planned in rows:
        assert float(real) == float(planned), context


def test_deterministic_sums_are_counted():
    """One gradient of the whole part for each level of a rank's share of the tree, and one; ZeRO divides none."""
    one, tree = (memory(MODEL, layout(data=8, zero=3), STEP._replace(deterministic=kind)) for kind in (False, True))
    whole = 4 * stages(MODEL, layout(data=8, zero=3), ARMILLARY)[0].dense
    assert tree[0].gradients - one[0].gradients == pytest.approx(6 * whole)  # 256 rows: 32 a rank, five levels
    assert [tree_sums(12, ranks) for ranks in (1, 2, 4)] == [3, 2, 1]


def test_the_parts_add_up():
    for stage in memory(MODEL, layout(tensor=2, pipeline=4, data=2), STEP):
        parts = stage.as_dict()
        assert parts.pop("total") == pytest.approx(sum(parts.values())) == stage.total
        assert min(parts.values()) >= 0
