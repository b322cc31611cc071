"""The only file with Ray Tune: one Tuner that lives as long as a run, and forgets what has ended.

Tune's trial is a pack. A searcher hands packs out one by one, so that a slot is filled again as
long as anything is left; a scheduler that leaves the order alone is what Tune calls at each turn of
its loop. Nothing of Tune's is ever restored.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sweep.cluster import preflight
from sweep.cluster.connection import environment
from sweep.execution import worker
from sweep.execution.channel import HeartbeatSender, ReportingActor
from sweep.execution.job import EndWorkerError, Job
from sweep.execution.monitor import Monitor
from sweep.execution.worker import Train
from sweep.ledger.ledger import Ledger

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.tune import PlacementGroupFactory
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

FORGET_EVERY = 50
"""Ended trials that Tune may hold: it keeps each one to its end, at some 100 KB, and looks all of
them over at each turn."""

PENDING = 200
"""Trials that Tune may have asked Ray for at a time, by its own advice."""


def run_packs(
    monitor: Monitor,
    channel: ActorHandle[ReportingActor],
    ledger_uri: str,
    train: Train,
    scratch: Path,
) -> None:
    """Run what a monitor hands out until nothing is left to hand out.

    Raises:
        KeyboardInterrupt: If what still ran was to be killed.
    """
    from ray import tune

    trainable = tune.with_resources(
        _trainable(channel, monitor.interval, ledger_uri, train),
        lambda config: _reservation(config["job"]),
    )
    search, schedule = adapters(monitor)
    with environment({"TUNE_MAX_PENDING_TRIALS_PG": str(min(monitor.slots, PENDING))}):
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=schedule,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:8], storage_path=str(scratch / "tune"), verbose=0
            ),
        ).fit()
    monitor.check()


@functools.cache
def _ledger(uri: str, channel: ActorHandle[ReportingActor]) -> Ledger:
    """Open the ledger, once a worker process, with the secrets that open it."""
    import ray

    for name, value in cast("Mapping[str, str]", ray.get(channel.secrets.remote())).items():
        os.environ.setdefault(name, value)
    return Ledger(uri)


def _trainable(
    channel: ActorHandle[ReportingActor], interval: float, uri: str, train: Train
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what Tune runs: it takes a job and returns results."""

    def pack(config: dict[str, Any]) -> dict[str, Any]:
        import ray

        job, ledger = config["job"], _ledger(uri, channel)
        with HeartbeatSender(channel, interval, job.attempt) as reporter:
            address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            results = worker.run_pack(
                replace(job, node=f"{address}/{reporter.node[:8]}"),
                ledger,
                train=train,
                reporter=reporter,
            )
        if any(result.cause == "preempted" for result in results):
            raise EndWorkerError(results)  # nothing more is to begin on this node
        # With `done` in its result a trial takes one round trip to the driver; without, two.
        return {"results": results, "done": True}

    return pack


def _reservation(job: Job) -> PlacementGroupFactory:
    """Return what Ray reserves for a job."""
    from ray.tune import PlacementGroupFactory

    where = preflight.elsewhere(job.resources, job.avoid) if job.avoid else None
    options: dict[str, Any] = {"bundle_label_selector": [where]} if where else {}
    return PlacementGroupFactory([dict(job.resources)], **options)


def adapters(run: Monitor) -> tuple[Searcher, TrialScheduler]:
    """Return what Tune asks for the next trial, and what it calls at each turn of its loop.

    The latter is a scheduler that leaves the order alone. A callback of Tune's would do too, but
    with the first one Tune imports MLflow and all else that it could call back, for seconds.
    """
    from ray import cloudpickle
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    attempts: dict[str, str] = {}
    """Tune's id of a trial -> our attempt."""
    ended = 0
    """Trials that have ended since Tune last forgot them."""

    class Feed(Searcher):
        begun = False

        def suggest(  # type: ignore[override]  # FINISHED is a string
            self, trial_id: str
        ) -> dict[str, Any] | str | None:
            # With nothing running Tune asks here and turns no further.
            if not self.begun:
                self.begun = True
                run.context.interrupts.catch()  # Tune takes SIGUSR1 at its start
            run.poll()
            if run.finished:
                return Searcher.FINISHED
            job = run.next()
            if job is None:
                return None
            attempts[trial_id] = job.attempt
            return {"job": job}

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            nonlocal ended
            ended += 1
            if not error:
                with run.capture_error():
                    run.ended(attempts.pop(trial_id), result["results"] if result else ())

        def save(self, checkpoint_path: str) -> None:
            pass  # nothing of Tune's is ever restored

        restore = save

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()  # Tune keeps a copy of what it was given, for the same purpose

    class Watch(FIFOScheduler):
        def choose_trial_to_run(self, tune_controller: Any) -> None:
            """Called at each turn; None leaves Tune's own order, and spares it a look at all."""
            run.poll()
            nonlocal ended
            if ended >= FORGET_EVERY:
                ended = 0
                _forget_ended(tune_controller)

        def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
            error: BaseException | None = None
            # Not every exception survives being written and read.
            with suppress(Exception), open(trial.pickled_error_file, "rb") as file:
                error = cloudpickle.load(file)
            # Tune comes here, too, where its own handling of a trial that has ended fails.
            if (attempt := attempts.pop(trial.trial_id, None)) is not None:
                with run.capture_error():
                    run.lost(attempt, error)

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()

    return Feed(), Watch()  # type: ignore[no-untyped-call]


def _forget_ended(controller: Any) -> None:
    """Take out of Tune's lists the trials that have ended; there is no call of its own for it."""
    trials: list[Trial] = controller.get_trials()
    # Those that are being ended, or whose worker is being handed on, are still needed.
    needed = set(controller._trial_to_actor)
    ended = {trial for trial in trials[:-1] if trial.status in ("TERMINATED", "ERROR")} - needed
    trials[:] = [trial for trial in trials if trial not in ended]
    for name in ("_stopped_trials", "_failed_trials", "_live_trials", "_trials_to_cache"):
        getattr(controller, name).difference_update(ended)
    # What prints tables, and is told not to, notes each trial all the same.
    for callback in controller._callbacks._callbacks:
        for noted in vars(callback).values():
            if isinstance(noted, set):
                noted.difference_update(ended)
            elif isinstance(noted, dict):
                for trial in ended & noted.keys():
                    del noted[trial]
    for trial in ended:
        controller._cached_trial_decisions.pop(trial.trial_id, None)
