"""A checkpoint's model, whole in this process, whatever layout it was trained on."""

import torch

from armillary.model.coordinates import placements
from armillary.model.multimodal import MultimodalModel
from armillary.storage import Storage
from armillary.training.checkpoint.load import Reader
from armillary.training.config import TrainJob
from armillary.training.layout import Layout
from armillary.training.loop import build_model
from armillary.training.process_group import Rank, join


@torch.no_grad()
def load_model(checkpoint: Storage) -> tuple[MultimodalModel, TrainJob]:
    """The model of a committed checkpoint in evaluation mode, on the GPU if there is one, and its job.

    CheckpointError where it is missing, incomplete, corrupted or of other dimensions than its job says.
    """
    reader = Reader(checkpoint)
    job = TrainJob.model_validate(reader.manifest.state.job).model_copy(update={"parallel": Layout()})
    rank = Rank()
    join(rank, job.parallel)
    (model,) = build_model(job, rank.device)
    for parameter, place in placements([model]):
        parameter.copy_(reader.local("weight", place))
    return model.eval(), job
