"""`export`: one file that other runtimes read, and predictions from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import latentprep
import latenttrain
from inprocess import command
from latentprep.codecs import open_codec
from latentprep.errors import CheckpointError, LatentError, UsageError
from latentprep.format import Quantizer
from latentprep.quantizing.scalar import quantize
from latenttrain.exports import NOTES, OnnxModel, _onnx, _Quantized, _run_onnx
from pictures import make_folder

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("export") / "images", train=24, val=12)


@pytest.fixture(scope="module")
def run(images: Path) -> Path:
    """A run on dct codes."""
    folder = images.parent
    latentprep.encode(images, codec="dct", size=64, bits=3, out=folder / "codes")
    latenttrain.fit(folder / "codes", width=0.1, epochs=1, batch_size=8, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def pixels_model(run: Path) -> Path:
    to = run.parent / "pixels.onnx"
    result = latenttrain.export(run, to=to, with_codec=True)
    assert (result.input, result.shape, result.checked) == ("pixels", (3, 64, 64), 8)
    assert result.difference < 1e-4
    return to


@pytest.fixture(scope="module")
def codes_model(run: Path) -> Path:
    to = run.parent / "codes.onnx"
    result = latenttrain.export(run, to=to)
    assert (result.input, result.shape, result.real, result.same_top1) == ("codes", (16, 8, 8), True, result.checked)
    return to


def probabilities(run: Path, dataset: Path) -> np.ndarray:
    from latenttrain.checkpoint import load_net

    codes = latentprep.open(dataset).load("val").codes[:, 0]
    with torch.no_grad():
        return load_net(run)[0](torch.from_numpy(codes.copy())).softmax(1).numpy()


def test_codes_to_probabilities_in_any_batch(run: Path, codes_model: Path) -> None:
    session, dataset = onnxruntime.InferenceSession(codes_model), run.parent / "codes"
    codes = latentprep.open(dataset).load("val").codes[:, 0]
    expected = probabilities(run, dataset)
    for part in (slice(0, 1), slice(0, 7), slice(None)):
        (found,) = session.run(None, {"codes": codes[part]})
        assert np.abs(found - expected[part]).max() < 1e-5
    notes = json.loads(session.get_modelmeta().custom_metadata_map[NOTES])
    assert notes["classes"] == list(latentprep.open(dataset).classes)
    assert notes["transform"]["size"] == 64


def test_predict_with_a_file_says_what_it_says_with_the_run(run: Path, images: Path, pixels_model: Path) -> None:
    files = sorted((images / "val").rglob("*.jpg"))[:5]
    expected = latenttrain.predict(run, files, top=2)
    found = latenttrain.predict(pixels_model, files, top=2)
    for one, other in zip(expected, found, strict=True):
        assert one.image == other.image
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        assert [p for _, p in one.classes] == pytest.approx([p for _, p in other.classes], abs=1e-3)
    done = command("latenttrain", "predict", pixels_model, files[0], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"][0]["classes"][0]["name"] == found[0].classes[0][0]


def test_the_codes_of_a_file_go_through_the_codec(run: Path, images: Path, codes_model: Path) -> None:
    files = sorted((images / "val").rglob("*.jpg"))[:3]
    expected, found = (latenttrain.predict(what, files, top=1) for what in (run, codes_model))
    assert [one.classes[0][0] for one in expected] == [one.classes[0][0] for one in found]


def test_a_program_of_torch_export(run: Path) -> None:
    to = run.parent / "model.pt2"
    assert latenttrain.export(run, to=to).difference < 1e-5
    extra = {f"{NOTES}.json": ""}
    program = torch.export.load(to, extra_files=extra).module()
    codes = torch.from_numpy(latentprep.open(run.parent / "codes").load("val").codes[:5, 0].copy())
    assert np.abs(program(codes).detach().numpy() - probabilities(run, run.parent / "codes")[:5]).max() < 1e-5
    assert json.loads(extra[f"{NOTES}.json"])["input"] == "codes"


@pytest.mark.parametrize("codec", ["dct", "dct:luma=3,chroma=0", "resample:factor=1", "resample:factor=4"])
def test_graphs_do_what_encode_does(codec: str) -> None:
    made = open_codec(codec, device=torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert (made.graph()(pixels) - made.encode(pixels)).abs().max() < 1e-2  # type: ignore[attr-defined]


def test_the_graph_of_an_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = (8, 8, 8)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=sizes, decoder_block_out_channels=sizes, num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    made = open_codec(f"taesd:weights={tmp_path},dtype=float32", device=torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert (made.graph()(pixels) - made.encode(pixels)).abs().max() < 1e-5  # type: ignore[attr-defined]


@pytest.mark.parametrize("each", [(1, 1, 1), (4, 4, 4), (8, 8, 8), (5, 0, 1)])
def test_the_quantizer_in_a_file_gives_the_codes_of_quantize(each: tuple[int, ...]) -> None:
    """At the edges of cells, beside them, and outside the range."""
    quantizer = Quantizer(max(each), (-1.7, 0.25, 3.0), (0.3, 0.007, 1.0), channel_bits=each)
    lo, step = (torch.tensor(values)[:, None] for values in (quantizer.lo, quantizer.step))
    edges = lo + torch.arange(-3, quantizer.levels + 4) * step
    up, down = (edges.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    far = torch.tensor([-1e30, 1e30]).expand(3, 2)
    latents = torch.cat([edges, up, down, far], 1)[None, :, None]

    module = _Quantized(torch.nn.Identity(), quantizer).eval()
    data = _onnx(module, latents.expand(2, -1, -1, -1).contiguous(), "latents", {})
    found = _run_onnx(data, latents.numpy())
    assert found.dtype == np.uint8
    assert (found == quantize(latents, quantizer).numpy()).all()


def test_a_file_is_compared_with_the_codec_itself(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec whose graph computes something else leaves no file."""
    from latentprep.codecs.dct import DctCodec

    right = DctCodec.graph
    monkeypatch.setattr(DctCodec, "graph", lambda codec: torch.nn.Sequential(Halved(), right(codec)))
    with pytest.raises(CheckpointError, match="would compute something else"):
        latenttrain.export(run, to=tmp_path / "model.onnx", with_codec=True)
    assert not list(tmp_path.iterdir())


