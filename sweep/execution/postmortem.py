"""What came of a job whose worker did not return, and why its process ended."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import replace

from sweep.execution import worker
from sweep.execution.job import EndWorkerError, Job, Result
from sweep.execution.liveness import AttemptHealth
from sweep.ledger.causes import Cause, cause_of
from sweep.ledger.ledger import Ledger, LedgerError


class WorkerDiedError(Exception):
    """A worker's process ended without a word."""


class HungError(Exception):
    """A worker's process was ended, since nothing came of it any more."""


def results_of_lost_worker(
    job: Job,
    ledger: Ledger,
    error: BaseException | None,
    heard: AttemptHealth | None = None,
    hung: str | None = None,
) -> tuple[Result, ...]:
    """Return what came of a job whose worker did not return, and write it to the ledger."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        # A pack raises after running out of memory; anything else that comes is a fault of ours.
        raised: BaseException = error.cause or error
        if isinstance(raised, EndWorkerError):
            return raised.results
        cause = cause_of(raised)
    else:
        cause, raised = _death(error, heard, hung)
        raised.__cause__ = error
    if heard is not None:
        job = replace(job, node=_node_name(heard.beat.node))
    ended: dict[str, Result] = {}
    with suppress(LedgerError):
        ended = worker.finished(job, ledger)
    steps = heard.beat.steps if heard else {}
    lost = heard.beat.unsaved if heard else {}
    return tuple(
        ended.get(point.trial_id)
        or worker.fail(
            ledger,
            job,
            point,
            cause,
            raised,
            step=steps.get(point.trial_id),
            lost=lost.get(point.trial_id, 0.0),
        )
        for point in job.points
    )


def _death(
    error: BaseException | None, heard: AttemptHealth | None, hung: str | None
) -> tuple[Cause, Exception]:
    """Return why a worker's process ended, and how to say so."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    if hung is not None:
        return "hung", HungError(f"it hung: {hung}; its worker was ended")
    # Ray itself ends what takes too much of a machine.
    if isinstance(error, OutOfMemoryError):
        return "memory", WorkerDiedError("the machine had too little memory for it")
    if isinstance(error, RayActorError) and error.preempted:
        return "preempted", WorkerDiedError("the node was taken away")
    if heard is not None and not _alive(heard.beat.node):
        return "node", WorkerDiedError("the node was lost")
    if words := _last_words(str(error)):
        return "worker", WorkerDiedError(f"the worker process ended by an error: {words}")
    return "worker", WorkerDiedError(
        "the worker process ended: killed, or out of the machine's memory"
    )


def _last_words(text: str) -> str:
    """Return the exception at the end of Ray's account of a process's end; '' if it has none.

    What fails before training begins, such as an import, ends the process with a traceback.
    """
    _, _, account = text.partition("Traceback (most recent call last):")
    raised = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception)\b.*", account, re.MULTILINE)
    return raised[-1].strip() if raised else ""


def _alive(node: str) -> bool:
    """Return whether a node is there, by its own word too: Ray may not know yet."""
    import ray

    for one in ray.nodes():  # type: ignore[no-untyped-call]
        if one["NodeID"] == node and one["Alive"]:
            with suppress(OSError):
                where = (one["NodeManagerAddress"], one["NodeManagerPort"])
                socket.create_connection(where, timeout=1).close()
                return True
    return False


def _node_name(node: str) -> str:
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    address = next((one["NodeManagerAddress"] for one in nodes if one["NodeID"] == node), "")
    return f"{address}/{node[:8]}"
