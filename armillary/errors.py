"""What a user is told when something cannot go on.

Every error says what happened, where, and what to do. The command line prints that one message
without a traceback and exits with `exit_code`: 2 where the user can put it right, 1 where the run failed.
"""


class ArmillaryError(Exception):
    """Base of all errors meant for users.

    `what` happened, `where` (a file, key, rank or address; may be empty), and what to do about it (`fix`).
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, str(where), fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)


class JobError(ArmillaryError):
    """The job file, an override or an argument cannot be used."""


class DataError(ArmillaryError):
    """A source, a shard or an image is missing, unreadable or not what its manifest says."""


class CheckpointError(ArmillaryError):
    """A checkpoint is missing, incomplete, corrupted or of another model."""


class ClusterError(ArmillaryError):
    """The machines asked for cannot be had: too few processors, a port in use, no such address."""


class RunError(ArmillaryError):
    """A run that had started could not go on."""

    exit_code = 1


class LossError(RunError):
    """The loss or the gradient norm of a step cannot be trained on."""


class FaultError(RunError):
    """A run lost a machine or a process: the same may go well another time."""


class PreemptedError(RunError):
    """A run was told to make room (SIGTERM): it can be resumed somewhere else."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


ERRORS = {
    kind.__name__: kind
    for kind in (JobError, DataError, CheckpointError, ClusterError, RunError, LossError, FaultError)
}
