"""decode, preview and the linear decoder, on small datasets of both codecs that need no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentprep
from latentprep.codecs.linear import load_linear_decoder, shrink
from latentprep.errors import DatasetError, SourceError, UsageError
from latentprep.format.commit import remove_dataset
from latentprep.pictures.linear_decoder import _least_squares
from latentprep.pictures.preview import linear_preview, unit_latents
from latentprep.pictures.samples import Originals, pick
from latentprep.pictures.sheet import Column, channel_pictures, draw_sheet, fitted
from latentprep.sources.source import open_source
from pictures import make_folder

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """``cli("decode", …)`` -> (exit code, stdout, stderr), as the console script would."""
    from latentprep.cli.commands import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentprep", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of which one image of val, row 2, cannot be read."""
    root = make_folder(tmp_path_factory.mktemp("source") / "images", train=20, val=5)
    (root / "val" / "class_0" / "002.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def dataset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dct at 8 bits, 32 px, invalid row included."""
    out = tmp_path_factory.mktemp("dct") / "codes"
    latentprep.encode(images, codec="dct", bits=8, size=32, shard_rows=4, max_error_fraction=0.5, out=out)
    return out


@pytest.fixture(scope="module")
def resampled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resample") / "codes"
    latentprep.encode(images, codec="resample:factor=4", bits=8, size=32, max_error_fraction=0.5, out=out)
    return out


def test_picking_leaves_invalid_rows_out_and_spreads_over_classes(dataset: Path) -> None:
    opened = latentprep.open(dataset)
    whole = opened.load("val")
    picked = pick(opened, "val")
    assert picked.rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert (picked.codes == whole.codes[:, 0]).all()
    assert picked.keys == whole.keys
    assert picked.labels.tolist() == whole.labels.tolist()
    for limit in range(1, 12):
        some = pick(opened, "val", limit=limit)
        counts = np.bincount(some.labels, minlength=2)
        assert len(some) == len(set(some.rows)) == min(limit, 9)
        assert abs(counts[0] - counts[1]) <= 1
        assert all(some.keys[i] == picked.keys[picked.rows.tolist().index(row)] for i, row in enumerate(some.rows))
    assert pick(opened, index=[9, 1]).rows.tolist() == [1, 9]
    assert pick(opened, classes=["class_1"]).rows.tolist() == [5, 6, 7, 8, 9]
    for wrong, reason in (
        ({"index": [2]}, "could not be read"),
        ({"index": [10]}, "rows are 0 to 9"),
        ({"classes": ["class_7"]}, "did you mean"),
        ({"split": "test"}, "no split 'test'"),
        ({"limit": 0}, "1 or more"),
    ):
        with pytest.raises(UsageError, match=reason):
            pick(opened, **wrong)  # type: ignore[arg-type]


def test_originals_are_found_by_key_and_class(dataset: Path, images: Path, tmp_path: Path) -> None:
    opened = latentprep.open(dataset)
    picked = pick(opened, "val")
    found = Originals(opened, open_source(str(images))).load(picked)
    assert found.shape == (9, 3, 32, 32)
    flat = tmp_path / "flat"  # the same images in one split: which is which does not depend on it
    for path in sorted(images.rglob("*.jpg")):
        target = flat / path.parent.name / f"{path.parent.parent.name}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match="it has no val/class_0/000.jpg of class class_0"):
        Originals(opened, open_source(str(flat))).load(picked)


def test_decode_writes_a_source_and_its_quality(dataset: Path, images: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "decoded"
    code, text, _ = cli("decode", dataset, "--out", out, "--source", images)
    assert code == 0
    assert "9 images" in text
    lines = [json.loads(line) for line in (out / "decoded.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert all(15 < line["psnr"] < 60 and 0.2 < line["ssim"] < 1 for line in lines)
    with Image.open(out / lines[0]["file"]) as image:
        assert image.size == (32, 32)
    assert sorted(open_source(str(out)).keys("val")) == sorted(line["file"] for line in lines)
    code, text, _ = cli("decode", dataset, "--out", out, "--source", images, "--overwrite", "--json")
    found = json.loads(text)
    assert found["all"]["psnr"] == pytest.approx(np.mean([line["psnr"] for line in lines]), abs=1e-4)
    assert found["per_class"]["class_0"]["images"] == 4
    code, _, error = cli("decode", dataset, "--out", out)
    assert code == 2
    assert "not empty" in error


def test_jpegs_and_no_source(dataset: Path, tmp_path: Path) -> None:
    result = latentprep.decode(
        dataset, out=tmp_path / "out", split="train", classes=["class_1"], limit=3, format="jpeg"
    )
    files = list((tmp_path / "out" / "train" / "class_1").iterdir())
    assert len(files) == result.all.images == 3
    assert all(path.read_bytes()[:2] == b"\xff\xd8" for path in files)
    assert result.all.psnr is None
    with pytest.raises(UsageError, match="did you mean"):
        latentprep.decode(dataset, out=tmp_path / "other", format="jpg")


def test_class_names_cannot_lead_out_of_the_folder() -> None:
    from latentprep.pictures.decode import safe_name

    assert safe_name("../../etc") == "_.._etc"
    assert safe_name("..") == "_"
    assert safe_name("English springer") == "English springer"
    assert safe_name("a/b\\c\n") == "a_b_c_"


def test_preview(dataset: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "sheet.png"
    code, text, _ = cli("preview", dataset, "--out", out, "--limit", 4, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["samples"] == 4
    assert found["columns"] == ["original", "8 bits", "4 bits", "2 bits", "1 bit", "channels", "as RGB"]
    first = out.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    cli("preview", dataset, "--out", out, "--limit", 4)
    assert out.read_bytes() == first
    code, _, error = cli("preview", dataset, "--out", out, "--bits", "9")
    assert (code, "0.25 to 8" in error) == (2, True)
    code, _, error = cli("preview", dataset, "--out", out, "--decoder", "linear")
    assert code == 6 or (dataset / "linear-decoder.safetensors").exists()
    assert cli("preview", dataset, "--index", "1-x")[0] == 2
    assert cli("preview", dataset, "--data", tmp_path)[0] == 2


def test_fewer_bits_are_those_of_requantize(dataset: Path, tmp_path: Path) -> None:
    """The column of 2 bits shows what `latentprep requantize --bits 2` keeps."""
    from latentprep.pictures.decode import open_decoder
    from latentprep.pictures.preview import sample_columns

    latentprep.requantize(dataset, bits=2, out=tmp_path / "two")
    two, opened = latentprep.open(tmp_path / "two"), latentprep.open(dataset)
    decoder = open_decoder(opened, "codec")
    derived = sample_columns(opened, pick(opened), decoder, bits=[2])
    stored = sample_columns(two, pick(two), decoder, bits=[2])
    by_title = {column.title: column.pictures for column in stored}
    assert (by_title["2 bits"] == next(c.pictures for c in derived if c.title == "2 bits")).all()


def test_least_squares_find_the_map() -> None:
    random = np.random.default_rng(0)
    matrix, bias = random.normal(size=(4, 6)).astype(np.float32), random.normal(size=6).astype(np.float32)
    latents = torch.from_numpy(random.normal(size=(3, 4, 5, 5)).astype(np.float32))
    latents[:, 3] = 2.0  # one that never changes: any share of the bias is its
    pixels = torch.einsum("bchw,cd->bdhw", latents, torch.from_numpy(matrix)) + torch.from_numpy(bias)[:, None, None]
    found, offset, mean = _least_squares((latents[i : i + 1], pixels[i : i + 1]) for i in range(3))
    again = torch.einsum("bchw,cd->bdhw", latents, torch.from_numpy(found)) + torch.from_numpy(offset)[:, None, None]
    assert torch.allclose(again, pixels, atol=1e-4)
    assert np.allclose(mean, latents.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("kind", ["dataset", "resampled"])
def test_linear_decoder(kind: str, images: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(kind)
    source = open_source(str(images))
    made = latentprep.fit_linear_decoder(folder, source)
    opened = latentprep.open(folder)
    assert min(made.small.r2) > 0.95  # both codecs keep each block's mean
    assert made.small.psnr is not None
    assert made.small.psnr > made.full.psnr > 15  # type: ignore[operator]
    assert set(made.small.per_class) == {"class_0", "class_1"}
    read = load_linear_decoder(opened)
    assert (read.matrix == made.matrix).all()
    assert read.to_json() == made.to_json()
    picked = pick(opened)
    originals = Originals(opened, source).load(picked)
    latents = torch.from_numpy(opened.quantizer.dequantize(picked.codes))
    assert made.decode(latents).shape == originals.shape
    assert made.decode_small(latents).shape[-1] == opened.manifest.latent[-1]
    back = made.latents_of(originals)
    assert (made.decode_small(back).float() - (shrink(originals, made.factor) + 1) * 127.5).abs().max() < 1
    result = linear_preview(folder, out=tmp_path / "linear.png", limit=4)
    assert result.samples == 4
    sheet = latentprep.preview(folder, out=tmp_path / "sheet.png", decoder="linear", limit=4)
    assert "C×3 matrix" in sheet.columns


def test_a_linear_decoder_is_bound_to_its_dataset(images: Path, tmp_path: Path, cli: Cli) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out, luma in ((first, 3), (second, 4)):
        latentprep.encode(images, codec=f"dct:luma={luma}", size=32, max_error_fraction=0.5, out=out)
    code, text, _ = cli("linear-decoder", "fit", first, "--source", images)
    assert code == 0
    assert "R²" in text
    assert "shrunk image" in text
    path = first / "linear-decoder.safetensors"
    cli("linear-decoder", "fit", second, "--source", images, "--json")
    path.write_bytes((second / path.name).read_bytes())
    with pytest.raises(DatasetError, match="another dataset"):
        load_linear_decoder(latentprep.open(first))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match="damaged"):
        load_linear_decoder(latentprep.open(first))
    remove_dataset(first)
    assert not list(first.iterdir())
    code, _, error = cli("preview", second, "--decoder", "liner")
    assert (code, "did you mean linear" in error) == (2, True)


def test_a_source_of_other_images_is_refused(dataset: Path, tmp_path: Path, cli: Cli) -> None:
    other = make_folder(tmp_path / "other", train=2, val=1, classes=3)
    code, _, error = cli("linear-decoder", "fit", dataset, "--source", other)
    assert code == 4
    assert "is not the dataset's source" in error


def test_sheets() -> None:
    pictures = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    columns = [Column("one", pictures), Column("a title too long for its tile", pictures[:, :4])]
    sheet = draw_sheet(columns, ["first", "second"], "title", tile=16)
    assert np.asarray(sheet).std() > 0
    assert fitted("short", 100) == "short"
    assert fitted("a name that is too long", 60).endswith("…")
    for channels, side in ((1, 5), (3, 10), (4, 10), (16, 20)):
        assert channel_pictures(
            np.linspace(0, 1, 50 * channels, dtype=np.float32).reshape(2, channels, 5, 5)
        ).shape == (2, side, side, 3)
    constant = unit_latents(np.full((3, 2, 4, 4), 7, np.uint8))
    assert ((constant >= 0) & (constant <= 1)).all()


def test_pictures_for_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentprep.cli.console import show_picture

    path = tmp_path / "a.png"
    path.write_bytes(bytes(range(256)) * 40)
    for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for term, program, begin in (
        ("xterm-kitty", "", "\x1b_Ga=T"),
        ("xterm", "WezTerm", "\x1b]1337"),
        ("xterm", "", ""),
    ):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("TERM_PROGRAM", program)
        show_picture(path)
        shown = capsys.readouterr().out
        assert shown.startswith(begin)
        assert bool(shown) == bool(begin)
