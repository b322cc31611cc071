"""The lock of a sweep file: the commits of the Hub that its models and data sets stand for.

`experiments/NAME.lock` lies beside `experiments/NAME.yaml`, is written by `sweep fetch`, and is
kept with the sweep file in git. JSON, sorted, so that the same content has the same bytes:

    {
      "datasets": {
        "proteinea/remote_homology@main": {
          "files": {"train.csv": {"sha256": "<64 hex digits>", "size": 6842}},
          "revision": "<40 hex digits>"
        }
      },
      "format": 1,
      "models": {"openai-community/gpt2": {"files": {...}, "revision": "<40 hex digits>"}}
    }

A key is a source as the sweep file has it: an id, and `@revision` where it names one. The rules:

- A source is pinned if its revision is a whole commit hash. A branch or a tag may move.
- When a sweep file is loaded, a source that is not pinned gets the commit of its entry, before the
  trial gets its id: `hub:ID` becomes `hub:ID@COMMIT` (`backbone.weights`), and a task's `revision`
  becomes the commit. So the id says which content was trained on, and the trial's row in the ledger
  holds the commit (columns `weights` and `task_parameters`), with no need of the lock.
- What has no entry stays as it is: the file validates and plans, and `sweep run` asks for a fetch.
- What is pinned in the sweep file has an entry too, for the checksums, and is never changed by it.
- An entry that no trial needs any longer does nothing; the next fetch leaves it out.
- A lock that cannot be read is a problem of the sweep file's: none of it is used.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fpt import hub
from fpt.backbones.sources import FORMATS, HUB, hub_id
from fpt.config import TrialConfig
from fpt.spec import Spec


class LockError(ValueError):
    """A lock file that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A repository of the Hub, as a sweep file names it."""

    kind: hub.Kind
    repository: str
    revision: str | None
    """As it was written: a commit, a branch, a tag, or None."""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a whole commit hash."""
        return hub.is_fixed(self.revision)

    @property
    def key(self) -> str:
        """What it is called in a lock."""
        return self.repository + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return f"{HUB}{self.key}" if self.kind == "model" else f"data set {self.key}"


class LockedFile(Spec):
    """A file, as it has to be."""

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of its content."""


class Entry(Spec):
    """What a source stands for."""

    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    """The commit."""
    files: dict[str, LockedFile]
    """By their paths in the repository: those that trials read."""


class Lock(Spec):
    """The content of a lock file."""

    format: Literal[1] = 1
    datasets: dict[str, Entry] = Field(default_factory=dict)
    """Key of a source -> what it stands for."""
    models: dict[str, Entry] = Field(default_factory=dict)
    """Likewise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, entry in (*self.datasets.items(), *self.models.items()):
            revision = key.partition("@")[2]
            if hub.is_fixed(revision) and revision != entry.revision:
                raise ValueError(f"{key} is said to be of another revision, {entry.revision}")
        return self

    def entry(self, source: Source) -> Entry | None:
        """Return what a source stands for; None: it is not locked."""
        return (self.models if source.kind == "model" else self.datasets).get(source.key)

    def pinned(self, config: TrialConfig) -> TrialConfig:
        """Return a trial with the commits of its sources in place of what may move."""
        changed: dict[str, Any] = {}
        if not (self.models or self.datasets):
            return config
        for source in sources(config):
            entry = None if source.pinned else self.entry(source)
            if entry is None:
                continue
            if source.kind == "model":
                weights = f"{HUB}{source.repository}@{entry.revision}"
                changed["backbone"] = config.backbone.model_copy(update={"weights": weights})
            else:
                changed["task"] = config.task.model_copy(update={"revision": entry.revision})
        return config.model_copy(update=changed) if changed else config


def sources(config: TrialConfig) -> dict[Source, tuple[str, ...]]:
    """Return what a trial reads from the Hub, and which files of it; `*` stands for anything."""
    out: dict[Source, tuple[str, ...]] = {}
    weights = config.backbone.weights
    if config.reads_weights and weights is not None and weights.startswith(HUB):
        out[Source("model", *hub_id(weights))] = FORMATS
    if data := config.task.hub():
        out[Source("dataset", data.repository, data.revision)] = data.files
    return out


def unpinned(configs: Iterable[TrialConfig], *, to_be_had: bool = False) -> tuple[Source, ...]:
    """Return the sources of trials that are not pinned, each once.

    Args:
        configs: The trials.
        to_be_had: Leave out what this machine cannot have anyhow: the network is not to be asked
            (HF_HUB_OFFLINE), and the cache lacks it.
    """
    wanted: dict[Source, tuple[str, ...]] = {}
    for config in configs:
        wanted |= {one: files for one, files in sources(config).items() if not one.pinned}
    return tuple(one for one in wanted if not to_be_had or _to_be_had(one, wanted[one]))


def _to_be_had(source: Source, files: tuple[str, ...]) -> bool:
    if not hub.offline():
        return True
    data = hub.HubData(source.repository, source.revision, files)
    folder = hub.snapshot(source.repository, kind=source.kind, revision=source.revision)
    return folder is not None and bool(data.among(hub.names_in(folder)))


def lock_file(file: Path) -> Path:
    """Return where the lock of a sweep file lies."""
    return file.with_suffix(".lock")


def read(file: Path) -> Lock:
    """Return the lock of a sweep file; an empty one where there is none.

    Raises:
        LockError: If it cannot be used.
    """
    path = lock_file(file)
    mend = f"restore it, or make it anew with `sweep fetch --update {file}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Lock()
    except (OSError, ValueError) as error:
        raise LockError(f"{path}: not a lock file ({error}); {mend}") from None
    if isinstance(content, Mapping) and content.get("format", 1) != 1:
        raise LockError(
            f"{path}: of format {content['format']!r}, which this version does not know; {mend}"
        )
    try:
        return Lock.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ": ".join(map(str, first["loc"]))
        raise LockError(f"{path}: {where}: {first['msg']}; {mend}") from None


def write(file: Path, lock: Lock) -> bool:
    """Write the lock of a sweep file, whole or not at all; returns whether it changed.

    Raises:
        OSError: If it cannot be written.
    """
    path = lock_file(file)
    text = json.dumps(lock.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return True
