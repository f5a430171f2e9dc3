"""A zoo on the Hub: repository OWNER/NAME per adapter, a tag `v1.0.0` per version, `main` the one published last.

One publication is one commit, which the Hub applies whole or not at all; large files are uploaded before it and are nobody's until
then. Uploading again skips what the Hub has. A commit is made on the head that was looked at: if somebody else published in
between, it is refused rather than mixed. The tag is set after the commit; a publisher killed between the two leaves the new
state without its tag, and publishing again sets it.

Everything goes through `huggingface_hub` (1.x and 2.x): its token, its cache, its endpoint ($HF_ENDPOINT), its offline mode.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loragraft.zoo.entry import (
    ENTRY,
    SIGNATURE,
    SIZE_LIMIT,
    STATUS,
    Entry,
    Listed,
    NotAsPublishedError,
    Status,
    ZooError,
    another,
    entry_from_bytes,
    statuses_from_bytes,
    statuses_to_bytes,
)

TRANSPORT: type[BaseException] = HfHubHTTPError.__bases__[0]
"""What a broken connection raises: `HTTPError` of httpx in huggingface_hub 1.x, of httpx2 in 2.x."""
TAG, PREFIX = "loragraft", "v"
THE_HUBS_OWN = {".gitattributes", STATUS}
"""Files that a publication leaves as they are."""


class NotOfAZooError(ZooError):
    """A repository that `publish` did not write."""


@dataclass
class HubPlace:
    """Adapters of an account (`owner`), or of one repository (`owner/name`); without an owner, the account of the token."""

    account: str
    public: bool = False
    _commits: dict[tuple[str, str], str] = field(default_factory=dict)
    """(name, sha256 of an entry) -> the commit that holds it."""

    def __post_init__(self) -> None:
        if self.account.count("/") > 1:
            raise ZooError(f"hf://{self.account} is no place: give hf://OWNER or hf://OWNER/NAME")
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="loragraft")

    @property
    def url(self) -> str:
        return f"hf://{self.account}"

    @property
    def owner(self) -> str:
        """The account; asks the Hub if none was given."""
        return self.account.partition("/")[0] or str(self._whoami()["name"])

    def names(self) -> list[str]:
        if "/" in self.account:
            return [self.account.partition("/")[2]]
        with self._telling(self.url):
            return sorted(m.id.partition("/")[2] for m in self._api.list_models(author=self.owner, filter=TAG))

    def listed(self) -> list[Listed]:
        found = []
        for name in self.names():
            try:
                found += self.versions(name)
            except NotOfAZooError as error:  # somebody gave the tag to a repository of another kind
                print(f"note: {error}", file=sys.stderr)
        return sorted(found, key=lambda item: item.order)

    def versions(self, name: str) -> list[Listed]:
        if "/" in self.account and name != self.account.partition("/")[2]:
            return []
        repo = f"{self.owner}/{name}"
        with self._telling(repo):
            try:
                head = self._api.model_info(repo, files_metadata=True)
                tags = self._api.list_repo_refs(repo).tags
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, HFValidationError):
                return []
            if ENTRY not in _sizes(head):
                raise NotOfAZooError(
                    f"{repo} has no {ENTRY}: `loragraft publish` did not write it. Plain LoRA files load without the zoo: "
                    f"fetch one and give it to `loragraft generate --adapter`"
                )
            statuses = self._statuses(repo, head)
            commits = [tag.target_commit for tag in tags if tag.name.startswith(PREFIX)]
            infos = [head, *(self._api.model_info(repo, revision=c, files_metadata=True) for c in commits)]
            found = {}
            for info in infos:
                content, signed = self._read(repo, ENTRY, info), SIGNATURE in _sizes(info)
                item = Listed.read(content, f"{repo}/{ENTRY}", signed=signed, statuses=statuses)
                if item.entry.name != name:
                    raise ZooError(f"{repo}/{ENTRY} is of an adapter {item.entry.name!r}: was the repository renamed?")
                self._commits[name, item.entry_sha256] = str(info.sha)
                found[item.entry.version] = item
        return sorted(found.values(), key=lambda item: item.order)

    def fetch(self, item: Listed, folder: Path) -> None:
        repo = f"{self.owner}/{item.entry.name}"
        commit = self._commits.get((item.entry.name, item.entry_sha256))
        if commit is None:
            raise ZooError(f"{repo} was not looked at for {item.entry.version}: list its versions first")
        with self._telling(repo):
            sizes = _sizes(self._api.model_info(repo, revision=commit, files_metadata=True))
            for name in item.files:
                _check_size(repo, name, sizes.get(name), item.entry)
            for name in item.files:
                cached = self._api.hf_hub_download(repo, name, revision=commit)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cached, folder / name)

    def publish(self, entry: Entry, folder: Path) -> bool:
        self._whoami()
        repo = self._repository_for(entry)
        with self._telling(repo):
            self._api.create_repo(repo, private=not self.public, exist_ok=True)
            head = self._api.model_info(repo, files_metadata=True)
            tags = {tag.name: tag.target_commit for tag in self._api.list_repo_refs(repo).tags}
            tag, there = f"{PREFIX}{entry.version}", set(_sizes(head))
            if tag in tags:
                info = self._api.model_info(repo, revision=tags[tag], files_metadata=True)
                self._require_same(repo, entry, info, [name.removeprefix(PREFIX) for name in tags])
                return False
            if ENTRY in there:
                present = entry_from_bytes(self._read(repo, ENTRY, head), f"{repo}/{ENTRY}")
                if present.version == entry.version:  # committed by a publisher that was killed before it set the tag
                    self._require_same(repo, entry, head, [name.removeprefix(PREFIX) for name in tags])
                    self._api.create_tag(repo, tag=tag, revision=head.sha, exist_ok=True)
                    return False
            mine = [*sorted(entry.files), ENTRY, *([SIGNATURE] if (folder / SIGNATURE).exists() else [])]
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in mine),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(there - set(mine) - THE_HUBS_OWN)),
            ]
            commit = self._api.create_commit(
                repo, operations, commit_message=f"{entry.name} {entry.version}", parent_commit=head.sha
            )
            self._api.create_tag(repo, tag=tag, revision=commit.oid, exist_ok=True)
        return True

    def set_status(self, name: str, version: str, status: Status) -> None:
        repo = f"{self.owner}/{name}"
        with self._telling(repo):
            head = self._api.model_info(repo, files_metadata=True)
            content = statuses_to_bytes({**self._statuses(repo, head), version: status})
            self._api.create_commit(
                repo,
                [CommitOperationAdd(path_in_repo=STATUS, path_or_fileobj=content)],
                commit_message=f"status of {version}: {', '.join(status.to_dict()) or 'as published'}",
                parent_commit=head.sha,
            )

    def _repository_for(self, entry: Entry) -> str:
        owner, _, name = self.account.partition("/")
        if name and name != entry.name:
            raise ZooError(
                f"{self.url} is for an adapter {name!r}, and this one is {entry.name!r}: --to hf://{owner}, or --name {name}"
            )
        return f"{self.owner}/{entry.name}"

    def _require_same(self, repo: str, entry: Entry, info: Any, taken: list[str]) -> None:
        if self._read(repo, ENTRY, info) != entry.to_bytes():
            raise another(repo, entry, taken)

    def _statuses(self, repo: str, head: Any) -> dict[str, Status]:
        if STATUS not in _sizes(head):
            return {}
        return statuses_from_bytes(self._read(repo, STATUS, head), f"{repo}/{STATUS}")

    def _read(self, repo: str, name: str, info: Any) -> bytes:
        size = _sizes(info).get(name)
        if size is None or size > SIZE_LIMIT[name]:
            raise ZooError(f"{repo}/{name} has {size} bytes; none is larger than {SIZE_LIMIT[name]}")
        return Path(self._api.hf_hub_download(repo, name, revision=info.sha)).read_bytes()

    def _whoami(self) -> dict[str, Any]:
        with self._telling(self.url):
            about: dict[str, Any] = self._api.whoami()
            return about

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turns what the Hub or the line to it does into one sentence about `what`."""
        try:
            yield
        except ZooError:
            raise
        except Exception as error:
            for cause in _causes(error):  # an upload that failed is a RuntimeError around what happened
                if isinstance(cause, HfHubHTTPError):
                    raise ZooError(_sentence(what, cause)) from error
                if isinstance(cause, LocalTokenNotFoundError):
                    whose = "" if self.account else ", or name an account to read from: hf://OWNER"
                    raise ZooError(
                        f"{what}: you are not logged in to the Hub: `hf auth login`, or set HF_TOKEN to a token that may write{whose}"
                    ) from error
                if isinstance(cause, OfflineModeIsEnabled):
                    raise ZooError(
                        f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it, or use a copy: `loragraft zoo mirror`"
                    ) from error
                if isinstance(cause, (TRANSPORT, ConnectionError)):
                    raise ZooError(
                        f"{what}: the connection to {self._api.endpoint} broke ({str(cause) or type(cause).__name__}). The zoo has "
                        "its old or its new state, never half: give the same command again; what is there is not sent again"
                    ) from error
            raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _sizes(info: Any) -> dict[str, int]:
    """File -> bytes of a commit."""
    return {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or []}


