"""Codecs that give tokens go through everything that latents go through: images and sound alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from told import Interrupting

import latentprep
import latenttrain
from inprocess import command
from latentprep.audit.latents import write_latents
from latentprep.codecs import make_codec
from latentprep.device import code_tensor
from latentprep.errors import CheckpointError, CodecError, DatasetError, UsageError
from latentprep.format.manifest import CODEBOOKS, MANIFEST
from latentprep.format.quantizer import Codebook
from latentprep.quantizing.scalar import dequantize, quantize
from latentprep.quantizing.tokens import codebook_of
from latenttrain.augment import Augment, with_fewer_stages
from latenttrain.checkpoint import load_tensors
from latenttrain.stems import CodebookStem
from sounds import make_sounds

PLUGIN = Path(__file__).parents[2] / "plugin"
STAGES = {"patches": 3, "loudness": 2}
BITS = {"patches": 4, "loudness": 10}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture(params=list(STAGES))
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(codec: str, tmp_path: Path) -> Any:
    return "shapes" if codec == "patches" else make_sounds(tmp_path / "words", train=10)


@pytest.fixture
def shards(codec: str, source: Any, tmp_path: Path) -> Path:
    size = {"size": 32} if codec == "patches" else {}
    latentprep.encode(source, codec=codec, shard_rows=12, limit=24, **size, out=tmp_path / "shards")
    return tmp_path / "shards"


def test_a_dataset_of_tokens_has_its_codebooks(shards: Path, source: Any, codec: str) -> None:
    dataset, coder = latentprep.open(shards), make_codec(codec)
    quantizer, codes = dataset.quantizer, dataset.load("val").codes
    assert isinstance(quantizer, Codebook)
    assert json.loads((shards / MANIFEST).read_bytes())["quantizer"] == {
        "kind": "codebook",
        "bits": BITS[codec],
        "levels": [len(table) for table in coder.codebooks],
        "sha256": quantizer.sha256,
    }
    assert codes.dtype == quantizer.dtype == (np.uint8 if codec == "patches" else np.uint16)
    assert codes.shape[2] == STAGES[codec] == dataset.manifest.latent[0]
    latents = quantizer.dequantize(codes[:, 0])
    tables = enumerate(coder.codebooks)
    assert np.allclose(latents[0, :, 0, 0], sum(table[codes[0, 0, s, 0, 0]] for s, table in tables))
    assert torch.equal(dequantize(code_tensor(codes[:, 0]), quantizer), torch.from_numpy(latents))
    assert coder.decode(torch.from_numpy(latents)).shape[0] == len(codes)
    assert latentprep.verify(shards, deep=True, source=source, limit=24).ok
    assert latentprep.info(shards).bits == BITS[codec]


def test_an_interrupted_encode_goes_on_to_the_same_bytes(shards: Path, source: Any, codec: str) -> None:
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    for gone in (next((shards / "records").iterdir()), shards / MANIFEST):
        gone.unlink()
        size = {"size": 32} if codec == "patches" else {}
        if not (shards / MANIFEST).is_file():  # killed between the codebooks and the manifest
            for path in [*shards.rglob("*")]:
                if path.is_file() and path.name != CODEBOOKS:
                    path.unlink()
            for folder in sorted((p for p in shards.rglob("*") if p.is_dir()), reverse=True):
                folder.rmdir()
        latentprep.encode(source, codec=codec, shard_rows=12, limit=24, **size, out=shards)
        assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before


def test_fewer_stages_are_the_first_ones(shards: Path, codec: str, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    made = latentprep.requantize(shards, stages=1, out=fewer)
    assert made.latent[0] == 1
    whole, part = latentprep.open(shards), latentprep.open(fewer)
    assert np.array_equal(part.load("train").codes, whole.load("train").codes[:, :, :1])
    assert part.load("train").codes.dtype == np.uint8  # of sound, too: it is the second stage that needs more
    assert (fewer / CODEBOOKS).read_bytes() == (shards / CODEBOOKS).read_bytes()
    assert latentprep.verify(fewer, deep=True).ok
    codes = whole.load("val").codes[:, 0]
    part_of_it = part.quantizer.dequantize(codes[:, :1])
    assert np.allclose(part_of_it[0, :, 0, 0], make_codec(codec).codebooks[0][codes[0, 0, 0, 0]])


def test_other_stores_and_pictures(shards: Path, codec: str, tmp_path: Path) -> None:
    for store in ("wds", "parquet"):
        latentprep.convert(shards, store=store, out=tmp_path / store)
        latentprep.convert(tmp_path / store, store="zarr", out=tmp_path / f"{store}-back")
        assert latentprep.verify(tmp_path / f"{store}-back", deep=True).ok
        for path in (tmp_path / f"{store}-back").rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (shards / path.relative_to(tmp_path / f"{store}-back")).read_bytes()
    shown = latentprep.preview(shards, limit=2, out=tmp_path / "sheet.png")
    stages = STAGES[codec]
    assert f"{stages} stages" in shown.columns and "1 stage" in shown.columns
    latentprep.report(shards, out=tmp_path / "report.html")


def test_networks_learn_from_tokens(shards: Path, source: Any, codec: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = latenttrain.fit(shards, epochs=2, width=0.2, out=run)
    config = json.loads((run / "config.json").read_bytes())
    assert config["net"]["stem"] == "codebook" and config["augment"]["stage_drop"] > 0
    assert latenttrain.evaluate(run, shards, checkpoint="last").top1 == pytest.approx(made.last_top1)
    latentprep.requantize(shards, stages=1, out=tmp_path / "fewer")
    assert latenttrain.evaluate(run, tmp_path / "fewer").samples == latenttrain.evaluate(run, shards).samples
    learned = latenttrain.fit(shards, stem="embedding", epochs=1, width=0.2, out=tmp_path / "learned")
    tables = make_codec(codec).codebooks
    assert learned.parameters - made.parameters == len(tables) * 2 ** BITS[codec] * tables[0].shape[1]
    with pytest.raises(CheckpointError, match="quantizer"):
        latenttrain.evaluate(latenttrain.fit(tmp_path / "fewer", epochs=1, width=0.2, out=tmp_path / "r").run, shards)
    if codec == "loudness":
        [found] = latenttrain.predict(run, [source / "val" / "low" / "000.wav"])
        assert not found.error and found.classes


@pytest.mark.parametrize("stem", ["codebook", "embedding"])
def test_a_run_of_tokens_resumes_to_the_same_weights(shards: Path, stem: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stem": stem, "epochs": 3, "batch_size": 8, "width": 0.2}
    latenttrain.fit(shards, **settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        latenttrain.fit(shards, **settings, out=tmp_path / "broken", progress=Interrupting(4))
    latenttrain.fit(shards, **settings, out=tmp_path / "broken", resume=True)
    ours, theirs = (load_tensors(tmp_path / name / "last.safetensors")[0] for name in ("whole", "broken"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_or_missing_codebook_is_named(shards: Path) -> None:
    data = bytearray((shards / CODEBOOKS).read_bytes())
    data[-1] ^= 1
    (shards / CODEBOOKS).write_bytes(data)
    with pytest.raises(DatasetError, match="SHA-256"):
        latentprep.open(shards)
    (shards / CODEBOOKS).unlink()
    with pytest.raises(DatasetError, match="codebooks.safetensors is missing"):
        latentprep.open(shards)


def test_what_has_no_meaning_for_tokens_is_refused(shards: Path, source: Any, codec: str, tmp_path: Path) -> None:
    for options in ({"bits": 2}, {"rate": 1.0}, {"bytes": 50}, {"joint": True}):
        with pytest.raises(UsageError, match=f"gives codes of {BITS[codec]} bits itself"):
            latentprep.encode(source, codec=codec, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    for options in ({}, {"bits": 2}, {"stages": STAGES[codec]}, {"stages": 0}, {"stages": 1, "bits": 1}):
        with pytest.raises(UsageError, match="stages"):
            latentprep.requantize(shards, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="stages"):
        latentprep.preview(shards, bits=[2], out=tmp_path / "sheet.png")
    with pytest.raises(UsageError, match="no latents"):
        write_latents(shards, source, out=tmp_path / "latents")
    with pytest.raises(UsageError, match="stages in place of bits"):
        latenttrain.sweep(shards, bits=[2])
    with pytest.raises(UsageError, match="stage_drop"):
        latenttrain.fit(shards, stem="bitplane", augment=Augment(stage_drop=0.5), out=tmp_path / "run")


def test_stages_are_for_tokens_only(tmp_path: Path) -> None:
    latentprep.encode("shapes", codec="dct", size=64, limit=24, out=tmp_path / "dct")
    for options in ({"stages": 1}, {}):
        with pytest.raises(UsageError, match="bits"):
            latentprep.requantize(tmp_path / "dct", out=tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="stem"):
        latenttrain.fit(tmp_path / "dct", stem="codebook", out=tmp_path / "run")


def test_the_command_keeps_stages(shards: Path, tmp_path: Path) -> None:
    done = command("latentprep", "requantize", shards, "--stages", 1, "--out", tmp_path / "fewer", "--json")
    assert json.loads(done.stdout)["latent"][0] == 1


def test_tokens_that_no_code_can_hold_are_refused() -> None:
    codec = make_codec("patches")
    codec.codebooks = [np.zeros((1 << 17, 3), np.float32)]  # type: ignore[attr-defined]
    with pytest.raises(CodecError, match="17 bits"):
        codebook_of(codec)
    book = Codebook.of_tables([np.eye(3, dtype=np.float32)])
    with pytest.raises(CodecError, match="beyond"):
        quantize(torch.full((1, 1, 2, 2), 3, dtype=torch.uint8), book)
    with pytest.raises(CodecError, match="beyond"):
        quantize(torch.full((1, 1, 2, 2), -1), book)
    with pytest.raises(CodecError, match="must be uint8, int32 or int64"):
        quantize(torch.zeros(1, 1, 2, 2), book)
    with pytest.raises(DatasetError, match="stage 0 has the code 3"):
        book.dequantize(np.full((1, 1, 2, 2), 3, np.uint8))


def test_stages_that_are_left_out_add_nothing() -> None:
    random = np.random.default_rng(0)
    tables = [random.normal(3, 2, (n, 5)).astype(np.float32) for n in (4, 3)]
    stem = CodebookStem(2, 2, 5, learned=False)
    stem.load_state_dict({"vectors": CodebookStem.table_of(tables, 2)})
    codes = torch.from_numpy(random.integers(0, 3, (6, 2, 3, 4), np.uint8))
    spread = np.sqrt(sum(table.var(0) for table in tables))
    wanted = Codebook.of_tables(tables).dequantize(codes.numpy()) - sum(t.mean(0) for t in tables)[:, None, None]
    assert torch.allclose(stem(codes), torch.from_numpy(wanted / spread[:, None, None]), atol=1e-5)
    fewer = with_fewer_stages(codes, 1.0, torch.zeros(6, 2))
    assert torch.allclose(stem(fewer), stem(codes[:, :1]))
    kept = with_fewer_stages(codes, 0.0, torch.zeros(6, 2))
    assert torch.allclose(stem(kept), stem(codes))
    drawn = with_fewer_stages(codes.repeat(200, 4, 1, 1), 1.0, torch.rand(1200, 2))
    counts = (drawn[:, :, 0, 0] >= 0).sum(1)
    assert int(counts.min()) == 1 and int(counts.max()) == 8
