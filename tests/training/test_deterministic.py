"""training.deterministic: data, pipeline, ZeRO and accumulation change no bit of weights and optimizer state."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.storage import LocalStorage
from armillary.training.checkpoint.load import Reader
from armillary.training.engines.canonical import CanonicalSums, exact_norm
from armillary.training.layout import Layout
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join
from tests.conftest import free_port
from tests.groups import checkpoint_of, in_group
from tests.training.sweep import job_of

STEPS = 20
SP = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = {  # by ranks, of the dense model in fp32; and of experts in bf16
    1: {"dense": [{}, {"recompute": "selective"}], "experts": [{}]},
    2: {
        "dense": [{"data": 2}, {"data": 2, "zero": 3}, {"pipeline": 2, "virtual": 2}, {"context": 2}],
        "experts": [{"data": 2}, {"data": 2, "zero": 2}, {"data": 2, "zero": 3}, SP],
    },
    4: {
        "dense": [
            {"data": 4},
            {"data": 4, "zero": 2},
            {"data": 2, "pipeline": 2, "engine": "deepspeed"},
            {"data": 2, "context": 2},
        ],
        "experts": [
            {"data": 2, "pipeline": 2, "recompute": "full"},
            {**SP, "data": 2},
            {**SP, "data": 2, "zero": 2},
        ],
    },
}
CASES = [
    (ranks, model, number)
    for ranks, models in LAYOUTS.items()
    for model, layouts in models.items()
    for number in range(len(layouts))
]


def train(rank, tables, out):
    tables = tables | {"model": tables["model"] | {"vision_layers": 1}, "data": tables["data"] | {"seq_length": 64}}
    for ranks, model, number in CASES:
        if ranks != rank.world_size:
            continue
        job = job_of(tables, model, **LAYOUTS[ranks][model][number])
        # 4 micro-batches, each a part of the tree; of experts 6, which are two parts of three
        experts = model == "experts"
        training = {
            "deterministic": True,
            "global_batch": 6 if experts else 4,
            "precision": "bf16" if experts else "fp32",
        }
        job = job.model_copy(update={"training": job.training.model_copy(update=training)})
        join(rank, job.parallel)
        folder = out / f"{ranks}-{model}-{number}"
        trainer = Trainer(Assignment("test", job, "hash", rank, folder, None, STEPS))
        records = [trainer.train_step()[0] for _ in range(STEPS)]
        checkpoint_of(trainer, folder / "checkpoint")
        trainer.close()
        if rank.rank == 0:
            (folder / "records.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("deterministic")
    for ranks in LAYOUTS:
        in_group(ranks, free_port(), train, tables, out)
    return out


def layout_of(case):
    ranks, model, number = case
    return LAYOUTS[ranks][model][number]


def like(case):
    """The first case of the same model with the same tensor and context sizes, which change what is multiplied."""

    def shape(one):
        return one[1], layout_of(one).get("tensor"), layout_of(one).get("context")

    return next(one for one in CASES if shape(one) == shape(case))


@pytest.mark.parametrize("case", [case for case in CASES if like(case) != case], ids=lambda c: f"{c[1]} {layout_of(c)}")
def test_no_bit_depends_on_how_the_batch_is_shared(trained, case):
    found, wanted = (trained / "{}-{}-{}".format(*one) for one in (case, like(case)))
    for got, want in zip(*(json.loads((one / "records.json").read_text()) for one in (found, wanted)), strict=True):
        assert got["grad_norm"] == want["grad_norm"], got["step"]
    states = [Reader(LocalStorage(one / "checkpoint")) for one in (found, wanted)]
    assert set(states[0].keys) == set(states[1].keys)
    assert not [key for key in states[1].keys if not torch.equal(states[0].whole(key), states[1].whole(key))]


def tree(numbers):
    """Added pairwise until one is left."""
    while len(numbers) > 1:
        numbers = [a + b for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from([1, 3, 5]))
def test_a_rank_adds_up_its_part_of_the_tree(exponent, less, length):
    ranks = 2 ** max(exponent - less, 0)
    micro_batches = 2**exponent * length
    gradients = torch.randn(micro_batches, 5, generator=torch.Generator().manual_seed(0)) * 1e3
    parts = [sum(part[1:], part[0]) for part in gradients.split(length)]
    sums = []
    for own in gradients.chunk(ranks):
        weight = torch.zeros(5, requires_grad=True)
        canonical = CanonicalSums([weight], micro_batches, ranks)
        for gradient in own:
            (weight * gradient).sum().backward()
        assert not weight.grad.any()
        sums.append(canonical.pop(weight))
    assert torch.equal(tree(sums), tree(parts))


def test_parts_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="4 parts"):
        CanonicalSums([], 12, 8)


@pytest.fixture(scope="module")
def joined():
    join(Rank(), Layout())


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.randoms())
def test_the_norm_does_not_depend_on_the_order(joined, numbers, random):
    device = torch.device("cpu")
    whole = torch.tensor(numbers)
    random.shuffle(numbers)
    cut = random.randrange(len(numbers) + 1)
    found = [exact_norm(parts, device) for parts in ([whole], torch.tensor(numbers).split([cut, len(numbers) - cut]))]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(whole.double().norm().item(), rel=1e-6)


def test_the_norm_of_what_is_no_number_is_infinite(joined):
    for bad in (float("inf"), float("nan")):
        for gradients in itertools.permutations([torch.tensor([1.0]), torch.tensor([0.0, bad])]):
            assert exact_norm(gradients, torch.device("cpu")) == float("inf")
