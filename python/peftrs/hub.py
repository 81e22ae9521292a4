"""From what a user names to a local folder: a path as it is, a Hugging Face repository through its
library.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from peftrs.errors import CheckpointError

HUB_OPTIONS = frozenset(
    {
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "repo_type",
        "revision",
        "token",
        "use_auth_token",
    }
)
"""Keyword arguments that choose what is downloaded; all others belong to configs and loaders."""


def for_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those keyword arguments that `local_folder` takes."""
    return {key: value for key, value in options.items() if key in HUB_OPTIONS or key == "subfolder"}


def local_folder(
    name: str | os.PathLike[str], files: Iterable[str], subfolder: str | None = None, **options: Any
) -> str:
    """The folder that holds `files`: a local one as it is, else the repository's, downloaded.

    A local folder is never completed from the hub. Raises `CheckpointError` when the hub has no such
    repository or file.
    """
    path = os.fspath(name)
    if os.path.isdir(path) or os.path.isabs(path) or path.startswith("."):
        return os.path.join(path, subfolder) if subfolder else path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(
            f"{path}: no such folder; a repository of this name needs `pip install huggingface_hub`"
        ) from None
    if "use_auth_token" in options:
        options["token"] = options.pop("use_auth_token")
    try:
        found = [hf_hub_download(path, file, subfolder=subfolder, **options) for file in files]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: neither a local folder nor a repository that can be read ({error})"
        ) from error
    return os.path.dirname(str(found[0]))


def cached_file(name: str | os.PathLike[str], file: str) -> str | None:
    """The path of a file in a local folder or in the hub's cache, without asking the network; None if it is
    in neither.
    """
    path = os.path.join(os.fspath(name), file)
    if os.path.exists(path):
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(os.fspath(name), file)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, str) else None


class Pushable:
    """What can be saved into a folder, and so into a repository of the hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> Any:
        """Saves into a repository, which is made if there is none; returns what the hub says of the commit.

        `options` are `save_pretrained`'s. Raises `CheckpointError` without huggingface_hub, and that
        library's own errors.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise CheckpointError(f"{repo_id}: uploading needs `pip install huggingface_hub`") from None
        saving: Any = self
        hub = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            saving.save_pretrained(folder, **options)
            name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                hub.create_branch(name, branch=revision, exist_ok=True)
            return hub.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
