"""What the submitter's pod does: give the run's command to Ray's head, and show what it says until it has ended.

The operator's own command reads the log once, and where that stream breaks, the operator fails the run half a minute
later. This one asks again.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
from ray.job_submission import JobSubmissionClient

from armillary.errors import ClusterError, JobError

AGAIN_SECONDS = 2.0
PATIENCE = 600.0  # seconds that Ray's head may not answer: as long as one takes to start anew
SILENCE = 60.0  # that the driver, who speaks every ten, does not keep: the connection is dead
LOST = (RuntimeError, OSError, aiohttp.ClientError)  # what Ray's client raises where its server has gone


def submit(command: str) -> None:
    """Of this pod, whose environment is the operator's: RAY_DASHBOARD_ADDRESS and RAY_JOB_SUBMISSION_ID."""
    try:
        address, job = os.environ["RAY_DASHBOARD_ADDRESS"], os.environ["RAY_JOB_SUBMISSION_ID"]
    except KeyError as error:
        raise JobError(f"the pod's environment has no {error.args[0]}", "", "submit with `armillary submit`") from None
    see_through(f"http://{address.removeprefix('http://')}", job, command, lambda text: print(text, end="", flush=True))


def see_through(address: str, job: str, command: str, say: Callable[[str], None]) -> None:
    """Until the job of this id, which is begun where it is not there, has ended; ClusterError where Ray's head does not
    answer for PATIENCE seconds. A head that was made anew knows no job: it gets the command once more."""
    said, deadline = 0, time.monotonic() + PATIENCE
    while True:
        try:
            client = JobSubmissionClient(address)
            if job not in {one.submission_id for one in client.list_jobs()}:
                client.submit_job(entrypoint=command, submission_id=job)
                said = 0
            said, whole = asyncio.run(show(client.tail_job_logs(job), said, say))
            deadline = time.monotonic() + PATIENCE
            if whole and client.get_job_status(job).is_terminal():
                return
        except LOST as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray's head does not answer: {error}", address, "see the head's pod") from None
        time.sleep(AGAIN_SECONDS)


async def show(log: AsyncIterator[str], said: int, say: Callable[[str], None]) -> tuple[int, bool]:
    """Say what a log has beyond its first `said` characters, until it ends, breaks, or is silent for SILENCE seconds,
    as it never is: how many have been said then, and whether that was its end."""
    at = 0
    with contextlib.suppress(*LOST):
        while (text := await asyncio.wait_for(anext(log, None), SILENCE)) is not None:
            if new := text[max(0, said - at) :]:
                say(new)
            at += len(text)
        return max(said, at), True
    return max(said, at), False
