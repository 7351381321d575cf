"""What is promised of a device, on one that is here: CUDA where there is a card (`make bench-gpu`), else the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import latentprep
import latenttrain
from latentprep.codecs import make_codec
from latentprep.quantizing.scalar import fit_quantizer, quantize
from latenttrain.nets import ARCHITECTURES
from latenttrain.stems import STEMS

CUDA = torch.cuda.is_available()
LAST = f"cuda:{torch.cuda.device_count() - 1}" if CUDA else "cpu"  # of several cards, one that is not the current one
RUN = {"epochs": 2, "batch_size": 8, "width": 0.25, "depth": 0.5, "device": LAST}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Codes made on the device, plain and joint."""
    root = tmp_path_factory.mktemp("accelerator")
    made = {}
    for joint in (False, True):
        made[joint] = root / f"joint-{joint}"
        latentprep.encode("shapes", codec="dct", size=64, bits=2, limit=40, joint=joint, device=LAST, out=made[joint])
    return made


@pytest.mark.parametrize("codec", ["dct", "learned", "resample", "scatter"])
def test_codes_are_those_of_the_cpu_but_for_values_between_two(codec: str) -> None:
    pictures = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    pictures = torch.nn.functional.interpolate(pictures, size=(64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    host, there = make_codec(codec).encode(pictures), make_codec(codec, device=LAST).encode(pictures)
    assert there.cpu() == pytest.approx(host, abs=1e-3)
    quantizer = fit_quantizer(host, 4)
    apart = (quantize(there, quantizer).cpu().int() - quantize(host, quantizer).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_an_encode_makes_the_same_bytes_again(shards: dict[bool, Path], tmp_path: Path, joint: bool) -> None:
    latentprep.encode(
        "shapes", codec="dct", size=64, bits=2, limit=40, joint=joint, device=LAST, out=tmp_path / "again"
    )
    manifests = [(root / "manifest.json").read_bytes() for root in (shards[joint], tmp_path / "again")]
    assert manifests[0] == manifests[1]
    for split in ("train", "val"):
        first, again = (latentprep.open(root).load(split).codes for root in (shards[joint], tmp_path / "again"))
        assert (first == again).all()


@pytest.mark.parametrize(
    "options",
    [*({"stem": stem} for stem in STEMS), *({"arch": arch} for arch in ARCHITECTURES if arch != "latentnet"),
     {"stream": True, "buffer": 1}, {"recipe": "talk"}, *([{"compile": True}] if CUDA else [])],
    ids=str,
)  # fmt: skip
def test_a_seed_decides_every_bit(shards: dict[bool, Path], tmp_path: Path, options: dict) -> None:
    results = [latenttrain.fit(shards[False], out=tmp_path / name, **{**RUN, **options}) for name in "ab"]
    assert results[0].top1 == results[1].top1
    assert (tmp_path / "a" / "best.safetensors").read_bytes() == (tmp_path / "b" / "best.safetensors").read_bytes()


def test_codes_chosen_together_are_learned_judged_and_decoded(shards: dict[bool, Path], tmp_path: Path) -> None:
    made = latenttrain.fit(shards[True], out=tmp_path / "run", **RUN)
    assert latenttrain.evaluate(tmp_path / "run", shards[True], device=LAST).top1 == made.top1
    elsewhere = latenttrain.evaluate(tmp_path / "run", shards[True], device="cpu")
    assert elsewhere.loss == pytest.approx(latenttrain.evaluate(tmp_path / "run", shards[True], device=LAST).loss, 0.02)
    assert latentprep.decode(shards[True], out=tmp_path / "pictures", limit=2, device=LAST).all.images == 2
