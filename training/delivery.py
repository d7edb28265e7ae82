"""Batches on their way to a device: one rank of a tensor-parallel group builds them, the others are sent them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from armillary.data_pipeline.batch import PackedBatch
from armillary.data_pipeline.cursor import Cursor
from armillary.data_pipeline.loader import Loader, Step
from armillary.data_pipeline.prefetch import prefetch
from armillary.model.multimodal import Inputs
from armillary.training.config import TrainJob

ALIGNMENT = 16  # bytes
FIELDS = [field.name for field in fields(PackedBatch)]
HEADER = 4  # numbers before the fields' sizes


@dataclass(frozen=True)
class DeviceBatch:
    """A PackedBatch on a device: its fields as tensors of the same shapes and dtypes."""

    positions: int  # T
    tokens_T: torch.Tensor
    last_labels: torch.Tensor
    loss_mask_T: torch.Tensor
    cu_seqlens: torch.Tensor
    piece_sources: torch.Tensor
    patches_IND: torch.Tensor
    image_starts_I: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> "DeviceBatch":
        """A copy of a whole batch."""
        tensors = [torch.from_numpy(getattr(batch, name)).to(device) for name in FIELDS]
        return cls(int(batch.cu_seqlens[-1]), *tensors)

    @property
    def inputs(self) -> Inputs:
        """What the model reads."""
        begins_T = self._of_pieces(self.cu_seqlens[:-1])
        positions_T = torch.arange(self.positions, device=begins_T.device) - begins_T
        return Inputs(self.tokens_T.long(), positions_T, self.cu_seqlens, self.patches_IND, self.image_starts_I)

    @property
    def labels_T(self) -> torch.Tensor:
        """The token that each position is to predict, int64: see PackedBatch."""
        labels_T = self.tokens_T.long().roll(-1)
        labels_T[self.cu_seqlens[1:].long() - 1] = self.last_labels.long()
        return labels_T

    @property
    def source_ids_T(self) -> torch.Tensor:
        """The source of each position, int32; -1: padding."""
        return self._of_pieces(self.piece_sources)

    def _of_pieces(self, values: torch.Tensor) -> torch.Tensor:
        """Of each position, what is its piece's."""
        return values.repeat_interleave(self.cu_seqlens.diff(), output_size=self.positions)


@dataclass(frozen=True)
class DeviceStep:
    """One rank's share of a step on its device, and the cursor after the step."""

    micro_batches: list[DeviceBatch]
    after: Cursor


class Delivery:
    """Endless steps of a job's data from `cursor` on, for this rank. Needs `process_group.join` before.

    The first rank of each tensor-parallel group reads and builds, in a thread and two steps ahead; it reads no more
    than its pipeline stage needs: tokens in the first and the last one, images in the first. `next` is collective over
    the group. DataError as of Loader.
    """

    def __init__(self, job: TrainJob, cursor: Cursor, rank: int, device: torch.device):
        self._job, self._device = job, device
        layout = job.parallel
        share = job.training.global_batch // layout.data
        self._micro_batches = share // layout.micro_batch
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._source = parallel_state.get_tensor_model_parallel_src_rank()
        self._parcels: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        if rank == self._source:
            first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
            steps = Loader(job.data, job.image_shape, job.data.threads).steps(
                cursor,
                job.training.global_batch,
                layout.micro_batch,
                layout.coordinates(rank).data,
                layout.data,
                with_tokens=first or last,
                with_images=first,
            )
            self._parcels = prefetch(map(self._pack, steps), ahead=2)

    def __next__(self) -> DeviceStep:
        """The next step."""
        if self._parcels is not None:
            header, body = next(self._parcels)
        else:
            header = torch.empty(HEADER + self._micro_batches * len(FIELDS), dtype=torch.int64)
        if self._job.parallel.tensor > 1:
            header = header.to(self._device)
            dist.broadcast(header, self._source, self._group)
        numbers = header.tolist()
        if self._parcels is not None:
            body = body.to(self._device, non_blocking=True)
        else:
            body = torch.empty(numbers[0], dtype=torch.uint8, device=self._device)
        if self._job.parallel.tensor > 1:
            dist.broadcast(body, self._source, self._group)
        return self._unpack(numbers, body)

    def close(self) -> None:
        """End the thread."""
        if self._parcels is not None:
            self._parcels.close()

    def _pack(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """A step as two tensors: its bytes in all, its cursor, the bytes of a token, and of each micro-batch how many
        items each field has; and all fields' bytes. In pinned memory where there is a GPU."""
        arrays = [getattr(batch, name) for batch in step.micro_batches for name in FIELDS]
        total = sum(_aligned(array.nbytes) for array in arrays)
        token_bytes = step.micro_batches[0].tokens_T.itemsize
        header = [total, step.after.block, step.after.row, token_bytes, *map(len, arrays)]
        body = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        place, at = body.numpy(), 0
        for array in arrays:
            place[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            at += _aligned(array.nbytes)
        return torch.tensor(header), body

    def _unpack(self, numbers: list[int], body: torch.Tensor) -> DeviceStep:
        _, block, row, token_bytes, *counts = numbers
        shape = self._job.image_shape
        token = torch.uint16 if token_bytes == 2 else torch.uint32
        kinds = {
            "tokens_T": token, "last_labels": token, "loss_mask_T": torch.float32, "cu_seqlens": torch.int32,
            "piece_sources": torch.int32, "patches_IND": torch.uint8, "image_starts_I": torch.int64,
        }  # fmt: skip
        positions, at, tensors = self._job.parallel.micro_batch * self._job.data.seq_length, 0, []
        for number, count in enumerate(counts):
            name = FIELDS[number % len(FIELDS)]
            form = (count, shape.patches, shape.patch_dim) if name == "patches_IND" else (count,)
            size = int(np.prod(form)) * kinds[name].itemsize
            tensors.append(body[at : at + size].view(kinds[name]).view(form))
            at += _aligned(size)
        batches = [
            DeviceBatch(positions, *tensors[first : first + len(FIELDS)])
            for first in range(0, len(tensors), len(FIELDS))
        ]
        return DeviceStep(batches, Cursor(block=block, row=row))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
