"""One writer at a time where there is no lock of an operating system: an object that its holder keeps renewing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator

from latentprep.errors import DatasetError, SystemFault
from latentprep.storage.buckets import Changed
from latentprep.storage.locks import LOCK
from latentprep.storage.places import RemotePath

LEASE = 20.0  # seconds after which a lock that nobody renewed is a dead process's


@contextlib.contextmanager
def leased(root: RemotePath) -> Iterator[None]:
    """Hold a remote dataset for one writer. Needs conditional writes, which S3, GCS and most of their like have.

    A lock that is there is watched for `LEASE` seconds, by this machine's clock alone: if it is renewed, its holder
    lives and `DatasetError` is raised; if not, it is taken over. Raises `DatasetError` at the end if somebody took it
    over meanwhile, as happens to a process that stood still for longer.
    """
    lock, owner = root / LOCK, uuid.uuid4().hex
    bucket = root.bucket

    def body(renewed: int) -> bytes:
        return json.dumps(
            {"owner": owner, "host": platform.node(), "process": os.getpid(), "renewed": renewed}
        ).encode()

    def is_ours() -> bool:  # the answer to our own request may have been lost
        try:
            return json.loads(bucket.get(lock.key)).get("owner") == owner
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def taken(replaces: dict | None, renewed: int) -> dict | None:
        """Write the lock over this version of it: its new version, None if somebody else was faster."""
        try:
            return bucket.put(lock.key, body(renewed), replaces)
        except Changed:
            return bucket.version(lock.key) if is_ours() else None

    held = taken(None, 0)
    if held is None:
        found = bucket.version(lock.key)
        start = time.monotonic()
        while found is not None and time.monotonic() - start < LEASE:
            time.sleep(LEASE / 20)
            now = bucket.version(lock.key)
            if now is not None and now != found:
                break
            found = now
        else:
            held = taken(found, 0)
    if held is None:
        raise DatasetError(f"{root} is being written by another latentprep encode", "wait for it to end")

    ended, lost = threading.Event(), threading.Event()

    def renew(version: dict) -> None:
        count, renewed_at = 0, time.monotonic()
        while not ended.wait(LEASE / 4):
            count += 1
            try:
                newer = taken(version, count)
            except SystemFault:  # no network: by and by somebody else may think us dead
                newer = version if time.monotonic() - renewed_at < LEASE else None
            else:
                renewed_at = time.monotonic()
            if newer is None:
                lost.set()
                return
            version = newer

    keeper = threading.Thread(target=renew, args=(held,), name="renew-lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        if not lost.is_set():
            with contextlib.suppress(SystemFault):
                bucket.delete(lock.key)
    if lost.is_set():
        raise DatasetError(
            f"{root} was taken over by another latentprep encode, since this one stood still",
            "wait for it to end, then run latentprep verify",
        )
