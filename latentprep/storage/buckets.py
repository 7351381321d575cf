"""Object stores, web servers and the Hugging Face hub as keys with bytes: `open_bucket(url)`.

Requests are retried, with growing pauses, after dropped connections, timeouts, bodies cut short, and status 500 and
above. Refused or missing objects are reported at once. obstore retries by itself; what it gives up on, such as a body
that breaks off in the middle, is requested again from the start.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from latentprep.errors import SystemFault, UsageError
from latentprep.storage.aws import KEYS, asked_anew, refusal, s3_settings

MOST = 1 << 34  # bytes to read of an object, at most
ATTEMPTS = 4  # of a request whose failure may be temporary
PAUSE = 0.25  # seconds before the second attempt; doubled each time, and randomized
_RETRIES = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}
_CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m"}

T = TypeVar("T")


class Changed(Exception):
    """An object is not the version that a conditional `Bucket.put` should replace, or already exists."""


class Bucket(Protocol):
    """Keys with bytes. Raises `SystemFault` for a request that fails after all attempts."""

    @property
    def url(self) -> str:
        """The URL of the key ``""``, without a slash at the end."""

    def get(self, key: str, most: int = MOST) -> bytes:
        """Raises `FileNotFoundError`, and `SystemFault` for more than `most` bytes."""

    def size(self, key: str) -> int | None:
        """Size in bytes; None if there is no such object."""

    def version(self, key: str) -> dict | None:
        """An identifier that changes with every `put`; None if there is no such object."""

    def put(self, key: str, data: bytes, replaces: dict | str | None = "any") -> dict:
        """Write all of it or nothing; returns the new version. replaces: the version to replace, or None if no object
        may exist; raises `Changed` if the bucket has another one. "any", the default, replaces whatever is there."""

    def delete(self, key: str) -> None:
        """Delete the object, if it exists."""

    def names(self, key: str) -> list[str]:
        """The names directly below a key; empty if the store cannot list them."""

    def read(self, key: str, start: int, size: int) -> bytes:
        """The `size` bytes from `start`, which the object must have. Raises `FileNotFoundError`."""

    def files(self, key: str) -> dict[str, int]:
        """Every object below a key, and its size in bytes; empty if the store cannot list them."""


class ObjectStore:
    """S3, Google Cloud Storage and (read-only) HTTP, by obstore. url: of a bucket or a server."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import GCSStore, HTTPStore, S3Store
        except ImportError as error:
            extra = {"gs": "gcs"}.get(url.split(":")[0], "s3")
            raise SystemFault(
                f"reading {url} needs obstore, which is not installed", f"pip install 'latentprep[{extra}]'"
            ) from error
        self._obstore, self._exceptions = obstore, exceptions
        scheme, _, rest = url.partition("://")
        settings = s3_settings() if scheme == "s3" else {}
        self._anonymous = settings.get("skip_signature", False)
        self._endpoint, self._bucket = settings.get("endpoint", ""), rest
        self._region = settings.get("region", "us-east-1")
        plain = scheme == "http" or self._endpoint.startswith("http:")
        options: dict[str, Any] = {"client_options": {**_CLIENT, "allow_http": plain}, "retry_config": _RETRIES}
        self._store: Any
        if scheme == "s3":
            self._store = S3Store(rest, checksum_algorithm="SHA256", **settings, **options)
        elif scheme == "gs":
            self._store = GCSStore(rest, **options)
        else:
            self._store = HTTPStore.from_url(url, **options)
        self._writable = scheme in ("s3", "gs")
        self._way_in = {
            "s3": f"{KEYS}; for a public bucket, set AWS_SKIP_SIGNATURE=true",
            "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account",
        }.get(scheme, "only public files can be read, and this server asks for credentials")

    def get(self, key: str, most: int = MOST) -> bytes:
        def whole() -> bytes:
            answer = self._obstore.get(self._store, key)
            if answer.meta["size"] > most:
                raise SystemFault(
                    f"{self.url}/{key} has {answer.meta['size']} bytes; no latent dataset has such a file"
                )
            data = bytes(answer.bytes())
            if len(data) != answer.meta["size"]:
                raise OSError(f"got {len(data)} of {answer.meta['size']} bytes")
            return data

        return self._tried("read", key, whole)

    def size(self, key: str) -> int | None:
        meta = self._head(key)
        return None if meta is None else meta["size"]

    def version(self, key: str) -> dict | None:
        meta = self._head(key)
        return None if meta is None else _version(meta)

    def put(self, key: str, data: bytes, replaces: dict | str | None = "any") -> dict:
        self._check_writable()
        mode = "overwrite" if replaces == "any" else "create" if replaces is None else replaces
        return _version(self._tried("write", key, lambda: self._obstore.put(self._store, key, data, mode=mode)))

    def delete(self, key: str) -> None:
        self._check_writable()
        try:
            self._tried("delete", key, lambda: self._obstore.delete(self._store, key))
        except FileNotFoundError:
            return

    def names(self, key: str) -> list[str]:
        if not self._writable:  # web servers do not list
            return []
        prefix = f"{key}/" if key else ""
        listing = self._tried("list", key, lambda: self._obstore.list_with_delimiter(self._store, prefix))
        paths = [*listing["common_prefixes"], *(entry["path"] for entry in listing["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def read(self, key: str, start: int, size: int) -> bytes:
        def part() -> bytes:
            data = bytes(self._obstore.get_range(self._store, key, start=start, length=size))
            if len(data) != size:
                raise OSError(f"got {len(data)} of {size} bytes")
            return data

        return self._tried("read", key, part)

    def files(self, key: str) -> dict[str, int]:
        if not self._writable:
            return {}
        prefix = f"{key}/" if key else None

        def listing() -> dict[str, int]:
            return {one["path"]: one["size"] for some in self._obstore.list(self._store, prefix) for one in some}

        return self._tried("list", key, listing)

    def _head(self, key: str) -> dict | None:
        def head() -> Any:
            try:
                return self._obstore.head(self._store, key)
            except FileNotFoundError:
                raise
            except self._exceptions.BaseError:
                if not self.url.startswith("s3:"):
                    raise
                return self._obstore.get(self._store, key).meta  # an answer to HEAD has no body that gives the reason

        try:
            return self._tried("look for", key, head)
        except FileNotFoundError:
            return None

    def _check_writable(self) -> None:
        if not self._writable:
            raise UsageError(f"{self.url} can only be read", "write to a folder, s3:// or gs://")

    def _tried(self, verb: str, key: str, call: Callable[[], T]) -> T:
        where = f"{self.url}/{key}"

        def translated() -> T:
            try:
                return call()
            except (self._exceptions.BaseError, OSError) as error:
                meant = self._meaning(error, verb, where)
                if meant is None:
                    raise
                raise meant from error

        return _tried(f"{verb} {where}", translated, (self._exceptions.BaseError, OSError))

    def _meaning(self, error: Exception, verb: str, where: str) -> Exception | None:
        """The error to raise for one of obstore's; None if it may be temporary."""
        kinds, answer = self._exceptions, str(error)
        if isinstance(error, (kinds.AlreadyExistsError, kinds.PreconditionError)):
            return Changed(where)
        if self.url.startswith("s3:"):
            if "redirect without LOCATION" in answer:
                server = self._endpoint or f"https://s3.{self._region}.amazonaws.com"
                answer = asked_anew(f"{server}/{self._bucket}")
            if refused := refusal(answer, f"cannot {verb} {where}", self._anonymous):
                return refused
        if isinstance(error, (FileNotFoundError, kinds.NotFoundError)):
            return FileNotFoundError(where)
        if isinstance(error, (PermissionError, kinds.PermissionDeniedError, kinds.UnauthenticatedError)):
            return SystemFault(f"no permission to {verb} {where}", self._way_in)
        return None


class HubRepository:
    """A read-only dataset repository of the Hugging Face hub. huggingface_hub caches what it downloads.

    url: ``hf://datasets/OWNER/NAME``, with ``@REVISION`` for another revision than the newest.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        name, _, revision = url.removeprefix("hf://datasets/").partition("@")
        self._name, self._revision = name, revision or None
        try:
            import huggingface_hub
        except ImportError as error:
            raise SystemFault(
                f"reading {url} needs huggingface_hub, which is not installed", "pip install 'latentprep[hub]'"
            ) from error
        self._hub = huggingface_hub

    def get(self, key: str, most: int = MOST) -> bytes:
        from huggingface_hub import errors

        def whole() -> bytes:
            try:
                path = self._hub.hf_hub_download(self._name, key, repo_type="dataset", revision=self._revision)
            except errors.LocalEntryNotFoundError as error:  # not cached, and the hub cannot be reached
                raise OSError(str(error)) from error
            except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
                raise FileNotFoundError(f"{self.url}/{key}") from error
            return Path(path).read_bytes()

        return _tried(f"read {self.url}/{key}", whole, hub_errors())

    def size(self, key: str) -> int | None:
        try:
            return len(self.get(key))
        except FileNotFoundError:
            return None

    def version(self, key: str) -> dict | None:
        return None if self.size(key) is None else {}

    def put(self, key: str, data: bytes, replaces: dict | str | None = "any") -> dict:
        raise UsageError(f"{self.url} can only be read", "write to a folder, then upload it with latentprep push")

    def delete(self, key: str) -> None:
        raise UsageError(f"{self.url} can only be read", "write to a folder, then upload it with latentprep push")

    def names(self, key: str) -> list[str]:
        return []

    def read(self, key: str, start: int, size: int) -> bytes:
        import requests  # which older and newer versions of the hub's client do not both use
        from huggingface_hub import errors, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        def part() -> bytes:
            url = hf_hub_url(self._name, key, repo_type="dataset", revision=self._revision)
            headers = {
                **build_hf_headers(),
                "Range": f"bytes={start}-{start + size - 1}",
                "Accept-Encoding": "identity",
            }
            with requests.get(url, headers=headers, timeout=30, stream=True) as answer:
                if answer.status_code in (401, 403):
                    raise SystemFault(
                        f"no permission to read {self.url}/{key}",
                        "accept the dataset's terms on its page, and log in with: hf auth login",
                    )
                if answer.status_code in (404, 416):
                    raise FileNotFoundError(f"{self.url}/{key}")
                if answer.status_code != 206 and not (answer.ok and start == 0):
                    raise OSError(f"{answer.status_code} {answer.reason}")
                data = answer.raw.read(size)
            if len(data) != size:
                raise OSError(f"got {len(data)} of {size} bytes")
            return data

        return _tried(f"read {self.url}/{key}", part, (requests.RequestException, errors.HfHubHTTPError, OSError))

    def files(self, key: str) -> dict[str, int]:
        return {path: size for path, size in self.snapshot()[1].items() if not key or path.startswith(f"{key}/")}

    def snapshot(self) -> tuple[str, dict[str, int], Any]:
        """The revision's commit, its files with their sizes, and the ``configs`` of its card, as they are there.

        Raises `FileNotFoundError` if there is no such repository or revision.
        """
        from huggingface_hub import errors

        def info() -> Any:
            try:
                return self._hub.HfApi().dataset_info(self._name, revision=self._revision, files_metadata=True)
            except errors.RepositoryNotFoundError as error:
                raise FileNotFoundError(self.url) from error
            except errors.RevisionNotFoundError as error:
                raise FileNotFoundError(self.url) from error

        found = _tried(f"list {self.url}", info, hub_errors())
        card = found.card_data.to_dict() if found.card_data is not None else {}
        return found.sha, {one.rfilename: one.size or 0 for one in found.siblings or ()}, card.get("configs")


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises if a request fails: its own errors, and those of its HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


def _version(meta: Any) -> dict:
    """What obstore accepts as a version: the ETag and version number, as far as the store has them."""
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _tried(what: str, call: Callable[[], T], passing: tuple[type[Exception], ...]) -> T:
    """What `call` returns, after up to `ATTEMPTS` attempts while it raises one of `passing`."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return call()
        except (FileNotFoundError, SystemFault, Changed):
            raise
        except passing as error:
            last = error
    text = str(last).partition(chr(10) + chr(10) + "Debug source:")[0]
    hint = "check the address, the network and the credentials, then run the same command again"
    if "Range request not supported" in text:
        hint = "name a file, on a server that answers range requests; or download it"
    raise SystemFault(f"cannot {what}: {text}", hint) from last


@lru_cache
def open_bucket(url: str) -> Bucket:
    """The bucket, server or repository at this URL; one client for each."""
    return HubRepository(url) if url.startswith("hf://") else ObjectStore(url)
