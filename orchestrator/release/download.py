"""From the store to this node's disk: the files of a version, an export or a pretrained model, each by its digest."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator import node_cache
from orchestrator.errors import EnvironmentUnusable, IntegrityError
from orchestrator.release.versions import Version, VersionFile, check_names
from orchestrator.store import Store, layout

_PARALLEL_FILES = 4  # each is fetched in parallel ranges besides


def download_files(store: Store, prefix: str, files: Mapping[str, VersionFile], directory: Path) -> None:
    """Fetch ``prefix`` + name of every file into ``directory``, which appears once all have been verified.

    A directory that is there already must hold these very files; another process may have been faster.

    Raises:
        IntegrityError: a name leads out of the directory, or bytes do not match their digest.
        NotFound: a file is missing. EnvironmentUnusable: the directory cannot be written, the disk is full.
    """
    try:
        check_names(files)
    except ValueError as e:
        raise IntegrityError(f"{store.uri_of(prefix)} lists a file that will not be written: {e}.") from e
    partial = node_cache.partial_of(directory)
    try:
        partial.mkdir(parents=True)
        with ThreadPoolExecutor(_PARALLEL_FILES, thread_name_prefix="download") as pool:
            fetches = [
                pool.submit(store.download, prefix + name, partial / name, sha256=file.sha256)
                for name, file in files.items()
            ]
            try:
                for fetch in fetches:
                    fetch.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        _appear(partial, directory, files)
    except OSError as e:
        raise EnvironmentUnusable(
            f"{directory} cannot be written: {e.strerror or e}.",
            next_step="Free some space there, or set HEADWAY_CACHE to another folder.",
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download_cached(store: Store, prefix: str, files: Mapping[str, VersionFile], directory: Path) -> Path:
    """The same, where ``directory`` belongs to a node's cache: of processes that want it at once, one downloads it.

    A copy that is there is verified before it is used, and fetched again where it does not match. Of its neighbours,
    those stay that were used last.

    Raises:
        IntegrityError, NotFound, EnvironmentUnusable: as :func:`download_files`.
    """
    with node_cache.taking(directory):
        if not matches(directory, files):
            node_cache.discard(directory)
            download_files(store, prefix, files, directory)
    return directory


def download_version(store: Store, version: Version, folder: Path) -> Path:
    """The version's files as a Hugging Face directory, ``<folder>/<digest>``; :func:`download_cached` says how."""
    prefix = layout.version(version.model, version.number)
    return download_cached(store, prefix, version.files, folder / version.digest)


def matches(directory: Path, files: Mapping[str, VersionFile]) -> bool:
    """Whether ``directory`` holds every one of ``files`` with its recorded bytes."""

    def same(name: str, file: VersionFile) -> bool:
        try:
            with (directory / name).open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        except OSError:
            return False

    return all(same(name, file) for name, file in files.items())


def _appear(partial: Path, directory: Path, files: Mapping[str, VersionFile]) -> None:
    try:
        partial.rename(directory)
    except OSError:
        if not matches(directory, files):
            raise
