"""Puts an export on a model hub with the hub's own client, huggingface_hub, where that is installed."""

import importlib.util
import re
from pathlib import Path

from trainer.errors import ConfigError, require

PACKAGE = "huggingface_hub"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repo: str) -> None:
    """ConfigError, before anything is written, for what would fail after it: no client, no login, no name of a repo."""
    require(
        importlib.util.find_spec(PACKAGE) is not None,
        f"--push {repo} needs the package {PACKAGE}: run pip install {PACKAGE}, or leave out --push",
    )
    from huggingface_hub import get_token

    require(bool(_REPO.fullmatch(repo)), f"--push {repo} is no name of a repository: use OWNER/NAME")
    require(get_token() is not None, f"--push {repo} needs a login: run hf auth login")


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a repository, which is made private if it is new; a line that says where it is.

    The folder stays whatever happens; ConfigError says how to try again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        found = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add an EC-DIT export")
    except Exception as error:  # those of the client's HTTP library, which differs between its versions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--push {repo} failed ({reason}): the export is in {folder}, so try again by hf upload {repo} {folder}"
        ) from error
    return f"{found}: private if it is new; finish its README.md before you show it"
