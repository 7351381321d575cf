import gzip
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import latenttrain
import profiles
from latentprep.errors import CheckpointError, CodecError, UsageError
from latentprep.format import open_dataset
from latentprep.quantizing.scalar import quantize
from latenttrain.checkpoint import load_net
from latenttrain.evaluation import scores
from latenttrain.nets import Net

CLASSES = ["apple", "birch", "cedar", "daisy"]


@pytest.fixture(scope="module")
def run(codes, tmp_path_factory, small):
    out = tmp_path_factory.mktemp("runs") / "run"
    latenttrain.fit(codes, **small, out=out)
    return out


def test_scores_of_known_logits():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 4)
    found = scores(logits, torch.tensor([0, 1, 4, 5]))
    assert (found["top1"], found["top5"]) == (0.25, 0.75)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 4, 5])).item())


def test_fewer_than_five_classes_are_all_in_the_top_five():
    assert scores(torch.randn(9, 3), torch.randint(0, 3, (9,)))["top5"] == 1


@pytest.mark.parametrize(("checkpoint", "line"), [("best", None), ("last", -1)])
def test_evaluating_gives_what_fit_reported(run, codes, checkpoint, line):
    epochs = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    expected = epochs[line] if line else max(epochs, key=lambda epoch: epoch["top1"])
    result = latenttrain.evaluate(run, codes, checkpoint=checkpoint)
    assert (result.epoch, result.top1, result.top5) == (expected["epoch"], expected["top1"], expected["top5"])
    assert result.loss == pytest.approx(expected["val_loss"])
    assert result.samples == 70


def test_per_class_accuracies_average_to_the_whole(run, codes):
    result = latenttrain.evaluate(run, codes, split="train")
    counts = np.bincount(open_dataset(codes).load("train").labels)
    assert list(result.per_class) == CLASSES
    assert np.average(list(result.per_class.values()), weights=counts) == pytest.approx(result.top1)


def test_other_images_of_the_same_encoding_may_be_evaluated(run, tmp_path, make_dataset):
    other = make_dataset("other", rows={"test": 3}, views=2)
    result = latenttrain.evaluate(run, other, split="test")
    assert result.samples == 3
    assert result.per_class["daisy"] is None


def test_a_split_that_is_not_there_is_said(run, codes):
    with pytest.raises(UsageError, match="no split 'test'"):
        latenttrain.evaluate(run, codes, split="test")


def test_a_dataset_of_another_codec_is_refused(run, make_dataset):
    with pytest.raises(CheckpointError, match=r"codec\.name"):
        latenttrain.evaluate(run, make_dataset(codec={"name": "dct"}))


def test_a_dataset_of_another_quantizer_or_transform_is_refused(run, codes, tmp_path):
    for change, field in (
        (lambda fields: fields["quantizer"]["step"].__setitem__(1, 0.125), r"quantizer\.step"),
        (lambda fields: fields["transform"].__setitem__("resize", "nearest"), r"transform\.resize"),
    ):
        copy = shutil.copytree(run, tmp_path / field)
        document = json.loads((copy / "config.json").read_text())
        change(document["dataset"])
        (copy / "config.json").write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=field):
            latenttrain.evaluate(copy, codes)


def test_predicting_with_other_weights_than_the_datasets_is_refused(run, images, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    document = json.loads((copy / "config.json").read_text())
    document["dataset"]["codec"] = {"name": "resample", "factor": 8, "weights_sha256": "0" * 64}
    (copy / "config.json").write_text(json.dumps(document))
    with pytest.raises(CodecError, match="not the ones this dataset was made with"):
        latenttrain.predict(copy, images)


class FakeCodec:
    """Means of 8 x 8 pixels: u8 [B,3,64,64] -> f32 [B,3,8,8] from -2 to 2."""

    def __init__(self, config, device, weights):
        assert config == {"name": "fake", "levels": 7}
        self.device, self.weights = device, weights

    def encode(self, images):
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 64, 64))
        return torch.nn.functional.avg_pool2d(images.float(), 8) / 255 * 4 - 2


@pytest.fixture
def fake_codec(monkeypatch):
    built = []

    def build(config, *, device="cpu", weights=None):
        built.append(FakeCodec(config, device, weights))
        return built[-1]

    monkeypatch.setattr("latentprep.codecs.codec_from_config", build)
    return built


