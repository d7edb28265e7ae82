import pytest

from armillary.model.config import ModelConfig
from armillary.training.layout import Layout
from armillary.training.support import Setting, problems

MODEL = dict(depth=6, hidden_size=96, num_heads=4, num_query_groups=2, vision_num_heads=4, vocab_size=512)


def found(layout, model=(), seq_length=33, global_batch=8, deterministic=False):
    setting = Setting(Layout(**layout), ModelConfig(**MODEL | dict(model)), seq_length, global_batch, deterministic)
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
        ({"sequence_parallel": True}, {}, "sequence needs tensor"),
        ({"virtual": 2}, {}, "virtual stages needs pipeline"),
        ({"expert": 2, "engine": "megatron", "data": 2}, {}, "expert needs experts"),
        ({"zero": 2, "pipeline": 2}, {}, "ZeRO-2 does not go with pipeline"),
        ({"zero": 3, "engine": "megatron"}, {}, "ZeRO-3 does not go with DistributedOptimizer"),
        ({"expert": 2, "data": 2}, {"num_experts": 4}, "expert does not go with DeepSpeed"),
        ({"expert": 4, "data": 4, "engine": "megatron"}, {"num_experts": 6}, "does not divide num_experts"),
        ({"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 2}, {}, "depth"),
        ({"pipeline": 3, "virtual": 2, "first_stage_layers": 1}, {}, "depth"),
    ],
)
def test_what_does_not_go_together_is_named(layout, model, word):
    assert any(word in reason for reason in found(layout, model)), found(layout, model)


def test_deterministic_sums_are_shared_out_evenly():
    assert found({"data": 3}, global_batch=12, deterministic=True)
    assert not found({"data": 4}, global_batch=12, deterministic=True)
