"""Ranks as jobs of an array in Slurm, which submitit hands in; on this machine where there is no Slurm.

A job that is preempted, or whose time is over, goes back into the queue: it draws what is left of its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, printable

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit.helpers import DelayedSubmission

# submitit's own are 5 minutes, and an end after the third time that they are over.
PARAMETERS = {"name": "ldm-bulk", "timeout_min": 60}
MOST_TIMEOUTS = 10_000


@dataclass(frozen=True)
class Ranks:
    """What one job of the array does: each of its tasks is a rank.

    draw: is called with rank and world; gives "" or what went wrong.
    """

    draw: Callable[[int, int], str]
    job: int
    jobs: int

    def __call__(self) -> str:
        from submitit import JobEnvironment

        here = JobEnvironment()
        return self.draw(self.job * here.num_tasks + here.global_rank, self.jobs * here.num_tasks)

    def checkpoint(self) -> DelayedSubmission:
        """What is handed in again: all that is done lies in the storage."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def draw(
    rank: Callable[[int, int], str], jobs: int, folder: Path, parameters: Mapping[str, Any]
) -> Iterator[int]:
    """Draw with so many jobs, and wait for them; gives how many have ended.

    Args:
        rank: draws a rank's share; it is sent to other machines.
        folder: which all of them see, for scripts and logs.
        parameters: of `submitit.AutoExecutor`, and `cluster`: slurm, local or debug.

    Raises:
        UserError: what a rank gave; for one that ended early; if submitit is not installed, or does not know
            a parameter.
    """
    executor = made(folder, parameters)
    with executor.batch():
        handed_in = [executor.submit(Ranks(rank, job, jobs)) for job in range(jobs)]
    from submitit.core.utils import FailedJobError, UncompletedJobError
    from submitit.helpers import as_completed

    errors = list[str]()
    for ended, job in enumerate(as_completed(handed_in, poll_frequency=1), 1):
        try:
            errors += [error for error in job.results() if error]
        except (FailedJobError, UncompletedJobError):
            why = f"{job.paths.stderr} says why; the same command goes on"
            errors.append(f"job {job.job_id} ended early: {why}")
        yield ended
    if errors:
        more = f" ({len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def made(folder: Path, parameters: Mapping[str, Any]) -> AutoExecutor:
    """Raises UserError."""
    try:
        from submitit import AutoExecutor
    except ModuleNotFoundError as error:
        raise UserError(f"--engine slurm needs {error.name}: pip install 'ldm[slurm]'") from None
    given = {**PARAMETERS, **parameters}
    try:
        cluster = given.pop("cluster", None)
        executor = AutoExecutor(folder, cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(**given)
    except (ValueError, TypeError, NameError, AssertionError, RuntimeError) as error:
        raise UserError(f"--slurm: {printable(str(error).partition(chr(10))[0])}") from None
    return executor