@pytest.fixture
def images(tmp_path):
    """Twenty pictures of 64 x 64, more than a batch of the codec."""
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(20)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return paths


def by_hand(run, path):
    """Pixels, codec, quantizer, network, written out."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    net, config, _ = load_net(run)
    latents = FakeCodec({"name": "fake", "levels": 7}, "cpu", None).encode(pixels)
    return net(quantize(latents, config.quantizer)).softmax(1)[0]


def test_predicting_halves_what_does_not_fit_and_makes_planes_in_full_float32(run, images, fake_codec, monkeypatch):
    whole, real, fast = latenttrain.predict(run, images), Net.logits, set()

    def small(net, planes):
        fast.add(torch.get_float32_matmul_precision())
        if len(planes) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(net, planes)

    monkeypatch.setattr(Net, "logits", small)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = latenttrain.predict(run, images)
    finally:
        torch.set_float32_matmul_precision(before)
    assert fast == {"highest"}
    for mine, theirs in zip(found, whole, strict=True):
        assert dict(mine.classes) == pytest.approx(dict(theirs.classes), rel=1e-4)


def test_predictions_are_codec_quantizer_and_network(run, images, fake_codec):
    predictions = latenttrain.predict(run, images)
    assert [prediction.image for prediction in predictions] == [str(path) for path in images]
    for prediction in predictions:
        expected = by_hand(run, prediction.image)
        assert [name for name, _ in prediction.classes] == [CLASSES[i] for i in expected.argsort(descending=True)]
        assert [p for _, p in prediction.classes] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5
        )


def test_top_and_weights_are_passed_on(run, images, fake_codec):
    (prediction,) = latenttrain.predict(run, images[:1], top=2, weights="/somewhere")
    assert len(prediction.classes) == 2
    assert fake_codec[0].weights == "/somewhere"
    with pytest.raises(UsageError, match="top must be a whole number of 1 or more, got 0"):
        latenttrain.predict(run, images, top=0)


def test_images_are_made_into_pixels_as_encode_does(run, fake_codec, tmp_path):
    """Turned once, and in the colours that the network's dataset was made in."""
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3))
    image.save(tmp_path / "turned.tif", tiffinfo={0x0112: 6})
    Image.open(tmp_path / "turned.tif").save(tmp_path / "upright.png", icc_profile=None)
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "wide.png", icc_profile=profiles.P3_GAMMA)
    for name, colour in (("stored", (200, 100, 50)), ("srgb", (216, 93, 24))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}" for name in ("turned.tif", "upright.png", "wide.png", "stored.png", "srgb.png")]
    for field, like in ((None, 3), ("stored", 3), ("srgb", 4)):
        copy = shutil.copytree(run, tmp_path / f"run-{field}")
        document = json.loads((copy / "config.json").read_text())
        document["dataset"]["transform"] |= {} if field is None else {"colour": field}
        (copy / "config.json").write_text(json.dumps(document))
        found = [prediction.classes for prediction in latenttrain.predict(copy, paths)]
        assert found[0] == found[1]
        assert dict(found[2]) == pytest.approx(dict(found[like]), abs=2e-2)
        assert dict(found[3]) != dict(found[4])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"<!doctype html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (gzip.compress(b"picture", mtime=0), "a gzip file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pip install pillow-heif"),
    ],
)
def test_the_reason_names_the_cause(run, fake_codec, tmp_path, monkeypatch, data, reason):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(data)
    (prediction,) = latenttrain.predict(run, [tmp_path / "a.jpg"])
    assert reason in prediction.error


def test_images_that_cannot_be_read_are_named_and_the_others_go_on(run, images, fake_codec, tmp_path):
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("not a picture")
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "PNG")
    cut.write_bytes(whole.getvalue()[:60])
    asked = [text, images[0], tmp_path / "absent.jpg", cut, images[1], tmp_path]
    predictions = latenttrain.predict(run, asked)
    assert [bool(prediction.error) for prediction in predictions] == [True, False, True, True, False, True]
    assert "no such file" in predictions[2].error
    assert [prediction.image for prediction in predictions] == [str(path) for path in asked]


def test_no_readable_image_at_all_is_no_crash(run, fake_codec, tmp_path):
    (prediction,) = latenttrain.predict(run, [tmp_path / "absent.jpg"])
    assert prediction.to_json() == {"image": str(tmp_path / "absent.jpg"), "error": prediction.error}
