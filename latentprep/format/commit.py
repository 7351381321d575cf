"""Write to a dataset's folder or bucket so that a crash at any moment leaves only complete files."""

from __future__ import annotations

import contextlib
import json
from pathlib import PurePosixPath

from latentprep.errors import DatasetError
from latentprep.format.manifest import (
    CODEBOOKS,
    ERRORS,
    LINEAR_DECODER,
    MANIFEST,
    SOURCE_FILES,
    Manifest,
    ShardRecord,
    read_manifest,
    record_path,
)
from latentprep.format.shard import EncodedShard
from latentprep.format.stores import store_of
from latentprep.storage.atomic import sync_folder, write_atomic
from latentprep.storage.places import Place, RemotePath


def create_dataset(root: Place, manifest: Manifest) -> None:
    """Write the manifest, which makes `root` a latent dataset, then the store's metadata files.

    Runs again at every resume: files that are already right are left alone. Raises `DatasetError` if there is another
    manifest: a later version may have written fields that this one does not know, and would lose.
    """
    files = manifest.files()
    if (root / MANIFEST).is_file() and (root / MANIFEST).read_bytes() != files[MANIFEST]:
        raise DatasetError(
            f"{root / MANIFEST} has fields of a later version ({manifest.written_by} wrote it): this one can read the "
            "dataset, but not add to it",
            "upgrade with pip install --upgrade latentprep",
        )
    files |= store_of(manifest).metadata_files(manifest)
    for path, data in files.items():
        if not (root / path).is_file() or (root / path).read_bytes() != data:
            write_atomic(root / path, data)


def commit_shard(root: Place, shard: EncodedShard) -> ShardRecord:
    """Write a shard's files, then its record: from then on the shard exists. Returns the record.

    If the shard is made again, its old record is deleted first: a crash leaves no record that does not fit its files.
    """
    record = shard.record
    if (root / record.path).is_file():
        (root / record.path).unlink()
        sync_folder((root / record.path).parent)
    for path, data in shard.files.items():
        write_atomic(root / path, data)
    write_atomic(root / record.path, record.to_bytes())
    return record


def write_errors(root: Place, records: list[ShardRecord]) -> None:
    """Write `errors.jsonl`: a line for each sample that could not be read. No file if all could."""
    if lines := error_lines(records):
        write_atomic(root / ERRORS, lines)
    else:
        (root / ERRORS).unlink(missing_ok=True)


def error_lines(records: list[ShardRecord]) -> bytes:
    """The contents of `errors.jsonl`, by split and row."""
    ordered = sorted(records, key=lambda record: (record.split, record.index))
    entries = [(record, entry) for record in ordered for entry in record.invalid]
    return "".join(
        json.dumps({"split": record.split, **entry}, ensure_ascii=False) + "\n" for record, entry in entries
    ).encode()


def remove_dataset(root: Place) -> None:
    """Delete what `encode` wrote at `root` (for ``overwrite``), and nothing else, file by file, the manifest first."""
    manifest = read_manifest(root)
    store = store_of(manifest)
    files = [MANIFEST, CODEBOOKS, ERRORS, LINEAR_DECODER, SOURCE_FILES, *store.metadata_files(manifest)]
    for split in manifest.splits:
        for index in range(manifest.shard_count(split)):
            files += [record_path(split, index), *store.shard_files(manifest, split, index).values()]
    for path in files:
        (root / path).unlink(missing_ok=True)
        if not isinstance(root, RemotePath):
            (root / (path + ".tmp")).unlink(missing_ok=True)
    if isinstance(root, RemotePath):
        return
    folders = {parent for path in files for parent in PurePosixPath(path).parents if parent.name}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # not empty: it holds other files
            (root / folder).rmdir()
