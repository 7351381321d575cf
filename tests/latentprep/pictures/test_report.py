"""rd, and the HTML page about a dataset."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentprep
from latentprep.errors import CodecError, UsageError
from latentprep.format.manifest import SOURCE_FILES
from latentprep.pictures import page
from latentprep.pictures.plots import drawn
from latentprep.pictures.rd import FORMATS, _file, _file_of_at_most, rd
from latentprep.pictures.report import channel_counts, entropy
from pages import Strict, check_page
from pictures import make_folder, picture


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("source") / "images", train=20, val=6)
    (root / "val" / "class_1" / "003.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def dataset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dct") / "a <dataset> & more"
    latentprep.encode(images, codec="dct:luma=3,chroma=1", bits=4, size=64, max_error_fraction=0.5, out=out)
    return out


def test_rd(images: Path, tmp_path: Path) -> None:
    result = rd(
        str(images), codecs=["dct:luma=3,chroma=1", "dct"], bits=[1, 4], rates=[0.5], qualities=[10, 90], images=9,
        size=64, out=tmp_path / "rd",
    )  # fmt: skip
    assert result.images in (8, 9)  # one of val cannot be read
    by_name = {(p.name, p.setting): p for p in result.points}
    assert len(by_name) == 6 + 2 * (len(FORMATS) - len(result.skipped))
    assert by_name["dct by rate", 0.5].bytes < by_name["dct", 4].bytes
    for name, low, high in (("dct", 1, 4), ("JPEG", 10, 90)):
        few, many = by_name[name, low], by_name[name, high]
        assert few.bytes < many.bytes
        assert few.psnr < many.psnr  # type: ignore[operator]
        assert few.ssim < many.ssim  # type: ignore[operator]
        assert many.bpp == pytest.approx(8 * many.bytes / 64**2)
    files = sorted(path.name for path in (tmp_path / "rd").iterdir())
    assert files == ["rd.json", "rd.png", "rd.svg", "side-by-side.png"]
    first = (tmp_path / "rd" / "rd.svg").read_bytes()
    assert json.loads((tmp_path / "rd" / "rd.json").read_text())["points"][0]["name"] == "dct:luma=3,chroma=1"
    rd(
        str(images), codecs=["dct:luma=3,chroma=1", "dct"], bits=[1, 4], rates=[0.5], qualities=[10, 90], images=9,
        size=64, out=tmp_path / "again",
    )  # fmt: skip
    assert (tmp_path / "again" / "rd.svg").read_bytes() == first


def test_rd_counts_what_encode_writes(images: Path, tmp_path: Path) -> None:
    """All of val through rd takes the bytes of a dataset of val: shard, record and metadata."""
    good = make_folder(tmp_path / "good", train=8, val=4)
    out = tmp_path / "codes"
    latentprep.encode(good, codec="dct", bits=3, size=32, splits=["val"], shard_rows=8, out=out)
    on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != SOURCE_FILES)
    result = rd(str(good), codecs=["dct"], bits=[3], rates=[], qualities=[50], images=100, size=32, out=tmp_path / "rd")
    assert result.points[0].bytes * result.images == pytest.approx(on_disk, rel=0.1)


def test_files_of_at_most() -> None:
    image = torch.from_numpy(picture(3)).permute(2, 0, 1)
    for name in FORMATS:
        sizes = {quality: len(_file(name, image, quality)) for quality in (0, 60, 95)}
        assert len(_file_of_at_most(name, image, sizes[60])) <= sizes[60]
        assert len(_file_of_at_most(name, image, 1)) == sizes[0]
        assert len(_file_of_at_most(name, image, 10**9)) == sizes[95]


def test_what_rd_refuses(tmp_path: Path) -> None:
    for options, error in (
        ({"codecs": ["dtc"]}, CodecError),
        ({"codecs": ["dct:luma"]}, UsageError),
        ({"bits": [9]}, UsageError),
        ({"rates": [0]}, UsageError),
        ({"qualities": [0]}, UsageError),
        ({"images": 0}, UsageError),
    ):
        with pytest.raises(error):
            rd("shapes", out=tmp_path, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_entropy_and_counts(dataset: Path) -> None:
    assert entropy(np.array([5, 5, 5, 5])) == 2
    assert entropy(np.array([0, 7])) == 0
    assert entropy(np.zeros(4, np.int64)) == 0
    opened = latentprep.open(dataset)
    counts, shards = channel_counts(opened)
    codes = np.concatenate([opened.load(split).codes for split in opened.splits if opened.manifest.views(split) == 1])
    assert counts.sum() == codes.size
    assert counts[2].tolist() == np.bincount(codes[:, :, 2].ravel(), minlength=len(counts[2])).tolist()
    assert shards == (2, 2)


def test_a_report_stands_alone(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = latentprep.report(dataset, out=out, samples=4)
    text = out.read_text()
    assert check_page(text).pictures
    assert "a &lt;dataset&gt; &amp; more" in text
    assert "<dataset>" not in text
    assert "class_1/003.jpg" in text  # the one that could not be read
    assert text.count("<svg") == latentprep.open(dataset).manifest.latent[0]  # a histogram per channel
    assert result.bytes == out.stat().st_size
    latentprep.report(dataset, out=tmp_path / "again.html", samples=4)
    assert (tmp_path / "again.html").read_bytes() == out.read_bytes()


def test_pages_escape_and_describe() -> None:
    with drawn(1) as ((axes,), picture):
        axes.plot([1, 2], [3, 4], color="#1f6feb", label="<b>")
        axes.legend(frameon=False)
    chart = page.chart(picture, 'a "line" & more')
    Strict(chart)
    assert "&lt;b&gt;" in chart
    assert 'aria-label="a &quot;line&quot; &amp; more"' in chart
    assert "var(--c0)" in chart
    assert not re.search(r"#[0-9a-f]{6}", chart)
    table = page.table("of <things>", ["", "share"], [["<a>", "50%"]], heat=[[0.5]])
    Strict(table)
    assert "<a>" not in table
    assert 'tabindex="0"' in table
    tile = page.tile(Image.new("RGB", (4, 4)), 'an "alt"', exact=True)
    assert "data:image/png;base64," in tile
    assert math.isclose(len(Strict(tile).pictures), 1)


def test_the_colours_of_pages_have_contrast() -> None:
    """WCAG AA: 4.5:1 for text on cards and on the page, light and dark, and under the strongest heat."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def ratio(one: str, two: str) -> float:
        light, dark = sorted((luminance(one), luminance(two)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    text = page.page("t", "l", []).decode()
    light, dark = text.split("@media")
    for style in (light, dark):
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", style))
        heat = [round(0.4 * int(colours["heat"][i : i + 2], 16) + 0.6 * int(colours["card"][i : i + 2], 16))
                for i in (1, 3, 5)]  # fmt: skip
        hot = "#" + "".join(f"{part:02x}" for part in heat)
        for ground in (colours["paper"], colours["card"]):
            assert ratio(colours["ink"], ground) >= 4.5
            assert ratio(colours["muted"], ground) >= 4.5
        assert ratio(colours["ink"], hot) >= 4.5
        for line in (f"c{i}" for i in range(6)):
            assert ratio(colours[line], colours["card"]) >= 3  # of graphics


def test_codecs_that_differ_in_their_weights_alone_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentprep.pictures import rd

    monkeypatch.setattr(rd, "open_codec", lambda spec, **_: spec)
    specs = ["dct", "taesd:weights=a", "taesd:weights=b", "sd-vae:weights=c,posterior=sample"]
    assert list(rd._built(specs, "cpu", 0)) == [*specs[:3], "sd-vae:posterior=sample"]
