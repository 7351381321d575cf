"""The stores, by their names in a manifest. Each is a module with the functions of `Store`."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from latentprep.errors import check_word
from latentprep.format import parquet_store, wds_store, zarr_store
from latentprep.format.manifest import STORES, Manifest, Plan, ShardRecord


class Store(Protocol):
    """Arrays to the bytes of files, and back. Writing files and checking checksums happen elsewhere."""

    def described(self, manifest: Manifest) -> str:
        """The compression of codes, in a word or two."""

    def metadata_files(self, manifest: Manifest) -> dict[str, bytes]:
        """path -> bytes of the files that a dataset has beside its shards."""

    def shard_files(self, plan: Plan, split: str, index: int) -> dict[str, str]:
        """``codes``, ``labels``, ``keys`` and, if the plan has a content hash, ``hashes`` -> path of the file that
        holds them for shard `index`."""

    def encode_shard_files(
        self,
        manifest: Manifest,
        split: str,
        index: int,
        codes: np.ndarray,
        labels: np.ndarray,
        keys: list[str],
        hashes: np.ndarray | None = None,
    ) -> dict[str, bytes]:
        """codes u8 [n,V,C,h,w], labels i32 [n], n keys, hashes u8 [n,16] if the manifest has a content hash -> path ->
        bytes of the shard's files. The same input gives the same bytes."""

    def decode_shard_files(
        self, manifest: Manifest, split: str, index: int, files: dict[str, bytes]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Inverse of `encode_shard_files`, but for the hashes. If a file that holds only keys is left out, there are
        no keys. Raises `DatasetError` for bytes that do not decode."""

    def decode_labels(self, manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
        """The bytes of the file that holds a shard's labels -> i32 [n]."""

    def decode_keys(self, manifest: Manifest, split: str, index: int, data: bytes) -> list[str]:
        """The bytes of the file that holds a shard's keys -> n keys."""

    def decode_hashes(self, manifest: Manifest, split: str, index: int, data: bytes) -> np.ndarray:
        """The bytes of the file that holds a shard's hashes -> u8 [n,16]."""


_STORES: dict[str, Store] = {"zarr": zarr_store, "wds": wds_store, "parquet": parquet_store}


def check_store(store: str) -> None:
    """`UsageError` unless there is a store of this name, `SystemFault` if what it needs is not installed."""
    check_word("store", store, STORES)
    if store == "parquet":
        parquet_store.check_installed()


def store_of(plan: Plan) -> Store:
    return _STORES[plan.store]


def code_bytes(plan: Plan, record: ShardRecord) -> int:
    """Size of the file that holds a shard's codes; in the other stores than Zarr, it also holds labels and keys."""
    file = record.files.get(store_of(plan).shard_files(plan, record.split, record.index)["codes"])
    return file.bytes if file else 0
