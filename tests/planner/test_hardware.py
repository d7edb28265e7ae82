"""Hardware files: what comes with the package, and what is refused."""

import pytest

from armillary.errors import JobError
from armillary.planner.hardware import FOLDER, cluster, find_gpu, gpu_of_device, known_gpus, known_links, read_gpu

H100 = (FOLDER / "h100.toml").read_text()


def test_every_gpu_makes_a_cluster_with_its_links():
    assert set(known_gpus()) == {"a100-40", "a100-80", "h100", "h200", "b200", "mi300x"}
    for name in known_gpus():
        machines = cluster(find_gpu(name), 64)
        assert machines.link.bytes_s > machines.network.bytes_s > 0
        assert machines.bf16 > machines.fp32 > 0
        assert 0 < machines.matmul_share < 1


@pytest.mark.parametrize("name", ["h10", "H1000", "a100-90", "nothing-like-it"])
def test_an_unknown_gpu_is_refused_with_the_nearest(name):
    with pytest.raises(JobError, match=name) as caught:
        find_gpu(name)
    assert "a100-40, a100-80, b200, h100" in caught.value.fix
    assert ("did you mean" in caught.value.fix) == (name != "nothing-like-it")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_devices_are_known_by_what_pytorch_calls_them(device, name):
    assert gpu_of_device(device).name == name


def test_other_devices_are_not_taken_for_known_ones():
    assert gpu_of_device("Tesla T4") is None
    assert gpu_of_device("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda text: text.replace("value = 80", 'value = "much"'), "memory_gib.value"),
        (lambda text: text.replace("value = 3.35", "value = -3.35"), "memory_tb_s.value"),
        (lambda text: text.replace("value = 3.35", "value = 0"), "memory_tb_s.value"),
        (lambda text: text.replace("[memory_gib]", "[memory_gb]"), "memory_gb: there is no such key"),
        (lambda text: text.replace("[memory_gib]", "[memory_gb]"), "memory_gib: it is missing"),
        (lambda text: text.split("source", 1)[0], "source: it is missing"),
        (lambda text: text.replace('name = "h100"', "name = "), "not valid TOML"),
        (lambda text: text.replace("value = 80", "value = nan"), "memory_gib.value"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, damage, word):
    path = tmp_path / "mine.toml"
    path.write_text(damage(H100))
    with pytest.raises(JobError) as caught:
        find_gpu(str(path))
    assert word in caught.value.what
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_a_file_of_ones_own_is_taken(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(H100.replace('name = "h100"', 'name = "mine"').replace("value = 80", "value = 94"))
    assert cluster(find_gpu(str(path)), 8).memory_bytes == 94 * 2**30
    with pytest.raises(JobError, match="no such hardware file"):
        read_gpu(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("gpus", "node", "word"),
    [(0, 8, "--gpus 0"), (-1, 8, "--gpus -1"), (10**12, 8, "--gpus"), (8, 0, "--node-gpus 0"), (8, -3, "--node-gpus"),
     (20, 8, "do not fill nodes of 8"), (8, 10**6, "--node-gpus")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(gpus, node, word):
    with pytest.raises(JobError, match=word) as caught:
        cluster(find_gpu("h100"), gpus, node)
    assert caught.value.fix


def test_an_unknown_interconnect_is_refused_with_the_nearest():
    with pytest.raises(JobError, match="ib-nrd") as caught:
        cluster(find_gpu("h100"), 16, interconnect="ib-nrd")
    assert "did you mean ib-ndr?" in caught.value.fix
    faster = cluster(find_gpu("h100"), 16, interconnect="ib-xdr").network
    assert faster.bytes_s == known_links()["ib-xdr"].gb_s * 1e9
