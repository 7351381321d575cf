"""Parts of a source, encoded apart and merged, are the dataset of one encode: `encode(shard_of=)` and `merge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import inprocess
import latentprep
from latentprep.derived import derive
from latentprep.encoding.parts import Part, _rows, parse_part
from latentprep.errors import DatasetError, LatentError, UsageError
from latentprep.format import LatentDataset
from pictures import make_folder

SETTINGS = {"codec": "dct", "size": 32, "shard_rows": 5}


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 8 images of 2 classes, of which two do not decode: five shards of train and two of val."""
    root = tmp_path_factory.mktemp("parts")
    images = make_folder(root / "images", train=12, val=4)
    for path in ("train/class_1/003.jpg", "val/class_0/002.jpg"):
        (images / path).write_bytes(b"junk")
    return root


def encode(root: Path, out: Path, shard_of: str | tuple[int, int] | None = None, **options: object) -> LatentDataset:
    latentprep.encode(
        root / "images", **{**SETTINGS, "out": out, "shard_of": shard_of, "max_error_fraction": 0.5, **options}
    )
    return latentprep.open(out)


@pytest.fixture(scope="module")
def halves(root: Path) -> tuple[LatentDataset, LatentDataset]:
    first, second = (encode(root, root / f"half-{i}", (i, 2)) for i in range(2))
    return first, second


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"views": 3}, {"store": "wds"}, {"store": "parquet"}, {"bits": 1, "joint": True},
        {"limit": 13, "splits": ["val", "train"]},
    ],
    ids=["views", "wds", "parquet", "joint", "limit"],
)  # fmt: skip
def test_parts_merge_to_the_bytes_of_one_encode(root: Path, tmp_path: Path, count: int, options: dict) -> None:
    whole = encode(root, tmp_path / "whole", **options)
    count = min(count, sum(map(whole.manifest.shard_count, whole.splits)))
    parts = [encode(root, tmp_path / f"part-{i}", f"{i}/{count}", **options) for i in range(count)]
    assert sum(sum(part.manifest.splits.values()) for part in parts) == sum(whole.manifest.splits.values())
    assert all(any(part.manifest.splits.values()) for part in parts)
    if count > 2:
        assert any(0 in part.manifest.splits.values() for part in parts)
    latentprep.merge(parts[::-1], out=tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    again = latentprep.encode(root / "images", **SETTINGS, **options, max_error_fraction=0.5, out=tmp_path / "merged")
    assert again.encoded == 0  # the encode of all goes on from what was merged


@pytest.mark.parametrize(
    "train, val, shard_rows, of", [(24, 8, 5, 7), (1, 1, 4, 2), (4096, 0, 1024, 3), (10, 25, 5, 4)]
)
def test_every_row_is_in_one_part_and_every_cut_between_shards(train: int, val: int, shard_rows: int, of: int) -> None:
    sizes = {"train": train, "val": val}
    parts = [_rows(sizes, shard_rows, Part(index, of)) for index in range(of)]
    for split, size in sizes.items():
        runs = [part[split] for part in parts]
        assert [row for run in runs for row in run] == list(range(size))
        assert all(run.start % shard_rows == 0 for run in runs if run)
    shards = [sum(-(-len(run) // shard_rows) for run in part.values()) for part in parts]
    assert min(shards) >= 1
    assert max(shards) - min(shards) <= 1


def test_a_part_resumes_and_is_verified_and_repaired(root: Path, tmp_path: Path) -> None:
    part = encode(root, tmp_path / "part", "1/3")
    before, source = files(part.root), root / "images"
    (record, *_) = sorted((part.root / "records").iterdir())
    record.unlink()
    assert latentprep.encode(source, **SETTINGS, shard_of="1/3", out=part.root).encoded == 5
    assert files(part.root) == before
    assert latentprep.info(part).part == "1/3"
    assert latentprep.verify(part, source=source, samples=8).compared.differing == 0
    record.unlink()
    assert latentprep.verify(part.root, source=source, samples=0, repair=True).ok
    assert files(part.root) == before
    latents = latentprep.write_latents(part, source, out=tmp_path / "latents")
    assert [len(np.load(latents / f"{split}.npy")) for split in part.splits] == list(part.manifest.splits.values())
    for other in ("2/3", "1/4", None):
        with pytest.raises(
            DatasetError, match="has part 1/3 of its source, but (part ./.|all) of its source was requested"
        ):
            encode(root, part.root, other)
    assert files(part.root) == before
    with pytest.raises(DatasetError, match="has all of its source, but part 0/2 of its source was requested"):
        encode(root, encode(root, tmp_path / "whole").root, "0/2")


def test_a_dry_run_says_what_a_part_has(root: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "out": tmp_path / "out", "dry_run": True}
    planned = [latentprep.encode(root / "images", **settings, shard_of=(index, 3)) for index in range(3)]
    assert [one.rows for one in planned] == [{"train": 10, "val": 0}, {"train": 10, "val": 0}, {"train": 4, "val": 8}]
    assert [one.part for one in planned] == ["0/3", "1/3", "2/3"]
    assert not (tmp_path / "out").exists()


def test_more_shards_than_a_dataset_can_have_are_not_merged(
    halves: tuple[LatentDataset, LatentDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derive, "MAX_SHARDS", 6)
    with pytest.raises(UsageError, match="7 shards are more than a dataset can have, 6; make several datasets"):
        latentprep.merge(halves, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_part_of_one_is_the_whole(root: Path, tmp_path: Path) -> None:
    encode(root, tmp_path / "one", "0/1")
    encode(root, tmp_path / "whole")
    assert files(tmp_path / "one") == files(tmp_path / "whole")


def test_parts_are_calibrated_on_the_whole_source_unless_a_quantizer_is_given(
    root: Path, halves: tuple[LatentDataset, LatentDataset], tmp_path: Path
) -> None:
    assert halves[0].quantizer == halves[1].quantizer == encode(root, tmp_path / "whole").quantizer
    other = encode(root, tmp_path / "other", splits=["val"])
    taken = [encode(root, tmp_path / f"taken-{i}", (i, 2), quantizer=other.root) for i in range(2)]
    assert taken[0].quantizer == taken[1].quantizer == other.quantizer != halves[0].quantizer
    with pytest.raises(
        DatasetError, match="calibrated on different kinds of machines; encode it again with quantizer="
    ):
        latentprep.merge([halves[0], taken[1]], out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def others(root: Path, halves: tuple[LatentDataset, LatentDataset], tmp_path: Path) -> dict[str, Callable[[], list]]:
    first, second = halves

    def changed() -> list:
        images = make_folder(tmp_path / "more" / "images", train=12, val=5)
        return [first, encode(images.parent, tmp_path / "changed", "1/2")]

    return {
        "part 2/3 is missing; .*shard_of='2/3'": lambda: [encode(root, tmp_path / f"{i}", (i, 3)) for i in range(2)],
        "parts 0/7, 2/7, 3/7, … are missing": lambda: [encode(root, tmp_path / f"{i}", (i, 7)) for i in (1, 6)],
        "both have part 0/2": lambda: [first, first],
        "half-0 has part 0/2 of its source, and .* has part 1/3": lambda: [first, encode(root, tmp_path / "x", "1/3")],
        "half-1 has part 1/2 of its source, and .* has all of": lambda: [second, encode(root, tmp_path / "x")],
        "are not parts of one source: files or labels changed": changed,
        "shard_rows is 5 in the first and 4 in the": lambda: [first, encode(root, tmp_path / "x", "1/2", shard_rows=4)],
        "splits is .* in the first": lambda: [first, encode(root, tmp_path / "x", "1/2", splits=["train"])],
        "latent is": lambda: [first, encode(root, tmp_path / "x", "1/2", size=48)],
        " bits is 3 in the first and 4": lambda: [first, encode(root, tmp_path / "x", "1/2", bits=3)],
    }


@pytest.mark.parametrize("number", range(10))
def test_what_is_not_all_parts_of_one_encode_is_not_merged(
    root: Path, halves: tuple[LatentDataset, LatentDataset], tmp_path: Path, number: int
) -> None:
    cases = others(root, halves, tmp_path)
    assert len(cases) == 10
    message, datasets = list(cases.items())[number]
    with pytest.raises(DatasetError, match=message) as error:
        latentprep.merge(datasets(), out=tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("8/8", "counts parts from 0: there is no 8/8; use 0/8 to 7/8"),
        ("0/0", "takes from 1 to 1000000 parts, got 0"),
        ("1", "must be I/N or slurm, got 1"),
        ("-1/8", "must be I/N"),
        ("1/8/2", "must be I/N"),
        (("1", "8"), "must be I/N"),
        ((1, 2, 3), "must be I/N"),
        (3, "must be I/N"),
        ((True, 8), "must be I/N"),
        ((-1, 8), "there is no -1/8"),
        ("0/8", "there are only 7 shards of 5 rows to share out; make at most 7 parts"),
        ("slurm", "SLURM_ARRAY_TASK_ID is not set"),
    ],
)
def test_parts_that_there_are_not_are_refused(root: Path, tmp_path: Path, given: object, what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        encode(root, tmp_path / "out", given)  # type: ignore[arg-type]
    assert error.value.field == "shard_of"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "least", "most", "count", "expected"),
    [
        (0, 0, 7, 8, (0, 8)),
        (7, 0, 7, 8, (7, 8)),
        (1, 1, 8, 8, (0, 8)),
        (8, 1, 8, 8, (7, 8)),
        (5, 3, 5, 3, "takes arrays from 0 or 1 without gaps, not 3 tasks from 3 to 5"),
        (3, 1, 7, 4, "takes arrays"),  # --array=1-7:2
        ("x", 0, 7, 8, "SLURM_ARRAY_TASK_ID is 'x'"),
    ],
)
def test_a_task_of_a_slurm_array_knows_its_part(
    monkeypatch: pytest.MonkeyPatch, number: object, least: int, most: int, count: int, expected: object
) -> None:
    for word, value in {"ID": number, "MIN": least, "MAX": most, "COUNT": count}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{word}", str(value))
    if isinstance(expected, tuple):
        assert parse_part("slurm") == expected
    else:
        with pytest.raises(LatentError, match=str(expected)):
            parse_part("slurm")


def test_a_manifest_with_an_absurd_part_is_refused(halves: tuple[LatentDataset, LatentDataset], tmp_path: Path) -> None:
    document = json.loads((Path(halves[0].root) / "manifest.json").read_bytes())
    for part in ({"index": 2, "of": 2}, {"index": 0}, {"index": 0, "of": 0}, [0, 2], {"index": "0", "of": 2}):
        document["source"]["part"] = part
        (tmp_path / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(DatasetError, match="part"):
            latentprep.open(tmp_path)


def test_the_command_line_encodes_parts_and_merges_them(root: Path, tmp_path: Path) -> None:
    options = ("--codec", "dct", "--size", 32, "--shard-rows", 5, "--max-error-fraction", 0.5)
    for index in range(2):
        environment = {"SLURM_ARRAY_TASK_ID": str(index + 1), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2"}
        out = tmp_path / f"part-{index}"
        done = inprocess.command(
            "latentprep", "encode", root / "images", *options, "--shard-of", "slurm", "--out", out,
            env={**environment, "SLURM_ARRAY_TASK_COUNT": "2"},
        )  # fmt: skip
        assert done.returncode == (0, 3)[index], done.stderr  # 3: an image cannot be read
        assert f"{index}/2 of the source; latentprep merge" in done.stdout
    shown = inprocess.command("latentprep", "info", tmp_path / "part-1")
    assert "images, part 1/2" in shown.stdout
    done = inprocess.command("latentprep", "merge", tmp_path / "part-0", tmp_path / "part-1", "--out", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    encode(root, tmp_path / "whole")
    assert files(tmp_path / "all") == files(tmp_path / "whole")
    wrong = inprocess.command("latentprep", "encode", root / "images", "--shard-of", "2/2", "--out", tmp_path / "x")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[0].endswith("--shard-of counts parts from 0: there is no 2/2")
