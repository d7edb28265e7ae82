"""What the planner says of published rows, and how far that is from what was measured."""

import statistics

from armillary.planner.collective import groups
from armillary.planner.layer import layer_time, recomputed
from armillary.planner.memory import memory
from armillary.planner.software import Constants
from armillary.planner.stages import batch, decoder_dims
from armillary.planner.time import step_time
from benchmarks.planner.rows import Row


def planned(row: Row, c: Constants) -> float:
    """Seconds of the row's step, or of its one layer."""
    if not row.layer:
        return step_time(row.model, row.layout, row.step, row.cluster, software=row.software, c=c).total
    ways, dims = groups(row.layout, row.cluster.node_gpus), decoder_dims(row.model, row.software)
    axes = (ways["tensor"], ways["context"], ways["expert"], row.layout.sequence_parallel)
    forward, backward = layer_time(
        dims, batch(row.step, row.layout), row.cluster, *axes, row.step.precision, row.software, c
    )
    return forward.total + backward.total + recomputed(forward, row.layout.recompute, dims, row.software).total


def planned_gib(row: Row, c: Constants) -> float:
    """GiB of the row's fullest GPU, as PyTorch's allocator counts them: what the runtime holds is not among them."""
    stages = memory(row.model, row.layout, row.step, row.software, c)
    return max(stage.total - stage.runtime for stage in stages) / 2**30


def errors(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of (planned, measured) pairs: how many, and the median, worst and signed median relative error."""
    found = [planned / measured - 1 for planned, measured in pairs]
    absolute = [abs(error) for error in found]
    return {
        "rows": len(found),
        "median": statistics.median(absolute),
        "worst": max(absolute),
        "bias": statistics.median(found),
    }


def rule_of_thumb(fitting: list[Row], scored: list[Row]) -> dict[str, float]:
    """The error of one utilisation for all: seconds are FLOPs (6 for a parameter and position, 8 with full
    recomputation) over the peak, times one factor, the median of `fitting`."""

    def ideal(row: Row) -> float:
        dims = row.model
        per_layer = 2 * dims.hidden_size * dims.head_dim * (dims.num_heads + dims.num_query_groups)
        per_layer += row.software.mlp_matrices * dims.hidden_size * dims.ffn_hidden_size
        held = (1 if row.layer else dims.depth) * per_layer + (0 if row.layer else dims.vocab_size * dims.hidden_size)
        peak = row.cluster.fp8 if row.software.fp8 else row.cluster.bf16
        each = 8 if row.layout.recompute == "full" else 6
        return each * held * row.step.global_batch * row.step.seq_length / (row.cluster.gpus * peak)

    share = statistics.median(row.seconds / ideal(row) for row in fitting)
    return errors([(share * ideal(row), row.seconds) for row in scored])
