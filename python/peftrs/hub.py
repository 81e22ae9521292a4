"""From what a user names to a local folder: a path as it is, a Hugging Face repository through its library."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from peftrs.errors import CheckpointError

HUB_OPTIONS = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token", "use_auth_token"}
)
"""Keyword arguments that choose what is downloaded; all others belong to configs and loaders."""


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments for the hub, and the rest."""
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    return hub, {key: value for key, value in options.items() if key not in HUB_OPTIONS}


def local_folder(name: str | os.PathLike[str], files: Iterable[str], subfolder: str | None = None, **options: Any) -> str:
    """The folder that holds `files`: a local one as it is, else the repository's, downloaded.

    A local folder is never completed from the hub. Raises `CheckpointError` when the hub has no such repository or file.
    """
    path = os.fspath(name)
    if os.path.isdir(path) or os.path.isabs(path) or path.startswith("."):
        return os.path.join(path, subfolder) if subfolder else path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(f"{path}: no such folder; a repository of this name needs `pip install huggingface_hub`") from None
    if "use_auth_token" in options:
        options["token"] = options.pop("use_auth_token")
    try:
        found = [hf_hub_download(path, file, subfolder=subfolder, **options) for file in files]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: neither a local folder nor a repository that can be read ({error})") from error
    return os.path.dirname(str(found[0]))


def cached_file(name: str | os.PathLike[str], file: str) -> str | None:
    """The path of a file in a local folder or in the hub's cache, without asking the network; None if it is in neither."""
    path = os.path.join(os.fspath(name), file)
    if os.path.exists(path):
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(os.fspath(name), file)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, str) else None
