"""The trainer: K trials over one backbone, as an iterator of records.

It owns no policy: whoever iterates decides when to log, save or stop. A step draws each member's
batch, runs one forward and one backward for all, clips and updates each member by itself. Random
numbers are functions of (seed, step), so the state to resume is the trained tensors, the
optimizer's moments and a few figures, never the frozen backbone; a resumed trial ends on the CPU in
fp32 bit for bit as one that was never interrupted.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from fpt import exactness, groups, random_streams
from fpt.backbones import weights as backbone_weights
from fpt.checkpoints import Figures, State
from fpt.config import OptimizerConfig, TrialConfig
from fpt.files import DataError
from fpt.model import Model, Weights, build_model
from fpt.pack_layers import SharedLinear
from fpt.packing import pack_key, packs
from fpt.precision import AMX, cpu_capabilities, refusal
from fpt.tasks.base import FIXED_SET_SEED, Batch, Splits, Stored

EVALUATION_TOKENS = 8192
"""Tokens of one forward pass in evaluation. Fixed, so that a pack does not change the sums."""

FEATURES_BYTES = 2**29
"""Features of one set of examples that are kept for one trial, at most."""


@dataclass(frozen=True)
class Record:
    """Figures of one trial at one step."""

    trial: int
    """Index of the trial in the list given to `train`."""
    step: int
    """Optimizer steps done."""
    split: Literal["train", "validation", "test"]
    """train: mean over the steps since the last such record, dropout on. The others: a whole set
    (protocol sound), or the random batches of the protocol paper."""
    loss: float
    """Mean cross entropy, in nats."""
    accuracy: float
    """Fraction of predictions that are right."""
    seconds: float
    """Training seconds of the trial so far, over all its attempts."""
    examples: int
    """Training examples seen so far."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    outcome: Literal["done", "diverged"]
    stopped: Literal["steps", "plateau", "diverged"]
    steps: int
    """Optimizer steps trained."""
    best_step: int | None
    """The step whose checkpoint was tested (paper: whose test batches scored best)."""
    train_loss: float | None
    """Of the last window between evaluations, dropout on."""
    train_accuracy: float | None
    validation_loss: float | None
    """At `best_step`."""
    validation_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    training_set_loss: float | None
    """Of `evaluation.training_set` training examples, with the picked checkpoint, without dropout
    and augmentation."""
    training_set_accuracy: float | None
    seconds: float
    examples: int
    groups: dict[str, dict[str, int]]
    """Group -> tensors, parameters, and how many of the parameters train."""
    backbone_digest: str
    """SHA-256 of the backbone's initial weights."""
    data_digest: str | None
    state: State


