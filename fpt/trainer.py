"""The trainer: K trials over one backbone, as an iterator of records.

It owns no policy: whoever iterates decides when to log, save or stop. A step draws each member's
batch, runs one forward and one backward for all, clips and updates each member by itself. Random
numbers are functions of (seed, step), so the state to resume is the trained tensors, the
optimizer's moments and a few figures, never the frozen backbone; a resumed trial ends on the CPU in
fp32 bit for bit as one that was never interrupted.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fpt import exactness, groups
from fpt.backbones import weights as backbone_weights
from fpt.checkpoints import State
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.metrics import SPLITS, on_split
from fpt.model import Model, Weights, build_model
from fpt.pack_layers import Product
from fpt.packing import pack_key, packs
from fpt.precision import AMX, cpu_capabilities, refusal
from fpt.tasks.base import Batch, Splits, Stored
from fpt.training.evaluation import Evaluator, Measured, note
from fpt.training.features import FeatureCache
from fpt.training.feeding import Feeding, inputs_of
from fpt.training.grouped import GroupedUpdate, can_group
from fpt.training.member import Member
from fpt.training.replay import DeviceStepper
from fpt.training.stepping import Stepper
from fpt.training.supply import HostBatches, Supply, supply_of


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
    """Mean cross entropy, in nats; of loss mse, the mean squared error."""
    accuracy: float | None
    """Fraction of predictions that are right; None of loss mse."""
    seconds: float
    """Training seconds of the trial so far, over all its attempts."""
    examples: int
    """Training examples seen so far."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """The task's own, by name; of the split train none."""


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
    cpu_seconds: float
    examples: int
    groups: dict[str, dict[str, int]]
    """Group -> tensors, parameters, and how many of the parameters train."""
    backbone_digest: str
    """SHA-256 of the backbone's initial weights."""
    data_digest: str | None
    state: State
    metrics: dict[str, float | None] = field(default_factory=dict)
    """The task's own metrics, by split and name: `test_r2`."""