def _check_size(repo: str, name: str, size: int | None, entry: Entry) -> None:
    """Before anything is fetched: a file may not be larger than the entry says."""
    record = entry.files.get(name)
    if size is None:
        raise NotAsPublishedError(f"{repo} lacks {name}, which its {ENTRY} promises")
    if (record is not None and size != record.size) or (record is None and size > SIZE_LIMIT[name]):
        said = record.size if record is not None else f"at most {SIZE_LIMIT[name]}"
        raise NotAsPublishedError(f"{repo}/{name} has {size} bytes, not {said}")


def _sentence(what: str, error: HfHubHTTPError) -> str:
    status, url = error.response.status_code, str(error.response.url)
    if "xet-write-token" in url:
        return f"{what}: this server has no Xet storage: set HF_HUB_DISABLE_XET=1 and give the same command again"
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: {error.server_message or 'no such version'}"
    said = f" ({error.server_message})" if error.server_message else ""
    return {
        401: f"{what}: the Hub does not know you: `hf auth login`, or set HF_TOKEN to a token that may write{said}",
        403: f"{what}: your token may not do this: it needs the role `write` there, or access to a gated repository{said}",
        404: f"{what}: not found, or private and your token does not see it{said}",
        409: f"{what}: somebody else is changing it at this moment; nothing of yours is there. Give the same command again{said}",
        412: f"{what}: somebody else published to it meanwhile; nothing of yours is there. Give the same command again{said}",
        429: f"{what}: the Hub asks for a pause{_pause(error)}; what is there already is not sent again{said}",
    }.get(status, f"{what}: the Hub answers {status}{said}; give the same command again, later if need be")


def _pause(error: HfHubHTTPError) -> str:
    seconds = error.response.headers.get("Retry-After", "")
    return f" of {seconds} s" if seconds.isdigit() else ", try again in some minutes"
