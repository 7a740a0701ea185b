"""A verified folder on the hub: exactly the files that its record names, and nothing that lies there besides."""

import glob
from pathlib import Path
from typing import Any

from statprune.errors import CheckpointError, first_line, number_of
from statprune.progress import Say, unsaid
from statprune.record import RECORD
from statprune.verification import IGNORED, verify


def check_repository(repository: str) -> None:
    """Refuse, before work begins, a repository that nothing could be pushed to.

    Raises:
        CheckpointError: its name cannot be one, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise CheckpointError(f"The repository {repository!r}: expected USER/NAME, as on the hub. {first_line(e)}") from e
    _call(repository, "log in with `hf auth login`, or set HF_TOKEN", _api().whoami)


def push(folder: str | Path, repository: str, *, private: bool | None = None, say: Say = unsaid) -> str:
    """Verify a folder and upload it to the hub.

    Args:
        folder: what `save` wrote.
        repository: `USER/NAME`; made where it does not exist.
        private: whether it is private where it is made; None: as the user's or organization's settings have it.
        say: called with each step in words.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder does not keep a promise, or the repository holds other files, and nothing was uploaded; or
            the upload failed.
    """
    folder = Path(folder)
    record = verify(folder)
    check_repository(repository)
    say(f"{folder} is verified; uploading {number_of(len(record['files']) + 1, 'file')} to {repository}")
    api, again = _api(), f"the folder is whole, push it again with `statprune push {folder} {repository}`"
    _call(repository, again, api.create_repo, repository, private=private, exist_ok=True)
    mine = (*record["files"], RECORD)
    if others := sorted(set(_call(repository, again, api.list_repo_files, repository)) - {*mine, *IGNORED}):
        raise CheckpointError(
            f"{repository} on the hub holds {', '.join(others[:3])}, which is no part of {folder}: beside other files a model "
            "may load otherwise, and `statprune verify` refuses it. Remove them there, or choose another repository."
        )
    commit = _call(
        repository, again, api.upload_folder,
        repo_id=repository, folder_path=folder, allow_patterns=[glob.escape(name) for name in mine],
        commit_message=f"{len(record['sites'])} sparse weights by statprune, record {record['digest'][:16]}",
    )  # fmt: skip
    return str(getattr(commit, "commit_url", commit))


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="statprune")


def _call(repository: str, way_out: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the hub, and explain its errors; HTTP errors are OSErrors."""
    try:
        return function(*args, **kwargs)
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{repository} on the hub: {first_line(e)} ({type(e).__name__}). The way out: {way_out}.") from e