class _Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) on one member's tensors, by torch's fused kernel.

    What torch.optim.Adam computes, to the bit; but its Python, called for every member at every
    step, takes a tenth of a small member's step.
    """

    def __init__(self, rule: OptimizerConfig, device: torch.device) -> None:
        self._rule = rule
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        """Name -> first and second moment, of tensors that ever had a gradient."""
        self.steps = torch.zeros((), device=device)
        """Updates made."""

    @torch.no_grad()
    def step(self, parameters: Mapping[str, Tensor], rate: float, skip: Tensor) -> None:
        """Update parameters by their gradients; none of it where `skip` is 1, on the device."""
        for name, parameter in parameters.items():
            if name not in self.moments:
                self.moments[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = zip(*(self.moments[name] for name in parameters), strict=True)
        self.steps += 1
        torch._fused_adam_(
            list(parameters.values()),
            [p.grad for p in parameters.values() if p.grad is not None],
            first,
            second,
            [],
            [self.steps] * len(parameters),
            lr=rate,
            beta1=self._rule.beta1,
            beta2=self._rule.beta2,
            weight_decay=0.0,
            eps=self._rule.epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        self.steps -= skip


@dataclass
class _Member:
    """One trial of the pack while it trains."""

    index: int
    trial: TrialConfig
    parameters: dict[str, torch.nn.Parameter]
    optimizer: _Adam
    figures: Figures
    own_batches: Iterator[Any] | None
    best: dict[str, Tensor] = field(default_factory=dict)
    """Copy of the picked checkpoint; empty while the current tensors are it."""
    bad: Tensor = field(default_factory=lambda: torch.zeros(()))
    """1 from the first loss or gradient on that is not finite: Adam then skips the update."""
    window: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    recent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @functools.cached_property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.parameters.items() if p.requires_grad}

    @property
    def over(self) -> Literal["steps", "plateau"] | None:
        """Why its training has ended, by its figures; None: it goes on."""
        stop = self.trial.stop
        if self.figures.step >= self.trial.steps:
            return "steps"
        return "plateau" if stop is not None and self.figures.stale >= stop.patience else None

    def rate(self) -> float:
        """The learning rate of the step to come."""
        done, total = self.figures.step, self.trial.steps
        rule = self.trial.optimizer
        rate = self.trial.learning_rate
        if done < rule.warmup:
            return rate * (done + 1) / rule.warmup
        if rule.schedule == "cosine":
            part = (done - rule.warmup) / max(1, total - rule.warmup)
            return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))
        return rate


class _Features:
    """What a frozen model makes of a finite set of examples, each computed when first wanted."""

    def __init__(self, examples: Stored) -> None:
        self._examples = examples
        self._known = np.zeros(len(examples), dtype=bool)
        self._values: Tensor | None = None

    def take(self, index: np.ndarray, chunk: int, compute: Callable[[Batch], Tensor]) -> Tensor:
        """(len(index), read-out tokens, W); `compute` makes what is new, `chunk` at a time.

        It is handed in and not kept: a cycle would hold the model until the collector runs.
        """
        new = np.unique(index[~self._known[index]])
        for start in range(0, len(new), chunk):
            rows = new[start : start + chunk]
            made = compute(self._examples.plain(rows))
            if self._values is None:
                self._values = made.new_empty(len(self._known), *made.shape[1:])
            self._values[torch.from_numpy(rows)] = made
        self._known[new] = True
        assert self._values is not None
        return self._values[torch.from_numpy(index)]


class Training(Iterator[Record]):
    """The iterator that `train` returns."""

    def __init__(
        self,
        model: Model,
        splits: Splits,
        device: torch.device,
        states: Sequence[State | None],
        batches: Sequence[Iterable[Any]] | None,
        log_every: Sequence[int | None],
        accumulation: int,
    ) -> None:
        """See `train`."""
        self.model = model.to(device)
        self.device = device
        self.log_every = log_every
        self.accumulation = accumulation
        self.outcomes: dict[int, Outcome] = {}
        """Index of a trial -> how it ended; complete when the iteration ends."""
        self.failures: dict[int, Exception] = {}
        """Index of a trial -> what making its training data raised. It has left without an outcome,
        the others go on; when they have ended, the first of these is raised."""
        self._splits = splits
        self._queue: deque[Record] = deque()
        self._began = time.perf_counter()
        self._members = [
            self._enrol(k, trial, states[k], batches) for k, trial in enumerate(model.trials)
        ]
        self._live = list(self._members)
        self._features: dict[tuple[int, int], _Features] = {}
        self._frozen = self._frozen_digest()
        # On a GPU the next batch is made and copied while the device computes; on a CPU it would
        # only compete for the core.
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next: Future[list[Batch | Exception]] | None = None
        first = model.trials[0]
        self._may_be_exact = device.type == "cpu" and first.numerics == "fp32" and packs(first)
        """Whether packs are to change no bit."""
        self._row_multiple = exactness.row_multiple(model) if self._may_be_exact else 0
        for module in model.modules() if self._row_multiple else ():
            if isinstance(module, SharedLinear):
                module.row_multiple = self._row_multiple

    def _enrol(
        self,
        k: int,
        trial: TrialConfig,
        state: State | None,
        batches: Sequence[Iterable[Any]] | None,
    ) -> _Member:
        parameters = self.model.member(k)
        optimizer = _Adam(trial.optimizer, self.device)
        own = None if batches is None else iter(batches[k])
        member = _Member(k, trial, parameters, optimizer, Figures(), own)
        member.bad = member.bad.to(self.device)
        member.window = member.window.to(self.device)
        member.recent = member.recent.to(self.device)
        if state is not None:
            self._restore(member, state)
        return member

    def _restore(self, member: _Member, state: State) -> None:
        now, first, second = (state.part(name) for name in ("now", "first", "second"))
        if set(now) != set(self._kept(member)):
            raise ValueError("state: it is of a trial that trains other parameters")
        self.model.load(member.index, now)
        for name in member.trained:
            if name in first:
                member.optimizer.moments[name] = (
                    first[name].to(self.device).clone(),
                    second[name].to(self.device).clone(),
                )
        member.optimizer.steps.fill_(state.step)
        member.figures = Figures(**asdict(state.figures))
        # A state whose current tensors are the picked ones holds them once.
        picked = now if state.figures.best_step == state.step else state.part("best")
        member.best = {name: tensor.clone() for name, tensor in picked.items()}
        sums = [state.figures.window_loss, state.figures.window_accuracy]
        member.window = torch.tensor(sums, dtype=torch.float64, device=self.device)
        sums = [state.figures.recent_loss, state.figures.recent_accuracy]
        member.recent = torch.tensor(sums, dtype=torch.float64, device=self.device)

    @property
    def settled(self) -> bool:
        """True when every record of the step at hand has been handed out: the time to save."""
        return not self._queue

    @functools.cached_property
    def row_padding(self) -> int | None:
        """What rows of shared products are padded to a multiple of, for these members to have the
        same bits as alone on this processor: measured. 0: nothing tried does, and each of them
        should train by itself. None: no pack of such trials, or on such a device, is exact.

        A caller's own batches are taken as they come, and nothing is measured of them.
        """
        if not self._may_be_exact:
            return None
        if not self._row_multiple or len(self._live) == 1:
            return self._row_multiple
        live, pack = self._live, self.model.members
        if any(member.own_batches is not None for member in live):
            return self._row_multiple
        drawn = [self._try_batch(member, member.figures.step) for member in live]
        batches = [batch for batch in drawn if isinstance(batch, Batch)]
        if len(batches) < len(live):
            return self._row_multiple  # what is wrong is raised when the step comes
        rows = [0] * len(self._members)
        for member in live:
            rows[member.index] = member.trial.batch_size
            pack.steps[member.index] = member.figures.step

        def forward(members: Sequence[int]) -> Tensor:
            chosen = [b for m, b in zip(live, batches, strict=True) if m.index in members]
            logits: Tensor = self.model(*self._tensors(chosen))
            return logits

        kind = pack_key(live[0].trial), tuple(m.trial.dropout > 0 for m in live)
        exact = exactness.members_are_exact(kind, self.model, rows, forward)
        return self._row_multiple if exact else 0

    def states(self) -> dict[int, State]:
        """States of the trials still training, by index.

        Meant for when `settled` is true: a record of this step that was not handed out yet would
        not come again after a resume.
        """
        return {m.index: self._state(m) for m in self._live}

    def backbone(self, trial: int) -> bytes:
        """A safetensors file of the backbone of a trial that has ended, by its own names.

        It is that of the picked checkpoint, which the trial's figures are of.
        """
        picked = self.outcomes[trial].state.checkpoint()
        parameters = self._members[trial].parameters
        own = {
            name.removeprefix(groups.PREFIX): picked.get(name, p)
            for name, p in {**parameters, **self.model.own_buffers()}.items()
            if name.startswith(groups.PREFIX)
        }
        function = self.model.function
        known = {backbone_weights.FUNCTION: function} if function else {}
        return backbone_weights.to_bytes(own, known)

    def stop(self, trial: int) -> None:
        """Let a trial leave now, without an outcome; the others go on unchanged."""
        self._live = [m for m in self._live if m.index != trial]

    def __next__(self) -> Record:
        """The next record; trains until there is one."""
        while not self._queue:
            self._queue.extend(self.step())
        return self._queue.popleft()

    def step(self) -> list[Record]:
        """Train one step of every trial that still trains.

        Returns:
            The records that came of it, often none, and those that iterating has left.

        Raises:
            StopIteration: If all trials have ended or left.
        """
        if not self._queue:
            if not self._live:
                if self._pool is not None:
                    self._pool.shutdown()
                for failure in self.failures.values():
                    raise failure
                raise StopIteration
            self._advance()
        records = list(self._queue)
        self._queue.clear()
        return records

    # One step

    def _advance(self) -> None:
        """Train one step, and whatever is due after it."""
        for member in list(self._live):
            if (why := member.over) is not None:
                self._end(member, why)  # a state of a trial that had already ended
        if not self._live:
            return
        self._train_step()
        for member in list(self._live):
            step = member.figures.step
            evaluate = step % member.trial.evaluation.every == 0 or step == member.trial.steps
            every = self.log_every[member.index]
            log = every is not None and step % every == 0
            if not (evaluate or log):
                continue
            if bool(member.bad):
                self._diverged(member)
                continue
            self._tick()
            self._log_training(member)
            if evaluate:
                self._close_window(member)
                self._evaluate(member)

    def _train_step(self) -> None:
        batches = self._batches()
        live = self._live
        if not live:
            return
        self.model.train()
        parts = min(self.accumulation, *map(len, batches)) if self.accumulation > 1 else 1
        losses = [torch.zeros((), device=self.device) for _ in live]
        for part in range(parts):
            cuts = [slice(part * len(b) // parts, (part + 1) * len(b) // parts) for b in batches]
            for number, loss in enumerate(self._backward(batches, cuts)):
                losses[number] += loss
        self.model.members.part = None
        for member, loss in zip(live, losses, strict=True):
            self._update(member, loss)

    def _backward(self, batches: Sequence[Batch], cuts: Sequence[slice]) -> list[Tensor]:
        """Add the gradients of these rows of the batches, each row weighing the same in its batch;
        returns the rows' part of each member's loss.
        """
        live, pack = self._live, self.model.members
        pack.rows = [0] * len(self.model.trials)
        pack.part = [(0, 0)] * len(self.model.trials)
        for member, batch, cut in zip(live, batches, cuts, strict=True):
            pack.rows[member.index] = cut.stop - cut.start
            pack.steps[member.index] = member.figures.step
            pack.part[member.index] = (cut.start, len(batch))
        logits = self._logits(batches, cuts)
        losses = []
        for member, (_, own), batch, cut in zip(
            live, pack.pieces(logits), batches, cuts, strict=True
        ):
            target = self._send(batch.targets[cut])
            share = len(target) / len(batch)
            loss = F.cross_entropy(own.flatten(0, 1), target.flatten()) * share
            with torch.no_grad():
                right = (own.argmax(-1) == target).double().mean() * share
                figures = torch.stack([loss.double(), right])
                member.window += figures
                member.recent += figures
            losses.append(loss)
        torch.autograd.backward(losses)
        return [loss.detach() for loss in losses]

    def _logits(self, batches: Sequence[Batch], cuts: Sequence[slice]) -> Tensor:
        """Of these rows of the batches of the step at hand, members one after another."""
        sets = [self._feature_set(m, self._splits.train) for m in self._live]
        if not all(sets):
            rows = [batch.take(cut) for batch, cut in zip(batches, cuts, strict=True)]
            logits: Tensor = self.model(*self._tensors(rows))
            return logits
        read = []
        for member, features, cut in zip(self._live, sets, cuts, strict=True):
            assert features is not None
            train, trial = self._splits.train, member.trial
            assert isinstance(train, Stored)
            index = train.index(
                trial.seed, random_streams.TRAINING, member.figures.step, trial.batch_size
            )
            compute = functools.partial(self._read, member)
            read.append(features.take(index[cut], self._chunk, compute))
        return self.model.head(torch.cat(read))

    def _feature_set(self, member: _Member, examples: object) -> _Features | None:
        """The features of a set, where they are the same at every step: nothing below the output
        layer trains, nothing is dropped, nothing is augmented, and there is room.
        """
        trial, shape = member.trial, self.model.shape
        if (
            trial.train != ("output",)
            or trial.dropout
            or not isinstance(examples, Stored)
            or examples.augments
            or member.own_batches is not None
            or not trial.backbone.row.packs
            or len(examples) * shape.readout * trial.backbone.width * 4 > FEATURES_BYTES
        ):
            return None
        key = (member.index, id(examples))
        if key not in self._features:
            self._features[key] = _Features(examples)
        return self._features[key]

    @torch.no_grad()
    def _read(self, member: _Member, batch: Batch) -> Tensor:
        """What member's output layer reads of a batch."""
        pack = self.model.members
        rows, pack.rows = pack.rows, [0] * len(self.model.trials)
        pack.rows[member.index] = len(batch)
        read = self.model.features(*self._tensors([batch]))
        pack.rows = rows
        return read

    def _update(self, member: _Member, loss: Tensor) -> None:
        """Clip and apply one member's gradient, without waiting for the device."""
        trained = {n: p for n, p in member.trained.items() if p.grad is not None}
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if member.trial.optimizer.clip is not None:
            clip = member.trial.optimizer.clip
            torch.nn.utils.clip_grads_with_norm_(trained.values(), clip, norm)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        member.bad = torch.maximum(member.bad, (~finite).float())
        member.optimizer.step(trained, member.rate(), member.bad)
        for parameter in trained.values():
            parameter.grad = None
        member.figures.step += 1
        member.figures.window_steps += 1
        member.figures.recent_steps += 1

    def _batches(self) -> list[Batch]:
        """The batches of the step at hand; a trial whose data raises leaves. On a GPU, the batches
        of the next step are begun.
        """
        live = list(self._live)
        steps = [m.figures.step for m in live]

        def make(ahead: int) -> list[Batch | Exception]:
            return [self._try_batch(m, s + ahead) for m, s in zip(live, steps, strict=True)]

        if self._pool is None or any(m.own_batches is not None for m in live):
            made = make(0)
        else:
            ready, self._next = self._next, None
            made = ready.result() if ready is not None else make(0)
            if len(made) != len(live):
                made = make(0)  # a member left in between
            self._next = self._pool.submit(make, 1)
        batches = []
        for member, batch in zip(live, made, strict=True):
            if isinstance(batch, Exception):
                self.failures[member.index] = batch
                self.stop(member.index)
            else:
                batches.append(batch)
        return batches

    def _try_batch(self, member: _Member, step: int) -> Batch | Exception:
        """A batch, or what making it raised: made ahead, that must wait until its step comes."""
        try:
            return self._batch(member, step)
        except Exception as error:
            return error

    def _batch(self, member: _Member, step: int) -> Batch:
        trial = member.trial
        if member.own_batches is None:
            return self._splits.train.batch(
                trial.seed, random_streams.TRAINING, step, trial.batch_size
            )
        try:
            given = next(member.own_batches)
        except StopIteration:
            raise ValueError(
                f"batches: those of trial {member.index} end before step {step + 1} of "
                f"{trial.steps}"
            ) from None
        if not isinstance(given, Batch):
            parts: list[Any] = [None if part is None else np.asarray(part) for part in given]
            given = Batch(*parts)
        batch: Batch = given
        self._check(member, batch)
        return batch

    def _check(self, member: _Member, batch: Batch) -> None:
        """Refuse a caller's batch that would train something else than the trial says.

        Raises:
            ValueError: If a shape is another one, or a class or an id is none.
        """
        shape, size = self.model.shape, member.trial.batch_size
        backbone = member.trial.backbone
        draws = getattr(self.model.backbone, "draws_hidden", False)
        wanted = {
            "inputs": (size, shape.tokens)
            if shape.embedded
            else (size, shape.tokens, shape.inputs),
            "targets": (size, shape.positions),
            "lengths": (size,),
            "hidden": (size, backbone.layers, 2, backbone.width) if draws else None,
        }
        for name, its in wanted.items():
            given = getattr(batch, name)
            if given is not None and given.shape != its:
                raise ValueError(
                    f"batches: {name} of trial {member.index} are {given.shape}; wanted "
                    f"{its or f'none, {backbone.name} begins with no hidden states of its own'}"
                )
        limits = {"targets": (0, shape.classes), "lengths": (1, shape.tokens + 1)}
        limits |= {"inputs": (0, shape.inputs)} if shape.embedded else {}
        for name, (low, high) in limits.items():
            given = getattr(batch, name)
            if given is not None and not (low <= given.min() and given.max() < high):
                raise ValueError(
                    f"batches: {name} of trial {member.index} go from {given.min()} to "
                    f"{given.max()}; wanted {low} to {high - 1}"
                )

    def _send(self, array: np.ndarray) -> Tensor:
        """On the device: vectors in float32, ids and classes (stored as they may be) in int64."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    def _tensors(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = self._send(np.concatenate([b.inputs for b in batches]))
        lengths = [b.lengths for b in batches if b.lengths is not None]
        hidden = [b.hidden for b in batches if b.hidden is not None]
        return (
            inputs,
            self._send(np.concatenate(lengths)) if lengths else None,
            self._send(np.concatenate(hidden)) if hidden else None,
        )

    # What is due after a step

    def _tick(self) -> None:
        """Share out the wall time since the last call among the trials that trained in it."""
        now = time.perf_counter()
        for member in self._live:
            member.figures.seconds += (now - self._began) / len(self._live)
        self._began = now

    def _record(self, member: _Member, split: Any, loss: float, accuracy: float) -> None:
        figures = member.figures
        examples = figures.step * member.trial.batch_size
        self._queue.append(
            Record(member.index, figures.step, split, loss, accuracy, figures.seconds, examples)
        )

    def _log_training(self, member: _Member) -> None:
        loss, accuracy = (member.recent / member.figures.recent_steps).tolist()
        self._record(member, "train", loss, accuracy)
        member.recent = torch.zeros_like(member.recent)
        member.figures.recent_steps = 0

    def _close_window(self, member: _Member) -> None:
        figures = member.figures
        mean = member.window / figures.window_steps
        figures.train_loss, figures.train_accuracy = mean.tolist()
        member.window = torch.zeros_like(member.window)
        figures.window_steps = 0

    def _evaluate(self, member: _Member) -> None:
        figures, trial = member.figures, member.trial
        split: Literal["validation", "test"]
        if self._splits.validation is not None:
            split = "validation"
            loss, accuracy = self._measure_set(member, self._splits.validation)
        else:
            split = "test"
            every, batches = trial.evaluation.every, trial.evaluation.batches
            first = -(-figures.step // every) * batches
            loss, accuracy = self._measure(
                member,
                (
                    self._splits.test.batch(
                        trial.seed, random_streams.EVALUATION, n, trial.batch_size
                    )
                    for n in range(first, first + batches)
                ),
            )
            accuracy *= self._splits.factor
        self._tick()
        self._record(member, split, loss, accuracy)
        best = (figures.best_accuracy, -figures.best_loss) if figures.best_loss is not None else ()
        if figures.best_loss is None or (accuracy, -loss) > best:
            figures.best_step, figures.best_loss, figures.best_accuracy = (
                figures.step,
                loss,
                accuracy,
            )
            member.best = {}
        stop = trial.stop
        if figures.lowest_loss is None or loss < figures.lowest_loss - (
            stop.tolerance if stop else 0
        ):
            figures.lowest_loss, figures.stale = loss, 0
        else:
            figures.stale += 1
        if (why := member.over) is not None:
            self._end(member, why)
        elif figures.best_step == figures.step:
            # The tensors move on with the next step.
            member.best = {n: p.detach().clone() for n, p in self._kept(member).items()}

    def _training_set(self, size: int) -> Iterable[Batch]:
        """`size` training examples (or all, if they are fewer) as they are evaluated; of a task
        that is drawn anew at every step, a fixed draw.
        """
        train = self._splits.train
        if isinstance(train, Stored):
            return train.first(size).chunks(self._chunk)
        sizes = [min(self._chunk, size - start) for start in range(0, size, self._chunk)]
        return (
            train.batch(FIXED_SET_SEED, random_streams.TRAINING, n, rows)
            for n, rows in enumerate(sizes)
        )

    @property
    def _chunk(self) -> int:
        return max(1, EVALUATION_TOKENS // self.model.shape.tokens)

    def _measure_set(self, member: _Member, examples: Stored) -> tuple[float, float]:
        """Mean loss and accuracy over a whole set, dropout off."""
        features = self._feature_set(member, examples)
        return self._measure(member, examples.chunks(self._chunk), features)

    @torch.no_grad()
    def _measure(
        self, member: _Member, batches: Iterable[Batch], features: _Features | None = None
    ) -> tuple[float, float]:
        """Mean loss and accuracy over batches (of which `features` may be known), dropout off."""
        pack = self.model.members
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        count = start = 0
        for number, batch in enumerate(batches):
            pack.rows = [0] * len(self.model.trials)
            pack.rows[member.index] = len(batch)
            pack.chunk = number
            if features is None:
                logits = self.model(*self._tensors([batch]))
            else:
                index = np.arange(start, start + len(batch))
                compute = functools.partial(self._read, member)
                logits = self.model.head(features.take(index, self._chunk, compute))
                start += len(batch)
            logits = logits.flatten(0, 1)
            target = self._send(batch.targets).flatten()
            loss = F.cross_entropy(logits, target, reduction="none").double().sum()
            sums += torch.stack([loss, (logits.argmax(-1) == target).double().sum()])
            count += len(target)
        loss_mean, accuracy = (sums / count).tolist()
        return loss_mean, accuracy

    def _frozen_digest(self) -> str:
        """SHA-256 of all that no member trains."""
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        return backbone_weights.digest(frozen)

    def _diverged(self, member: _Member) -> None:
        """End a member at its last finite step; its figures are those of the last evaluation."""
        member.figures.step = int(member.optimizer.steps)
        self._end(member, "diverged")

    def _end(self, member: _Member, why: Literal["steps", "plateau", "diverged"]) -> None:
        """Read the test set once, with the picked checkpoint, and let the member leave."""
        if self._frozen_digest() != self._frozen:
            raise RuntimeError(
                "frozen weights changed while they were trained on: no figure of this pack can be "
                "trusted; a module of the backbone writes into its weights"
            )
        figures = member.figures
        state = self._state(member)
        validation: tuple[float | None, float | None] = (None, None)
        test: tuple[float | None, float | None] = (figures.best_loss, figures.best_accuracy)
        fitted: tuple[float | None, float | None] = (None, None)
        wanted = member.trial.evaluation.training_set
        if member.best:
            self.model.load(member.index, member.best)
        if self._splits.validation is not None:
            validation, test = test, (None, None)
            if figures.best_step is not None and isinstance(self._splits.test, Stored):
                test = self._measure_set(member, self._splits.test)
                self._record(member, "test", *test)
        if wanted and figures.best_step is not None:
            fitted = self._measure(member, self._training_set(wanted))
        self._tick()
        if member.best:
            self.model.load(member.index, state.part("now"))
        self.outcomes[member.index] = Outcome(
            outcome="diverged" if why == "diverged" else "done",
            stopped=why,
            steps=figures.step,
            best_step=figures.best_step,
            train_loss=figures.train_loss,
            train_accuracy=figures.train_accuracy,
            validation_loss=validation[0],
            validation_accuracy=validation[1],
            test_loss=test[0],
            test_accuracy=test[1],
            training_set_loss=fitted[0],
            training_set_accuracy=fitted[1],
            seconds=figures.seconds,
            examples=figures.step * member.trial.batch_size,
            groups=self.model.counts(),
            backbone_digest=self.model.backbone_digest,
            data_digest=self._splits.digest,
            state=state,
        )
        self.stop(member.index)

    def _kept(self, member: _Member) -> dict[str, Tensor]:
        """Return what of a member changes in training, by canonical name."""
        return {**member.trained, **self.model.own_buffers()}

    def _state(self, member: _Member) -> State:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._kept(member).items():
            tensors[f"now/{name}"] = parameter.detach().cpu().clone()
            if name in member.optimizer.moments:
                first, second = member.optimizer.moments[name]
                tensors[f"first/{name}"] = first.cpu().clone()
                tensors[f"second/{name}"] = second.cpu().clone()
            if member.best and member.figures.best_step != member.figures.step:
                tensors[f"best/{name}"] = member.best[name].cpu().clone()
        figures = Figures(**asdict(member.figures))
        figures.window_loss, figures.window_accuracy = member.window.tolist()
        figures.recent_loss, figures.recent_accuracy = member.recent.tolist()
        trial = member.trial
        return State(trial.model_dump(mode="json"), figures, tensors, trial.own_code)


def train(
    trials: Sequence[TrialConfig],
    *,
    device: str | torch.device = "cpu",
    state: Sequence[State | None] | None = None,
    batches: Sequence[Iterable[Any]] | None = None,
    weights: Weights | Sequence[Weights] | None = None,
    backbones: Mapping[str, Path] | None = None,
    log_every: int | Sequence[int] | None = None,
    accumulation: int = 1,
) -> Training:
    """Train trials that can be packed, side by side.

    Args:
        trials: One or more; see `fpt.model.check_packable`.
        device: "cpu", "cuda", "cuda:1", …
        state: For each trial the state to go on from, or None. A state of the same trial with fewer
            steps (constant rate, no stop rule, its steps a multiple of `evaluation.every`) extends
            it, and ends as if it had been one run.
        batches: A caller's own training data: for each trial an iterable that gives a batch a step,
            as `Batch` or (inputs, targets[, lengths[, hidden]]); shapes as in
            `fpt.tasks.base.Batch`. After a resume it must begin at the state's step.
        weights: A caller's own initial values; see `fpt.model.build_model`.
        backbones: Id of a trial -> safetensors file of the backbone that it trained.
        log_every: Steps between records of the split train, for all trials or for each of them;
            evaluations come with one in any case. It changes no figure of an outcome.
        accumulation: Parts in which the gradient of each batch is computed, one after another, for
            want of memory. Examples and dropout masks stay the same; sums are taken in another
            order, so that figures differ in their last digits.

    Returns:
        An iterator of records, with `outcomes` and `states()`.

    Raises:
        DataError: If data or weights are missing, or the device cannot train in such numerics.
        ValueError: If the trials cannot be packed, or an argument does not fit them.
    """
    cuda = torch.device(device).type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else None
    if accumulation < 1:
        raise ValueError(f"accumulation: {accumulation} parts of a batch; at least 1")
    if trials and (problem := refusal(trials[0].numerics, capability)):
        raise DataError(problem)
    bf16 = bool(trials) and trials[0].numerics == "bf16" and not cuda
    vectors = bf16 and AMX not in (cpu_capabilities() or ())
    if vectors and not exactness.bfloat16_is_faster():
        raise DataError(
            "numerics bf16: products in bfloat16 were measured to be no faster than in fp32 on "
            "this processor; use numerics fp32"
        )
    every = [log_every] * len(trials) if isinstance(log_every, int | None) else log_every
    for name, given in (("state", state), ("batches", batches), ("log_every", every)):
        if given is not None and len(given) != len(trials):
            raise ValueError(f"{name}: {len(given)} given for {len(trials)} trials")
    model = build_model(trials, weights=weights, backbones=backbones)
    first = trials[0]
    if any((t.task, t.protocol) != (first.task, first.protocol) for t in trials):
        raise ValueError("trials of one pack share task and protocol; these do not")
    # fp32 means fp32: no TF32 products on a GPU, and sums of bfloat16 products in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    splits = first.task.splits(first.protocol)
    if first.protocol == "sound" and splits.validation is None:
        raise DataError(f"task {first.task.name}: has no validation split, which sound needs")
    return Training(
        model,
        splits,
        torch.device(device),
        state or [None] * len(trials),
        batches,
        every,
        accumulation,
    )
