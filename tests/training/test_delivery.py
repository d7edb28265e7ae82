import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from armillary.data_pipeline.batch import PackedBatch
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader
from armillary.data_pipeline.plan import cut
from armillary.errors import DataError
from armillary.launcher.job import resolve
from armillary.training.delivery import Delivery, DeviceBatch
from armillary.training.layout import Layout
from armillary.training.process_group import Rank, join

CPU = torch.device("cpu")


@pytest.fixture
def job(tables):
    join(Rank(), Layout())
    return resolve(tables, "test").train_job()


def test_what_is_delivered_is_what_was_built(job):
    """All fields, over several steps and micro-batches, and the cursor."""
    delivery, loader, cursor = Delivery(job, Cursor(), 0, CPU), Loader(job.data, job.image_shape), Cursor()
    images, share = 0, job.parallel.micro_batch
    for _ in range(3):
        step = next(delivery)
        rows, cursor = loader.plan.rows(cursor, job.training.global_batch)
        assert step.after == cursor
        delivered = list(step.micro_batches)
        assert len(delivered) == step.count == job.training.global_batch // share > 1
        for number, batch in enumerate(delivered):
            built = loader.batch(cut(rows, number * share, share))
            assert batch.positions == step.positions == len(built.tokens_T)
            for name in PackedBatch._fields:
                want, got = getattr(built, name), getattr(batch, name).numpy()
                assert got.dtype == want.dtype
                assert np.array_equal(got, want), name
        assert step.weight == loader.batch(rows).loss_mask_T.sum()
        images += len(loader.batch(rows).patches_IND)
    delivery.close()
    assert images


def test_a_device_derives_what_the_batch_does(job):
    loader = Loader(job.data, job.image_shape)
    batch = loader.batch(loader.plan.rows(Cursor(), 6)[0])
    on_device = DeviceBatch.of(batch, CPU)
    assert list(PackedBatch._fields) == [field.name for field in fields(DeviceBatch)][1:]
    assert np.array_equal(on_device.labels_T, batch.labels_T)
    assert np.array_equal(on_device.source_ids_T, batch.source_ids_T)
    assert np.array_equal(on_device.inputs.positions_T, batch.positions_T)
    assert -1 in batch.source_ids_T


def test_a_damaged_batch_stops_the_step_that_needs_it(job, shards, tmp_path):
    """What the thread finds is raised where the step is waited for."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    for path in copy.glob("*[0-9].arrow"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elsewhere = job.model_copy(update={"data": job.data.model_copy(update={"path": str(copy)})})
    delivery = Delivery(elsewhere, Cursor(), 0, CPU)
    with pytest.raises(DataError, match=r"batch \d+ of a shard is corrupted"):
        next(delivery)
