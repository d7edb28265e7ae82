"""What the planner says of published rows."""

from armillary.planner.collective import groups
from armillary.planner.layer import layer_time, recomputed
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