class Halved(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels // 2


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.pt2"):
        latenttrain.export(run, to=tmp_path / "model.pb")
    latentprep.encode(run.parent / "images", codec="dct", size=64, joint=True, bits=1, out=tmp_path / "joint")
    latenttrain.fit(tmp_path / "joint", width=0.1, epochs=1, batch_size=8, out=tmp_path / "run")
    with pytest.raises(UsageError, match="chosen jointly"):
        latenttrain.export(tmp_path / "run", to=tmp_path / "model.onnx", with_codec=True)
    assert not list(tmp_path.glob("model*"))
    result = latenttrain.export(tmp_path / "run", to=tmp_path / "codes.onnx")  # codes to probabilities works
    assert result.same_top1 == result.checked
    with pytest.raises(UsageError, match=r"no \.pt2 file"):
        latenttrain.predict(tmp_path / "model.pt2", "photo.jpg")


def test_files_that_are_no_export(run: Path, pixels_model: Path, tmp_path: Path) -> None:
    import onnx

    (tmp_path / "text.onnx").write_text("no")
    plain = onnx.load(pixels_model)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    edits = {
        "classes": lambda notes: notes["classes"].append("another"),
        "fewer": lambda notes: notes["classes"].pop(),
        "size": lambda notes: notes["transform"].update(size=48),
        "input": lambda notes: notes.update(input="codes"),
        "codec": lambda notes: notes.update(codec={}),
    }
    for name, edit in edits.items():
        other = onnx.load(pixels_model)
        notes = json.loads(other.metadata_props[0].value)
        edit(notes)
        onnx.helper.set_model_props(other, {NOTES: json.dumps(notes)})
        onnx.save(other, tmp_path / f"{name}.onnx")
    wrong = onnx.load(pixels_model)
    onnx.helper.set_model_props(wrong, {NOTES: '{"input": "sound"}'})
    onnx.save(wrong, tmp_path / "wrong.onnx")
    for name in ("absent", "text", "plain", "wrong", *edits):
        with pytest.raises(LatentError) as error:
            OnnxModel(tmp_path / f"{name}.onnx")
        assert f"{name}.onnx" in str(error.value)
    for name in ("absent", "text", "plain", "wrong"):
        done = command("latenttrain", "predict", tmp_path / f"{name}.onnx", "photo.jpg")
        assert done.returncode in (6, 7)
        assert "Traceback" not in done.stderr
