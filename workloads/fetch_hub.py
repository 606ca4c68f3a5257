"""Files of a model on the Hugging Face hub, or on a mirror of it (HF_ENDPOINT), at one commit.

The token is the library's own: HF_TOKEN, or what ``hf auth login`` left. What comes is checked against what the hub
says of the commit: SHA-256 of large files, the git object's name of small ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.dataset.source import SourceFile
from orchestrator.errors import EnvironmentUnusable, IntegrityError
from orchestrator.pretrained.selection import select
from orchestrator.pretrained.source import BaseSource, split_hub_uri

_LARGE, _SMALL = "sha256:", "git:"


def list_files(source: BaseSource) -> list[SourceFile]:
    """The files that are needed. ``uri`` is the model's and the file's name, ``etag`` what its content has to give.

    Raises:
        SpecError: it cannot be trained from. EnvironmentUnusable: the hub does not answer, or not with this model.
    """
    import huggingface_hub

    repository, commit = split_hub_uri(source.uri)
    with _named(source.uri):
        tree = huggingface_hub.HfApi().list_repo_tree(repository, revision=commit)
        found = {entry.path: entry for entry in tree if isinstance(entry, huggingface_hub.RepoFile)}

        def listed(name: str) -> SourceFile:
            entry = found[name]
            etag = f"{_LARGE}{entry.lfs.sha256}" if entry.lfs is not None else f"{_SMALL}{entry.blob_id}"
            return SourceFile(uri=f"{source.uri}/{name}", path=name, etag=etag, size_bytes=entry.size)

        def read(name: str) -> bytes:
            import tempfile

            with tempfile.TemporaryDirectory(prefix="headway-hub-") as scratch:
                return Path(download(listed(name), Path(scratch)).uri).read_bytes()

        chosen = select(found, read, source=source.uri, trust_remote_code=source.trust_remote_code)
    return [listed(name) for name in (*chosen.files, *chosen.weights)]


def download(file: SourceFile, scratch: Path) -> SourceFile:
    """One file on this machine's disk, in ``scratch``, with its SHA-256 for an ETag.

    Raises:
        IntegrityError: its content is not the commit's. EnvironmentUnusable: the hub does not give it.
    """
    import huggingface_hub

    repository, commit = split_hub_uri(file.uri.rpartition("/")[0])
    with _named(file.uri):
        path = Path(huggingface_hub.hf_hub_download(repository, file.path, revision=commit, local_dir=scratch))
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    found = f"{_LARGE}{sha256}" if file.etag.startswith(_LARGE) else f"{_SMALL}{_git_name(path)}"
    if path.stat().st_size != file.size_bytes or found != file.etag:
        raise IntegrityError(
            f"model.pretrained: {file.uri} came with other bytes than the commit has ({found}, not {file.etag}).",
            next_step="Submit it again; if it comes damaged again, look at the mirror that HF_ENDPOINT names.",
        )
    return SourceFile(uri=str(path), path=file.path, etag=sha256, size_bytes=file.size_bytes)


def _git_name(path: Path) -> str:
    """The name of a file's content in git: SHA-1 of ``blob <size>``, a zero byte, and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """The hub's exceptions as ours."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RepositoryNotFoundError as e:  # what the hub says of private and gated ones, too
        raise EnvironmentUnusable(
            f"model.pretrained: {constants.ENDPOINT} has no {uri}, or does not give it to this token.",
            next_step="Check the name; for a private or gated model set HF_TOKEN (on a cluster: env or secrets).",
        ) from e
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as e:
        raise EnvironmentUnusable(  # a mirror that lags behind may have it later
            f"model.pretrained: {constants.ENDPOINT} has no such commit or file: {uri}.",
            next_step="Take the commit from the model's page: Files, History.",
        ) from e
    except (errors.HTTPError, OSError) as e:  # the first is of the HTTP client that the library uses
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise EnvironmentUnusable(
            f"model.pretrained: {uri} cannot be fetched from {constants.ENDPOINT}: {reason[0]}",
            next_step="Can this machine reach it? HF_ENDPOINT names a mirror; else name a copy: a path, or s3://….",
        ) from e
