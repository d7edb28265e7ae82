"""Batches on their way to a device: one rank of those that share its rows builds them, the others are sent them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
FIELDS = PackedBatch._fields
HEADER = ("weight", "pairs", "images", "token_bytes", "block", "row")  # numbers before the fields' sizes


@dataclass(frozen=True)
class DeviceBatch:
    """A PackedBatch on a device: its fields as tensors of the same shapes and dtypes."""

    positions: int  # T
    tokens_T: torch.Tensor
    last_labels: torch.Tensor
    mask_bounds: torch.Tensor
    mask_values: torch.Tensor
    cu_seqlens: torch.Tensor
    piece_sources: torch.Tensor
    patches_IND: torch.Tensor
    image_starts_I: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> "DeviceBatch":
        """A copy of a whole batch."""
        tensors = [torch.tensor(getattr(batch, name), device=device) for name in FIELDS]
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
    def loss_mask_T(self) -> torch.Tensor:
        """The weight of each label in the loss, float32."""
        return self.mask_values.repeat_interleave(self.mask_bounds.diff(), output_size=self.positions)

    @property
    def source_ids_T(self) -> torch.Tensor:
        """The source of each position, int32; -1: padding."""
        return self._of_pieces(self.piece_sources)

    def _of_pieces(self, values: torch.Tensor) -> torch.Tensor:
        """Of each position, what is its piece's."""
        return values.repeat_interleave(self.cu_seqlens.diff(), output_size=self.positions)


@dataclass(frozen=True)
class DeviceStep:
    """One rank's share of a step, and the cursor after the step.

    A micro-batch is sent to the device when it is asked for, which is collective over the ranks that share its rows.
    """

    weight: float  # of all its labels in the loss
    pairs: float  # of positions that see each other
    images: float
    positions: int  # of a micro-batch
    count: int  # of micro-batches
    micro_batches: Iterator[DeviceBatch]
    after: Cursor
    samples: tuple[int, ...] = ()  # pieces of each source; () but on one of the ranks that share rows


