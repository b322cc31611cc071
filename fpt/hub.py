"""Files on the Hugging Face Hub, in its own cache ($HF_HOME), of one repository at one revision.

A revision is fixed once it is a whole commit hash. What lies in the cache under such a one never
changes, and is taken from there without asking the network; a branch or a tag is asked for anew.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fpt.files import DataError

Kind = Literal["model", "dataset"]
"""What a repository on the Hub is."""


@dataclass(frozen=True)
class HubData:
    """What a task reads from the Hub."""

    repository: str
    """The id of the data set."""
    revision: str | None
    """A commit, a branch or a tag; None: the main branch."""
    files: tuple[str, ...]
    """The files in it that are read; `*` stands for anything, slashes included."""

    def folder(self) -> Path:
        """The folder in the cache that has the files, downloaded if they are not there.

        Raises:
            DataError: If they cannot be had, or if there are none of these names.
        """
        from huggingface_hub import snapshot_download

        def ask(*, here: bool) -> Path:
            return Path(
                snapshot_download(
                    self.repository,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=list(self.files),
                    local_files_only=here,
                )
            )

        if is_fixed(self.revision):
            # What is known to be incomplete raises too.
            with contextlib.suppress(OSError):
                folder = ask(here=True)
                if not self.lacking(names_in(folder)):
                    return folder
        with told(f"data set {self.repository}", self.revision):
            folder = ask(here=False)
        if lacking := self.lacking(names_in(folder)):
            raise DataError(
                f"data set {self.repository}: lacks {', '.join(lacking)} in {folder}; run again "
                "where the Hub can be reached, or name a folder that holds the data instead"
            )
        return folder

    def load(self, **options: Any) -> Any:
        """The splits, as `datasets.load_dataset` reads them: name -> split.

        From the folder: given a name, the library would take whatever it read last, of any
        revision, where it cannot reach the Hub.

        Args:
            options: Further arguments of `datasets.load_dataset`.

        Raises:
            DataError: As `folder`, or if there is nothing in the files that it can read.
        """
        # Slow to import.
        import datasets  # type: ignore[import-untyped]

        folder = self.folder()
        try:
            return datasets.load_dataset(str(folder), **options)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data set {self.repository}: {folder} cannot be read ({error}); remove it and "
                "fetch it again, or name a folder that holds the data instead"
            ) from error

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of a repository's files that are read, sorted."""
        fits = fnmatch.fnmatchcase
        return sorted(n for n in names if any(fits(n, pattern) for pattern in self.files))

    def lacking(self, names: Iterable[str]) -> list[str]:
        """What is missing if these are all the files: patterns, and parts (-00001-of-00002)."""
        here = self.among(names)
        out = [pattern for pattern in self.files if not fnmatch.filter(here, pattern)]
        for name in here:
            if part := re.search(r"-\d{5}-of-(\d{5})", name):
                head, tail = name[: part.start()], name[part.end() :]
                parts = (f"{head}-{n:05d}-of-{part[1]}{tail}" for n in range(int(part[1])))
                out += [one for one in parts if one not in here]
        return sorted(set(out))


def is_fixed(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which nobody can move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def names_in(folder: Path) -> list[str]:
    """The files in a folder and the folders in it, by their paths from there."""
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


def offline() -> bool:
    """Whether the network is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def cache() -> Path:
    """The folder in which huggingface_hub keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot(repository: str, *, kind: Kind, revision: str | None) -> Path | None:
    """The folder in the cache of a repository at a revision; it may lack files.

    A branch or a tag is what it was when the network was last asked. None: not in the cache.
    """
    folder = cache() / (f"{kind}s--" + repository.replace("/", "--"))
    if not is_fixed(revision):
        with contextlib.suppress(OSError):
            revision = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8")
    found = folder / "snapshots" / (revision or "main")
    return found if is_fixed(revision) and found.is_dir() else None


def file(repository: str, name: str, *, revision: str | None) -> Path | None:
    """A file of a model, downloaded if it is not in the cache; None if the model has none such.

    Raises:
        DataError: If it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with told(f"model {repository}", revision):
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except RemoteEntryNotFoundError:
            return None


@contextlib.contextmanager
def told(what: str, revision: str | None) -> Iterator[None]:
    """Turn whatever comes of asking the Hub into one line for people.

    Args:
        what: What is asked for.
        revision: Of which revision.

    Raises:
        DataError: With the reason, and what to do.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # it is, by name

    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(
            f"{what}: its owner asks for consent; accept the terms on its page, and log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{what}: has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{what}: there is none of this name, or it is private; check the name, or log in with "
            "`hf auth login`"
        ) from error
    # hf_xet, which moves large files, raises RuntimeError.
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = "HF_HUB_OFFLINE is set" if offline() else _reason(error)
        raise DataError(
            f"{what}: not in the Hugging Face cache, and the Hub did not give it ({reason}); run "
            "where the Hub can be reached, or name a folder that holds it instead"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost message, without what follows a `?` in an address: signatures
    are secrets.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return re.sub(r"\?[^\s'\"]+", "", line)
