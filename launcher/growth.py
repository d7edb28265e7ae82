"""Processes that stand by: for a launch that loses ranks, and for one that machines came back to."""

import time

from armillary.launcher.job import Job
from armillary.launcher.machines import Machines
from armillary.launcher.ranks import Plan
from armillary.launcher.recovery import largest

LOOK_SECONDS = 1.0


class Growth:
    """Looks for room for more ranks than a launch has, and gets their processes ready beside it."""

    def __init__(self, machines: Machines, job: Job, plan: Plan):
        self._machines, self._job, self._plan = machines, job, plan
        self._looked = 0.0
        self.ranks = plan.job.parallel.world_size  # of the launch to come

    def stand_by(self) -> None:
        """Let a process wait beside each rank."""
        self._machines.warm(self._plan.bundles)

    def ready(self) -> bool:
        """Whether a larger launch could begin at once. To be asked again and again."""
        now, smaller = time.monotonic(), self._plan.job.parallel.world_size
        if smaller == self._job.parallel.world_size or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        found = largest(self._job, self._machines.nodes(), smaller + 1, self._machines.fits)
        if found is None:
            return False
        job, bundles = found
        if not self._machines.could_hold(bundles):
            return False
        self.ranks = job.parallel.world_size
        self._machines.request(bundles)
        return self._machines.warm(bundles)
