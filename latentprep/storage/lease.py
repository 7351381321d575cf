"""One writer at a time in object stores, which have no locks: an object that its holder keeps renewing."""

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

LEASE = 20.0  # seconds without a renewal after which the holder counts as dead


@contextlib.contextmanager
def leased(root: RemotePath) -> Iterator[None]:
    """Lock a remote dataset for one writer. Needs conditional writes, which S3, GCS and most similar stores have.

    An existing lock is watched for `LEASE` seconds by this machine's clock. If it is renewed, its holder is alive, and
    `DatasetError` is raised; if not, it is taken over. Raises `DatasetError` at the end if another process took it over
    in the meantime, which happens if this one was suspended for longer.
    """
    lock, owner = root / LOCK, uuid.uuid4().hex
    bucket = root.bucket

    def body(renewed: int) -> bytes:
        return json.dumps(
            {"owner": owner, "host": platform.node(), "process": os.getpid(), "renewed": renewed}
        ).encode()

    def is_ours() -> bool:  # the answer to our request may have been lost
        try:
            return json.loads(bucket.get(lock.key)).get("owner") == owner
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def taken(replaces: dict | None, renewed: int) -> dict | None:
        """Overwrite this version of the lock. Returns the new version, or None if another process was faster."""
        try:
            return bucket.put(lock.key, body(renewed), replaces)
        except Changed:
            return bucket.version(lock.key) if is_ours() else None

    held = taken(None, 0)
    if held is None:
        seen = bucket.version(lock.key)
        start = time.monotonic()
        while seen is not None and time.monotonic() - start < LEASE:
            time.sleep(LEASE / 20)
            now = bucket.version(lock.key)
            if now is not None and now != seen:
                break
            seen = now
        else:
            held = taken(seen, 0)
    if held is None:
        raise DatasetError(f"{root} is being written by another latentprep encode", "wait for it to end")

    ended, lost = threading.Event(), threading.Event()

    def renew(version: dict) -> None:
        count, renewed_at = 0, time.monotonic()
        while not ended.wait(LEASE / 4):
            count += 1
            try:
                newer = taken(version, count)
            except SystemFault:  # no network: after a while, others will think us dead
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
            f"another latentprep encode took over {root}, because this one stopped for too long",
            "wait for it to end, then run latentprep verify",
        )