def _clocks() -> tuple[float, float]:
    """Return seconds of the wall clock, and of CPU time of all threads of this process."""
    return time.perf_counter(), time.process_time()


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
        *,
        device_path: bool,
        graphs: bool,
    ) -> None:
        """See `train`."""
        self.model = model.to(device)
        self.device = device
        self.log_every = log_every
        self.outcomes: dict[int, Outcome] = {}
        """Index of a trial -> how it ended; complete when the iteration ends."""
        self.failures: dict[int, Exception] = {}
        """Index of a trial -> what making its training data raised. It has left without an outcome,
        the others go on; when they have ended, the first of these is raised."""
        self._splits = splits
        self._queue: deque[Record] = deque()
        self._began = _clocks()
        own = [None if batches is None else iter(batches[k]) for k in range(len(model.trials))]
        self._members = [Member.of(self.model, k, own[k]) for k in range(len(own))]
        grouped = device_path and can_group(model)
        update = GroupedUpdate(self._members, device) if grouped else None
        for member, state in zip(self._members, states, strict=True):
            if state is not None:
                member.restore(self.model, state)
        self._live = list(self._members)
        self._frozen = self._frozen_digests((None, *range(len(own))))
        self._together = device_path
        model.members.device_path = device_path
        self._features = FeatureCache(model)
        common = model, splits.train, self._features, device, accumulation
        supply: Supply | None = None
        self._stepper: Stepper | DeviceStepper
        if update is None:
            self._stepper = Stepper(*common)
        else:
            theirs = batches is not None
            supply = HostBatches(splits.train) if theirs else supply_of(splits.train, device)
            self._stepper = DeviceStepper(*common, update, supply, graphs=graphs)
        self._feeding = Feeding(model, splits.train, device, supply)
        self._evaluator = Evaluator(model, splits, self._features, device, together=device_path)
        first = model.trials[0]
        self._may_be_exact = not device_path and first.numerics == "fp32" and packs(first)
        """Whether packs are to change no bit."""
        self._row_multiple = exactness.row_multiple(model) if self._may_be_exact else 0
        for module in model.modules() if self._row_multiple or device_path else ():
            if isinstance(module, Product):
                module.row_multiple = self._row_multiple or 1  # a device is exact in no padding

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
        drawn = [self._feeding.try_batch(member, member.figures.step) for member in live]
        batches = [batch for batch in drawn if isinstance(batch, Batch)]
        if len(batches) < len(live):
            return self._row_multiple  # what is wrong is raised when the step comes
        rows = [0] * len(self._members)
        for member in live:
            rows[member.index] = member.trial.batch_size

        def forward(members: Sequence[int]) -> Tensor:
            chosen = [b for m, b in zip(live, batches, strict=True) if m.index in members]
            logits: Tensor = self.model(*inputs_of(chosen, self.device))
            return logits

        kind = pack_key(live[0].trial), tuple(m.trial.dropout > 0 for m in live)
        with pack.batch({}, steps={member.index: member.figures.step for member in live}):
            exact = exactness.members_are_exact(kind, self.model, rows, forward)
        return self._row_multiple if exact else 0

    def states(self) -> dict[int, State]:
        """States of the trials still training, by index.

        Meant for when `settled` is true: a record of this step that was not handed out yet would
        not come again after a resume.
        """
        return {m.index: m.state(self.model) for m in self._live}

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
                self._feeding.close()
                for failure in self.failures.values():
                    raise failure
                raise StopIteration
            self._advance()
        records = list(self._queue)
        self._queue.clear()
        return records

    def _advance(self) -> None:
        """Train one step, and whatever is due after it."""
        for member in list(self._live):
            if (why := member.stop_reason) is not None:
                self._end([(member, why)])  # a state of a trial that had already ended
        batches = self._batches()
        if not self._live:
            return
        self._stepper.step(self._live, batches)
        due = [member for member in self._live if self._evaluates(member) or self._logs(member)]
        for group in [due] if self._together and due else [[member] for member in due]:
            self._report(group)

    def _evaluates(self, member: Member) -> bool:
        step = member.figures.step
        return step % member.trial.evaluation.every == 0 or step == member.trial.steps

    def _logs(self, member: Member) -> bool:
        every = self.log_every[member.index]
        return every is not None and member.figures.step % every == 0

    def _report(self, group: Sequence[Member]) -> None:
        """Do what is due after a step: records, evaluations, ends."""
        # One wait for the device, for all that is read of it.
        sums = torch.stack([torch.cat([m.recent, m.window, m.non_finite[None]]) for m in group])
        healthy = []
        for member, (*own, non_finite) in zip(group, sums.tolist(), strict=True):
            if non_finite:
                self._diverged(member)
                continue
            self._tick()
            self._record(member, "train", *member.take_recent(*own[:2]))
            if self._evaluates(member):
                member.close_window(*own[2:])
                healthy.append(member)
        if healthy:
            self._evaluate(healthy)

    def _batches(self) -> list[Any]:
        """Return the batches of the step at hand; a trial whose data raises leaves."""
        batches: list[Any] = []
        made = self._feeding.batches(self._live)
        for member, batch in zip(list(self._live), made, strict=True):
            if isinstance(batch, Exception):
                self.failures[member.index] = batch
                self.stop(member.index)
            else:
                batches.append(batch)
        return batches

    def _tick(self) -> None:
        """Share out the time since the last call among the trials that trained in it."""
        now, (wall, cpu) = _clocks(), self._began
        for member in self._live:
            member.figures.seconds += (now[0] - wall) / len(self._live)
            member.figures.cpu_seconds += (now[1] - cpu) / len(self._live)
        self._began = now

    def _record(
        self,
        member: Member,
        split: Any,
        loss: float,
        accuracy: float | None,
        metrics: Mapping[str, float | None] | None = None,
    ) -> None:
        step, seconds = member.figures.step, member.figures.seconds
        examples = step * member.trial.batch_size
        own = dict(metrics or {})
        self._queue.append(
            Record(member.index, step, split, loss, accuracy, seconds, examples, own)
        )

    def _evaluate(self, members: Sequence[Member]) -> None:
        """Measure members, and keep the tensors of each where they are the best so far."""
        measured = self._evaluator.measure(members)
        self._tick()
        ending: list[tuple[Member, Literal["steps", "plateau"]]] = []
        for member, found in zip(members, measured, strict=True):
            self._record(member, self._evaluator.split, *found)
            figures = member.figures
            note(found, figures, member.trial.stop)
            picked = figures.best_step == figures.step
            if picked:
                member.best = {}
            if (why := member.stop_reason) is not None:
                ending.append((member, why))
            elif picked:
                # The tensors move on with the next step.
                member.best = {n: p.detach().clone() for n, p in member.kept(self.model).items()}
        if ending:
            self._end(ending)

    def _frozen_digests(self, owners: Iterable[int | None]) -> dict[int | None, str]:
        """SHA-256 of what does not train: of each member's own, and (None) of what all share."""
        own: dict[int | None, dict[str, Tensor]] = {owner: {} for owner in owners}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad and (owner := self.model.canonical(name)[1]) in own:
                own[owner][name] = parameter
        return {owner: backbone_weights.digest(tensors) for owner, tensors in own.items()}

    def _diverged(self, member: Member) -> None:
        """End a member at its last finite step; its figures are those of the last evaluation."""
        member.figures.step = int(member.optimizer.steps)
        self._end([(member, "diverged")])

    def _end(
        self, ending: Sequence[tuple[Member, Literal["steps", "plateau", "diverged"]]]
    ) -> None:
        """Read the test set once, with the picked checkpoints, and let the members leave."""
        owners = (None, *(member.index for member, _ in ending))
        now = self._frozen_digests(owners)
        if any(digest != self._frozen[owner] for owner, digest in now.items()):
            raise RuntimeError(
                "frozen weights changed while they were trained on: no figure of this pack can be "
                "trusted; a module of the backbone writes into its weights"
            )
        states = {member.index: member.state(self.model) for member, _ in ending}
        for member, _ in ending:
            if member.best:
                self.model.load(member.index, member.best)
        picked = [member for member, _ in ending if member.figures.best_step is not None]
        tested: dict[int, Measured] = {}
        if self._splits.validation is not None and isinstance(self._splits.test, Stored) and picked:
            found = self._evaluator.measure_test(picked)
            tested = {member.index: test for member, test in zip(picked, found, strict=True)}
        fitted = {
            member.index: self._evaluator.measure_training(member, wanted)
            for member in picked
            if (wanted := member.trial.evaluation.training_set)
        }
        for member in picked:
            if member.index in tested:
                self._record(member, "test", *tested[member.index])
        self._tick()
        for member, why in ending:
            if member.best:
                self.model.load(member.index, states[member.index].part("now"))
            self._leave(member, why, states[member.index], tested, fitted)

    def _leave(
        self,
        member: Member,
        why: Literal["steps", "plateau", "diverged"],
        state: State,
        tested: Mapping[int, Measured],
        fitted: Mapping[int, Measured],
    ) -> None:
        """Note how a member ended, by what was measured of those that end with it."""
        figures, best = member.figures, member.figures.best_loss
        picked = (
            None if best is None else Measured(best, figures.best_accuracy, figures.best_metrics)
        )
        sound = self._splits.validation is not None
        validation = picked if sound else None
        test = tested.get(member.index) if sound else picked
        training_set = fitted.get(member.index)
        self.outcomes[member.index] = Outcome(
            outcome="diverged" if why == "diverged" else "done",
            stopped=why,
            steps=figures.step,
            best_step=figures.best_step,
            train_loss=figures.train_loss,
            train_accuracy=figures.train_accuracy,
            validation_loss=validation and validation.loss,
            validation_accuracy=validation and validation.accuracy,
            test_loss=test and test.loss,
            test_accuracy=test and test.accuracy,
            training_set_loss=training_set and training_set.loss,
            training_set_accuracy=training_set and training_set.accuracy,
            seconds=figures.seconds,
            cpu_seconds=figures.cpu_seconds,
            examples=figures.step * member.trial.batch_size,
            groups=self.model.counts(),
            backbone_digest=self.model.backbone_digests[member.index],
            data_digest=self._splits.digest,
            state=state,
            metrics={
                name: value
                for split, found in zip(SPLITS, (validation, test, training_set), strict=True)
                for name, value in on_split(split, found.metrics if found else {}).items()
            },
        )
        self.stop(member.index)


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
    device_path: bool | None = None,
    graphs: bool = False,
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
        device_path: Whether to compute as a GPU wants it: few operations whatever the number of
            trials, random numbers where the tensors are, no row padded, all trials evaluated
            together. Figures differ in their last digits. None: on a GPU.
        graphs: Whether a GPU replays its steps as CUDA graphs, one for each set of trials that
            train together, with the same figures and fewer launches. It was never tried on a GPU,
            and is off for that reason; `benchmarks/gpu.py` compares the two. Batches that are
            trained on in parts (`accumulation`) are not replayed.

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
        device_path=cuda if device_path is None else device_path,
        graphs=graphs,
    )
