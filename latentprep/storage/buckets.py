"""Object stores, web servers and the Hugging Face hub as keys with bytes: `open_bucket(url)`.

Every request is tried again, with growing pauses, after dropped connections, timeouts, bodies cut short and answers of
500 and more; what is refused or absent is said at once. obstore retries by itself; what it gives up on, a body that
breaks off in its middle among others, is asked for from the start.
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

MOST = 1 << 34  # bytes of an object that are read
ATTEMPTS = 4  # of a request that fails in a way that may pass
PAUSE = 0.25  # seconds before the second one; doubled each time, and somewhat random
_RETRIES = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}
_CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m"}

T = TypeVar("T")


class Changed(Exception):
    """An object is not in the version that a conditional `Bucket.put` was for, or is there already."""


class Bucket(Protocol):
    """Keys with bytes. Raises `SystemFault` for what stays impossible after all attempts."""

    @property
    def url(self) -> str:
        """Of the key ``""``, without a slash at its end."""

    def get(self, key: str, most: int = MOST) -> bytes:
        """Raises `FileNotFoundError`, and `SystemFault` for more than `most` bytes."""

    def size(self, key: str) -> int | None:
        """Bytes, None where there is no such object."""

    def version(self, key: str) -> dict | None:
        """What changes with every `put`, None where there is no such object."""

    def put(self, key: str, data: bytes, replaces: dict | str | None = "any") -> dict:
        """All of it or nothing; returns the new version. replaces: a version, or None for no object; `Changed` if it is
        another one. By default whatever is there."""

    def delete(self, key: str) -> None:
        """Nothing happens where there is no such object."""

    def names(self, key: str) -> list[str]:
        """The names directly below a key; none where the store cannot list them."""


class ObjectStore:
    """S3, Google Cloud Storage, and, to read only, HTTP, by obstore. url: of a bucket, or of a server."""

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
            "s3": f"{KEYS}; AWS_SKIP_SIGNATURE=true for a public bucket",
            "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key",
        }.get(scheme, "the server asks for credentials; only public files can be read")

    def get(self, key: str, most: int = MOST) -> bytes:
        def whole() -> bytes:
            answer = self._obstore.get(self._store, key)
            if answer.meta["size"] > most:
                raise SystemFault(
                    f"{self.url}/{key} has {answer.meta['size']} bytes; no latent dataset has such a file"
                )
            data = bytes(answer.bytes())
            if len(data) != answer.meta["size"]:
                raise OSError(f"{len(data)} bytes came instead of {answer.meta['size']}")
            return data

        return self._tried("read", key, whole)

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return None if found is None else found["size"]

    def version(self, key: str) -> dict | None:
        found = self._head(key)
        return None if found is None else _version(found)

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
        found = self._tried("list", key, lambda: self._obstore.list_with_delimiter(self._store, prefix))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def _head(self, key: str) -> dict | None:
        def head() -> Any:
            try:
                return self._obstore.head(self._store, key)
            except FileNotFoundError:
                raise
            except self._exceptions.BaseError:
                if not self.url.startswith("s3:"):
                    raise
                return self._obstore.get(self._store, key).meta  # an answer to HEAD has no body to say why in

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
        """What an error of obstore's means; None for one that may pass."""
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
    """A dataset repository of the Hugging Face hub, to read only. huggingface_hub keeps what it downloads.

    url: ``hf://datasets/OWNER/NAME``, with ``@REVISION`` if it is not the newest.
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
            except errors.LocalEntryNotFoundError as error:  # neither here nor to be reached
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
        raise UsageError(f"{self.url} can only be read", "write to a folder, then use latentprep push")

    def delete(self, key: str) -> None:
        raise UsageError(f"{self.url} can only be read", "write to a folder, then use latentprep push")

    def names(self, key: str) -> list[str]:
        return []


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where a request fails: its own errors, and those of the HTTP client under it."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


def _version(found: Any) -> dict:
    """What obstore takes for a version: those of an object's marks that the store has."""
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def _tried(what: str, call: Callable[[], T], passing: tuple[type[Exception], ...]) -> T:
    """What `call` returns, in up to `ATTEMPTS` attempts where it raises one of `passing`."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return call()
        except (FileNotFoundError, SystemFault, Changed):
            raise
        except passing as error:
            last = error
    raise SystemFault(
        f"cannot {what}: {str(last).partition(chr(10) + chr(10) + 'Debug source:')[0]}",
        "check the address, the network and the credentials, then run the same command again",
    ) from last


@lru_cache
def open_bucket(url: str) -> Bucket:
    """The bucket, server or repository of this URL; one client each."""
    return HubRepository(url) if url.startswith("hf://") else ObjectStore(url)