class Delivery:
    """Endless steps of a job's data from `cursor` on, for this rank. Needs `process_group.join` before.

    Of the tensor- and context-parallel ranks that share rows, the first one reads and builds, in a thread and two steps
    ahead; it reads no more than its pipeline stage needs: tokens in the first and the last one, images in the first.
    `next` is collective over these ranks. DataError as of Loader, on the rank that reads.
    """

    def __init__(self, job: TrainJob, cursor: Cursor, rank: int, device: torch.device):
        self._job, self._device = job, device
        layout = job.parallel
        share = job.training.global_batch // layout.data
        self._micro_batches = share // layout.micro_batch
        self._group = parallel_state.get_tensor_and_context_parallel_group()
        self._source = dist.get_process_group_ranks(self._group)[0]
        self._loader: Loader | None = None
        self._parcels: Iterator[_Parcel] | None = None
        if rank == self._source:
            first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
            self._loader = Loader(job.data, job.image_shape, job.data.threads)
            steps = self._loader.steps(
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
        """The next step; its micro-batches are to be taken before the next one."""
        parcel = None if self._parcels is None else next(self._parcels)
        if parcel is None:
            header = torch.empty(len(HEADER) + self._micro_batches * len(FIELDS), dtype=torch.float64)
        else:
            header = parcel.header
        weight, pairs, images, token_bytes, block, row, *counts = self._sent(header).tolist()
        shapes = [
            self._shapes(int(token_bytes), [int(count) for count in counts[first : first + len(FIELDS)]])
            for first in range(0, len(counts), len(FIELDS))
        ]
        positions = self._job.parallel.micro_batch * self._job.data.seq_length
        bodies = [None] * len(shapes) if parcel is None else parcel.bodies
        batches = (self._delivered(*pair) for pair in zip(shapes, bodies, strict=True))
        after = Cursor(block=int(block), row=int(row))
        samples = () if parcel is None else parcel.samples
        return DeviceStep(weight, pairs, images, positions, len(shapes), batches, after, samples)

    def close(self) -> None:
        """End the threads."""
        if self._parcels is not None:
            self._loader.close()
            self._parcels.close()

    def _pack(self, step: Step) -> "_Parcel":
        """A step as what is sent; in pinned memory where there is a GPU."""
        weight = sum(
            float(batch.mask_values @ np.diff(batch.mask_bounds).astype(np.float64)) for batch in step.micro_batches
        )
        pairs = sum(causal_pairs(batch.cu_seqlens) for batch in step.micro_batches)
        images = sum(len(batch.image_starts_I) for batch in step.micro_batches)
        token_bytes = step.micro_batches[0].tokens_T.itemsize
        header = [weight, pairs, images, token_bytes, step.after.block, step.after.row]
        bodies = []
        for batch in step.micro_batches:
            arrays = [getattr(batch, name) for name in FIELDS]
            header += map(len, arrays)
            sizes = [_aligned(array.nbytes) for array in arrays]
            body = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            place, at = body.numpy(), 0
            for array, size in zip(arrays, sizes, strict=True):
                place[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
                at += size
            bodies.append(body)
        return _Parcel(torch.tensor(header, dtype=torch.float64), bodies, self._samples(step))

    def _samples(self, step: Step) -> tuple[int, ...]:
        """See DeviceStep; later pipeline stages read the same rows."""
        if not parallel_state.is_pipeline_first_stage():
            return ()
        sources = np.concatenate([batch.piece_sources for batch in step.micro_batches])
        return tuple(np.bincount(sources[sources >= 0], minlength=len(self._job.data.sources)).tolist())

    def _shapes(self, token_bytes: int, counts: list[int]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each field."""
        token = torch.uint16 if token_bytes == 2 else torch.uint32
        kinds = {
            "tokens_T": token, "last_labels": token, "mask_bounds": torch.int32, "mask_values": torch.float32,
            "cu_seqlens": torch.int32, "piece_sources": torch.int32, "patches_IND": torch.uint8,
            "image_starts_I": torch.int64,
        }  # fmt: skip
        patches = (self._job.image_shape.patches, self._job.image_shape.patch_dim)
        return [
            (kinds[name], (count, *patches) if name == "patches_IND" else (count,))
            for name, count in zip(FIELDS, counts, strict=True)
        ]

    def _delivered(self, shapes: list[tuple[torch.dtype, tuple[int, ...]]], body: torch.Tensor | None) -> DeviceBatch:
        """A micro-batch on the device; `body` is its bytes, on the rank that built it."""
        sizes = [math.prod(shape) * kind.itemsize for kind, shape in shapes]
        if body is None:
            body = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=self._device)
        body, at, tensors = self._sent(body), 0, []
        for (kind, shape), size in zip(shapes, sizes, strict=True):
            tensors.append(body[at : at + size].view(kind).view(shape))
            at += _aligned(size)
        return DeviceBatch(self._job.parallel.micro_batch * self._job.data.seq_length, *tensors)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on the device of each rank of the group."""
        alone = dist.get_world_size(self._group) == 1
        if alone and tensor.dtype != torch.uint8:
            return tensor
        tensor = tensor.to(self._device, non_blocking=True)
        if not alone:
            dist.broadcast(tensor, self._source, self._group)
        return tensor


@dataclass(frozen=True)
class _Parcel:
    """A step in two parts: `header` has the weight of its labels, the bytes of a token, its cursor, and of each
    micro-batch how many items each field has; `bodies` has the fields' bytes of each micro-batch."""

    header: torch.Tensor  # float64, which holds whole numbers up to 2^53
    bodies: list[torch.Tensor]  # uint8
    samples: tuple[int, ...]


def causal_pairs(cu_seqlens: np.ndarray) -> float:
    """Of positions that see each other in documents with these bounds; as model.flops counts them."""
    return float(np.square(np.diff(cu_seqlens).astype(np.float64)).sum()) / 2


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
