import itertools

import pytest

from armillary.model.config import ModelConfig
from armillary.training.layout import Layout
from armillary.training.support import FEATURES, REFUSED, Setting, matrix, problems, together
from tests.conftest import ROOT

MODEL = dict(depth=6, hidden_size=96, num_heads=4, num_query_groups=2, vision_num_heads=4, vocab_size=512)


def found(layout, model=(), seq_length=33, global_batch=8, **training):
    setting = Setting(Layout(**layout), ModelConfig(**MODEL | dict(model)), seq_length, global_batch, **training)
    return [f"{key}: {reason}" for key, reason in problems(setting)]


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ({"tensor": 3}, "num_heads"),
        ({"tensor": 4}, "num_query_groups"),
        ({"pipeline": 4}, "depth"),
        ({"data": 3}, "global_batch"),
        ({"micro_batch": 3}, "global_batch"),
        ({"tensor": 2, "sequence_parallel": True}, "seq_length"),
    ],
)
def test_what_does_not_divide_is_named(layout, word):
    assert any(word in reason for reason in found(layout))
    assert not found({})


@pytest.mark.parametrize(
    ("layout", "model", "word"),
    [
        ({"sequence_parallel": True}, {}, "set parallel.tensor above 1"),
        ({"virtual": 2}, {}, "virtual stages needs pipeline"),
        ({"expert": 2, "engine": "megatron", "data": 2}, {}, "expert needs experts"),
        ({"zero": 2, "pipeline": 2}, {}, "ZeRO-2 does not go with pipeline"),
        ({"zero": 3, "engine": "megatron"}, {}, "ZeRO-3 does not go with Megatron-core"),
        ({"expert": 2, "data": 2, "engine": "deepspeed"}, {"num_experts": 4}, "expert needs Megatron-core"),
        ({}, {"num_experts": 4, "ffn_hidden_size": 102}, "ffn_hidden_size=102"),
        ({"tensor": 2}, {"num_experts": 4}, "experts does not go with tensor alone"),
        ({"expert": 4, "data": 4, "engine": "megatron"}, {"num_experts": 6}, "does not divide num_experts"),
        ({"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 2}, {}, "depth"),
        ({"pipeline": 3, "virtual": 2, "first_stage_layers": 1}, {}, "depth"),
    ],
)
def test_what_does_not_go_together_is_named(layout, model, word):
    assert any(word in reason for reason in found(layout, model)), found(layout, model)


ASKED = {  # what a job says to have each feature: (layout, model, training), and what it needs beside it
    "tensor": ({"tensor": 2}, {}, {}),
    "sequence": ({"tensor": 2, "sequence_parallel": True}, {}, {}),
    "pipeline": ({"pipeline": 2}, {}, {}),
    "virtual": ({"pipeline": 2, "virtual": 2}, {}, {}),
    "uneven": ({"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 6}, {}, {}),
    "context": ({"context": 2}, {}, {}),
    "expert": ({"expert": 2, "data": 2, "engine": "megatron"}, {"num_experts": 4}, {}),
    "megatron": ({"engine": "megatron"}, {}, {}),
    "zero1": ({"engine": "deepspeed"}, {}, {}),
    "zero2": ({"zero": 2}, {}, {}),
    "zero3": ({"zero": 3}, {}, {}),
    "offload": ({"offload": True}, {}, {}),
    "recompute": ({"recompute": "full"}, {}, {}),
    "experts": ({}, {"num_experts": 4}, {}),
    "capacity": ({}, {"num_experts": 4, "capacity_factor": 1.5}, {}),
    "tied": ({}, {"tied_embeddings": True}, {}),
    "tied_stages": ({"pipeline": 2}, {"tied_embeddings": True}, {}),
    "bf16": ({}, {}, {"bf16": True}),
    "deterministic": ({}, {}, {"deterministic": True}),
    "compile": ({}, {}, {"compile": True}),
}


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids="-".join)
def test_what_the_table_says_is_what_a_job_is_told(pair):
    """For every pair: the table's rules, and what happens to a job that asks for both and all they need."""
    asked = [ASKED[name] for name in pair]
    layout, model, training = ({**one, **other} for one, other in zip(*asked, strict=True))
    setting = Setting(Layout(**layout), ModelConfig(**MODEL | {"depth": 8} | model), 64, 8, **training)
    rules = together(*pair)
    if rules is None or any(not FEATURES[name].used(setting) for name in pair):
        return  # alternatives: a job cannot ask for both
    said = [reason for _, reason in problems(setting)]
    assert bool(said) == bool(rules), said
    for rule in rules:
        assert rule not in REFUSED or any(rule.why in reason for reason in said), (rule, said)


def test_the_documentation_has_the_table():
    text = (ROOT / "docs" / "layouts.md").read_text()
    assert matrix() in text, "write training.support.matrix() into docs/layouts.md"


def test_deterministic_sums_are_shared_out_evenly():
    assert found({"data": 3}, global_batch=12, deterministic=True)
    assert not found({"data": 4}, global_batch=12, deterministic=True)
