"""Points that an adaptive sampler asks for, by Optuna.

A point is a function of the study's identity and of the results that the sampler is told, in a
fixed order: each is asked of a sampler made anew, with a seed of its own. Optuna's own resuming
would go on with another generator.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweep.sweepfile.tuning_spec import RangeSpec, Setting, TuneSpec, rounded

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

ASKED = 20
"""Times that a sampler is asked for a point that has not been tried."""


def optuna_module() -> Any:
    """Return Optuna, silent; imported when it is asked for, since few commands need it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def direction(tune: TuneSpec) -> str:
    """Return Optuna's word for what is better of `tune.by`."""
    return "maximize" if tune.higher else "minimize"


@functools.lru_cache(maxsize=100_000)
def suggested(
    key: str,
    tune: TuneSpec,
    ended: tuple[tuple[Setting, float | None], ...],
    asked: tuple[Setting, ...],
) -> Setting | None:
    """Return the next point of an adaptive sampler; None if it cannot be asked here.

    Args:
        key: What the draws follow from.
        tune: What is tuned.
        ended: The points that have ended, in the order of asking, with what they are compared by.
        asked: Those of its own generation, which count as running.
    """
    if tune.sampler == "gp" and importlib.util.find_spec("torch") is None:
        return None
    optuna = optuna_module()
    tried = {setting for setting, _ in ended} | set(asked)
    setting: Setting = (*asked, *(one for one, _ in ended))[-1]
    distributions = {name: distribution(space) for name, space in tune.spaces.items()}
    with warnings.catch_warnings():  # Optuna calls the constant liar experimental.
        warnings.simplefilter("ignore")
        for attempt in range(ASKED):
            text = f"{key} {len(ended) + len(asked)} {attempt}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            study = optuna.create_study(direction=direction(tune), sampler=_sampler(tune, seed))
            study.add_trials([frozen(one, value, tune) for one, value in _penalised(tune, ended)])
            study.add_trials([frozen(one, None, tune, running=True) for one in asked])
            trial = study.ask()
            values: dict[str, Any] = {}
            # What others depend on first.
            for name in sorted(tune.spaces, key=lambda name: bool(tune.spaces[name].when)):
                if tune.spaces[name].applies(values):
                    values[name] = _suggest(trial, name, distributions[name])
            setting = tune.setting(values)
            if setting not in tried:
                break
    return setting


def _sampler(tune: TuneSpec, seed: int) -> Any:
    samplers = optuna_module().samplers
    if tune.sampler == "tpe":
        liar = tune.generation > 1
        return samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=liar)
    # Points that run are reckoned with by the acquisition itself; fields with a condition are drawn
    # at random.
    return samplers.GPSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)


def _penalised(
    tune: TuneSpec, ended: Sequence[tuple[Setting, float | None]]
) -> Sequence[tuple[Setting, float | None]]:
    # TPE takes what has no figure for the worst; a Gaussian process would not hear of it.
    values = [value for _, value in ended if value is not None]
    if tune.sampler == "tpe" or not values:
        return ended
    worst = min(values) if direction(tune) == "maximize" else max(values)
    return [(setting, worst if value is None else value) for setting, value in ended]


def _suggest(trial: Trial, name: str, space: Any) -> Any:
    distributions = optuna_module().distributions
    if isinstance(space, distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, distributions.IntDistribution):
        return trial.suggest_int(name, space.low, space.high)
    return rounded(trial.suggest_float(name, space.low, space.high, log=space.log))


def distribution(space: RangeSpec, value: Any = None) -> Any:
    """Return a range as Optuna has it, widened to hold a value that another file may have tried."""
    distributions = optuna_module().distributions
    if space.values is not None:
        return distributions.CategoricalDistribution(space.values)
    ends = space.log or space.uniform or space.whole
    assert ends is not None
    low, high = ends if value is None else (min(value, ends[0]), max(value, ends[1]))
    if space.whole is not None:
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=space.log is not None)


def frozen(
    setting: Setting,
    value: float | None,
    tune: TuneSpec,
    *,
    running: bool = False,
    pruned_at: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """Return a point as Optuna keeps it.

    One that diverged is pruned without a figure, which TPE takes for worse than all others.

    Args:
        setting: What each tuned field is set to.
        value: What it is compared by; None of one that diverged or is running.
        tune: What is tuned.
        running: Whether it has not ended.
        pruned_at: The step at which it was given up.
        attributes: What is noted of it.
    """
    trial = optuna_module().trial
    whole = value is not None and pruned_at is None
    ended = trial.TrialState.COMPLETE if whole else trial.TrialState.PRUNED
    return trial.create_trial(  # type: ignore[no-any-return]
        state=trial.TrialState.RUNNING if running else ended,
        value=value if whole else None,
        params=dict(setting),
        distributions={name: distribution(tune.spaces[name], at) for name, at in setting},
        intermediate_values={} if pruned_at is None else {pruned_at: value},
        user_attrs=dict(attributes or {}),
    )
