"""A model repository of the Hugging Face hub (or of `HF_ENDPOINT`): what is there, and an upload in one commit.

`upload_folder` of huggingface_hub commits large folders in several parts, and one that breaks off leaves some of them;
`create_commit` makes one commit of all files, or none. Files of a repository are compared with those here by the hashes
that the hub lists: SHA-256 of what is stored as a large file, else git's SHA-1 of the blob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.schema import ConfigError, RunError

MADE_BY_THE_HUB = (".gitattributes",)  # of every new repository
TOKEN = "set HF_TOKEN to a token that may write, or log in with `hf auth login`"


@dataclass(frozen=True)
class State:
    """A repository as it is now. commit: its newest. files: path -> what the hub lists of it."""

    commit: str
    private: bool
    files: Mapping[str, Any]

    @property
    def empty(self) -> bool:
        return not [path for path in self.files if path not in MADE_BY_THE_HUB]


class Repository:
    """NAME is OWNER/NAME. Methods raise ConfigError for what the user can mend, RunError where the hub fails."""

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.name = check_name(name)
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"--push {name}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
        token = get_token()
        if not token:
            raise ConfigError(f"--push {name}: there is no token of the hub; {TOKEN}")
        self.api = HfApi(token=token)
        self.url = f"{self.api.endpoint}/{name}"

    def check_rights(self) -> None:
        """Whether the token may write under the owner's name, as far as the hub says so beforehand."""
        with self._explained():
            account = self.api.whoami()
            names = [account["name"], *(own["name"] for own in account.get("orgs", []))]
        owner = self.name.split("/")[0]
        if owner.lower() not in (name.lower() for name in names):
            raise ConfigError(
                f"--push {self.name}: the token belongs to {names[0]}, who may not write as {owner}; expected one of "
                f"{', '.join(names)}"
            )
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConfigError(f"--push {self.name}: the token may only read; {TOKEN}")

    def state(self) -> State | None:
        """None where there is no such repository."""
        from huggingface_hub import RepoFile, errors

        with self._explained():
            try:
                info = self.api.model_info(self.name)
            except errors.RepositoryNotFoundError:
                return None
            listed = self.api.list_repo_tree(self.name, recursive=True, revision=info.sha)
            files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        return State(str(info.sha), bool(info.private), files)

    def require_free(self, private: bool, folder: Path) -> State | None:
        """The state of a repository that may get the folder's files: there is none (None), it is empty, or it holds
        just these files. Raises ConfigError for any other, and for one of the other visibility.
        """
        there = self.state()
        if there is None:
            return None
        if there.private != private:
            seen, flag = ("private", "without --public") if there.private else ("public", "with --public")
            raise ConfigError(
                f"--push {self.name}: exists and is {seen}; give the command {flag}, or choose another name. "
                "Nothing was uploaded"
            )
        if not there.empty and not (folder.is_dir() and not differences(there, folder)):
            raise ConfigError(
                f"--push {self.name}: exists and holds {len(there.files)} files; choose another name, or delete "
                f"{self.url} first. Nothing was uploaded"
            )
        return there

    def create(self, private: bool) -> State:
        """A new repository. Raises RunError where it does not get the visibility that was asked for."""
        with self._explained():
            self.api.create_repo(self.name, private=private)
        there = self.state()
        if there is None:
            raise RunError(f"--push {self.name}: the hub does not show the repository that it made; try again later")
        if there.private != private:
            wanted = "private" if private else "public"
            raise RunError(f"--push {self.name}: the new repository {self.url} is not {wanted}; nothing was uploaded")
        return there

    def commit(self, folder: Path, parent: str, message: str) -> State:
        """Upload all files of a folder in one commit on top of `parent`, and compare what the hub then has.

        Raises RunError, which says what is there now, for an upload that breaks off.
        """
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(folder / path)) for path in contents(folder)]
        fault: Exception | None = None
        try:
            self.api.create_commit(self.name, added, commit_message=message, parent_commit=parent)
        except Exception as error:  # those of two HTTP libraries, of Xet's and of the hub's own checks
            fault = error
        return self._arrived(folder, parent, fault)

    def _arrived(self, folder: Path, parent: str, fault: Exception | None) -> State:
        """The state after a commit. A commit may have arrived although its answer did not."""
        why = "" if fault is None else f" ({_reason(fault)})"
        try:
            there = self.state()
        except (ConfigError, RunError) as error:
            raise RunError(
                f"--push {self.name}: the upload broke off{why}, and the hub cannot be asked whether it arrived; look "
                f"at {self.url}, or give the same command again, which compares"
            ) from (fault or error)
        if there is None or there.commit == parent:
            raise RunError(
                f"--push {self.name}: nothing was uploaded{why}; {self.url} has no file of {folder}. Give the same "
                "command again"
            ) from fault
        if lines := differences(there, folder):
            raise RunError(
                f"--push {self.name}: {self.url} does not hold what {folder} holds ({'; '.join(lines[:3])}){why}; "
                "delete the repository and give the same command again"
            ) from fault
        return there

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Give what a call of the hub raises a message that says what to do."""
        from huggingface_hub import errors

        where = f"--push {self.name}"
        try:
            yield
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401:
                raise ConfigError(f"{where}: the hub refuses the token; {TOKEN}") from error
            if status == 403:
                raise ConfigError(f"{where}: the token may not do this ({_reason(error)}); {TOKEN}") from error
            if status == 409:
                raise ConfigError(f"{where}: exists already; choose another name") from error
            if status == 400:
                raise ConfigError(f"{where}: the hub refuses it: {_reason(error)}") from error
            raise RunError(f"{where}: the hub answers {status} ({_reason(error)}); try again later") from error
        # The base class of whichever HTTP client the hub's library uses.
        except (errors.HTTPError, OSError, ValueError, KeyError) as error:  # pyright: ignore[reportPrivateImportUsage]
            raise RunError(
                f"{where}: {self.api.endpoint} cannot be reached, or is no hub ({_reason(error)}); try again where "
                "there is a network"
            ) from error


def check_name(name: str, option: str = "--push") -> str:
    """OWNER/NAME as the hub takes it, of an option. Raises ConfigError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1 or not name.isascii():  # older clients pass other letters on to the hub
            raise HFValidationError("expected OWNER/NAME in letters from a to z, such as lab/llava-npo")
    except HFValidationError as error:
        raise ConfigError(f"{option} {name!r}: no name of a repository: {_reason(error)}") from error
    return name


def contents(folder: Path) -> list[str]:
    """Paths of all files of an export within it, in order. Raises ConfigError for a link and for a hidden file.

    An export has none; somebody may have put one there, and the hub treats some in ways of its own (.gitignore).
    """
    paths = []
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.is_symlink() or inner.name.startswith("."):
            raise ConfigError(
                f"{file}: is no file of an export (a link or a hidden file); remove it, then give the command again"
            )
        if file.is_file():
            paths.append(inner.as_posix())
    return paths


def differences(there: State, folder: Path) -> list[str]:
    """How a repository differs from a folder, a phrase for each file; what the hub itself adds does not count."""
    here = contents(folder)
    lines = [f"{path} is missing there" for path in here if path not in there.files]
    lines += [f"{path} is not here" for path in there.files if path not in (*here, *MADE_BY_THE_HUB)]
    lines += [f"{path} differs" for path in here if path in there.files and not _same(there.files[path], folder / path)]
    return lines


def _same(entry: Any, file: Path) -> bool:
    if entry.size != file.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == disk.sha256(file)
    content = file.read_bytes()  # no large file, and git hashes its size first
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _reason(error: BaseException) -> str:
    """An error in one line: the last one, where the hub's library puts the server's own words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
