"""A model hub that speaks the Hugging Face API: what a repository holds at a commit, and single files of it.

Files come to rest in the hub's own cache (`HF_HOME`), where other programs find them too. Large ones are fetched into a
file beside it that outlives an interruption, and enter the cache when their digest is right.
"""

import errno
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pmodel.domain.errors import NotFound, Rejected, StorageError, Unreachable
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef, ModelFile

LARGE_BYTES = 16 << 20
"""From this size on, what is left of an interrupted download is worth going on with; it is written 10 MiB at a time."""

READ_BYTES = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """`org/name@commit`; the commit is empty for whatever the main branch is at."""

    repository: str
    commit: str = ""

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}" if self.commit else self.repository

    @classmethod
    def parse(cls, text: str) -> "Source | None":
        """None when the text has not the form of a hub id."""
        repository, _, commit = text.partition("@")
        parts = repository.split("/")
        return cls(repository, commit) if len(parts) == 2 and all(parts) else None


@dataclass(frozen=True)
class Listing:
    """What a repository holds. source: with the commit; files: sizes and, of what the hub keeps by content, digests."""

    source: Source
    sizes: dict[str, int]
    digests: dict[str, Digest]


def list_files(source: Source) -> Listing:
    """Asks the hub, and downloads nothing. Raises NotFound, Unreachable."""
    from huggingface_hub import HfApi

    with _telling(source):
        info = HfApi().model_info(source.repository, revision=source.commit or None, files_metadata=True)
    files = [file for file in info.siblings or () if file.size is not None]
    return Listing(
        Source(source.repository, info.sha or source.commit),
        {file.rfilename: file.size for file in files if file.size is not None},
        {file.rfilename: Digest(file.lfs.sha256) for file in files if file.lfs is not None},
    )


def cached_folder(source: Source) -> Path | None:
    """Where files of that commit are, when some were fetched before."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.repository, "config.json", revision=source.commit or None)
    return Path(config).parent if isinstance(config, str) else None


def fetch_small(source: Source, names: Sequence[str]) -> Path:
    """Brings files whose digests are not known yet, and returns their folder. Raises NotFound, Unreachable."""
    return _fetch_each(source, names)


def fetch(source: Source, files: Sequence[ModelFile]) -> Path:
    """Brings the files that are not here yet, and returns the folder that they are in; what was interrupted goes on.

    Raises NotFound, Unreachable, and Rejected("digest") for a file that is not the one that was asked for."""
    for file in files:
        if file.blob.size >= LARGE_BYTES and not _is_cached(source, file.name):
            _fetch_large(source, file)
    return _fetch_each(source, [file.name for file in files])


def _fetch_each(source: Source, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download

    folder = Path()
    for name in names:
        with _telling(source):
            # One after the other: its own threads would keep a node that is told to stop.
            folder = Path(hf_hub_download(source.repository, name, revision=source.commit or None)).parent
    return folder


def _is_cached(source: Source, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source.repository, name, revision=source.commit or None), str)


def _fetch_large(source: Source, file: ModelFile) -> None:
    """Into the cache's place for content of that digest, where the hub's own library then finds it: that one begins
    anew after an interruption."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils._headers import build_hf_headers

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.repository, repo_type="model") / "blobs"
    part, whole = blobs / f"{file.blob.digest}.p2pmodel.incomplete", blobs / file.blob.digest
    with _telling(source):
        url = hf_hub_url(source.repository, file.name, revision=source.commit or None)
        found = get_hf_file_metadata(url)
        if found.etag != file.blob.digest:
            return  # kept by other means: the library knows
        headers = build_hf_headers()
        if found.location != url:
            headers.pop("authorization", None)  # a signed address elsewhere
        blobs.mkdir(parents=True, exist_ok=True)
        with _locked(part), part.open("ab") as sink:
            have = sink.tell()
            if have > file.blob.size:
                have = sink.truncate(0)
            log.info("fetching %s of %s from byte %d on", file.name, source, have)
            http_get(
                found.location,
                sink,
                resume_size=have,
                headers=headers,
                expected_size=file.blob.size,
                displayed_filename=file.name,
            )
        if sha256(part) != file.blob.digest:
            part.unlink()
            raise Rejected("digest", f"{file.name} as the hub gives it out is not the one that was asked for.")
        part.replace(whole)


def sha256(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest())


def describe(path: Path) -> BlobRef:
    """Of a file: hashes it."""
    return BlobRef(sha256(path), path.stat().st_size)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    from huggingface_hub.utils._fixes import WeakFileLock

    with WeakFileLock(f"{part}.lock"):
        yield


@contextmanager
def _telling(source: Source) -> Iterator[None]:
    """The library's errors as one sentence each."""
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise NotFound(
            f"{source} is gated: its licence has to be accepted first.",
            "Accept it on its page, then log in: hf auth login (or set HF_TOKEN).",
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"{source.repository} is no folder here, and the hub has no such model, or it is private.",
            "Check the spelling; for a private one log in: hf auth login (or set HF_TOKEN).",
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFound(f"{source.repository} has no revision {source.commit}.") from None
    except errors.EntryNotFoundError as error:
        raise _missing(source, error) from None
    except errors.HFValidationError:
        raise NotFound(f"{source.repository!r} is neither a folder here nor the id of a model on a hub.") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise Unreachable(f"The hub answered {status} when it was asked for {source}.", "Try again later.") from None
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"There is no room on the disk for {source}.", "What was fetched is kept.") from None
        raise Unreachable(f"The hub cannot be reached for {source}: {_line(error)}.") from None


def _missing(source: Source, error: Any) -> NotFound | Unreachable:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return Unreachable(
            f"The hub cannot be reached, and files of {source} are not all on this machine.",
            "Try again later: what was fetched is kept.",
        )
    return NotFound(f"{source} lacks a file: {_line(error)}.")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
