"""`sweep` and its float reference, held-out parts of train, recipes by name, compound scaling."""

import csv
import json

import numpy as np
import pytest
import torch

import latentprep
import latenttrain
from latentprep.errors import DatasetError, SourceError, UsageError
from latentprep.quantizing.scalar import quantize
from latentprep.sources.source import open_source
from latenttrain.checkpoint import load_net, read_config
from latenttrain.cli import _numbers
from latenttrain.data import float_codes, load_trained
from latenttrain.recipe import default_lr, preset_settings
from latenttrain.results import FLOAT
from latenttrain.scaling import scale_table
from latenttrain.sweeps import Group, recommended, sweep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """`shapes` at 8 bits, and its float latents."""
    root = tmp_path_factory.mktemp("shapes")
    options = {"codec": "dct", "size": 64, "limit": 60}
    latentprep.encode("shapes", bits=8, out=root / "x8", **options)
    latentprep.write_latents(root / "x8", open_source("shapes").take(60), out=root / "floats")
    return root


def test_float_latents_are_what_was_quantized(shapes):
    dataset = latentprep.open(shapes / "x8")
    values = np.load(shapes / "floats" / "val.npy")
    assert (values.dtype, values.shape) == (np.float16, (60, *dataset.manifest.latent))
    codes = dataset.load("val").codes[:, 0].astype(int)
    again = quantize(torch.from_numpy(values.astype(np.float32)), dataset.quantizer).numpy().astype(int)
    assert np.abs(codes - again).max() <= 1  # float16 may cross a threshold
    assert (codes == again).mean() > 0.9
    fractional = float_codes(dataset, "val", shapes / "floats").numpy()[:, 0]
    assert np.allclose(
        dataset.quantizer.dequantize(fractional[:, None])[:, 0], values.astype(np.float32), rtol=1e-3, atol=1e-2
    )


def test_float_latents_are_scaled_by_their_own_statistics(shapes, tmp_path):
    dataset = latentprep.open(shapes / "x8")
    latenttrain.fit(dataset, latents=shapes / "floats", out=tmp_path / "run", epochs=1, device="cpu")
    net, config, _ = load_net(tmp_path / "run")
    assert config.net.std != dataset.manifest.statistics.std
    planes = net.planes(load_trained(dataset, CPU, latents=shapes / "floats")[0].codes[:, 0])
    assert torch.allclose(planes.mean((0, 2, 3)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(planes.std((0, 2, 3)), torch.ones(16), atol=1e-3)


def test_held_out_train_needs_no_val(tmp_path):
    latentprep.encode("shapes", codec="dct", size=64, limit=40, splits=["train"], out=tmp_path / "train")
    result = latenttrain.fit(tmp_path / "train", holdout=0.2, out=tmp_path / "run", epochs=1, device="cpu")
    assert 0 <= result.top1 <= 1


def test_float_latents_of_another_dataset_are_refused(shapes, tmp_path, codes):
    with pytest.raises(DatasetError, match="latents of another dataset"):
        latenttrain.fit(codes, latents=shapes / "floats", out=tmp_path / "run", epochs=1)
    with pytest.raises(DatasetError, match="holds no float latents"):
        latenttrain.fit(codes, latents=tmp_path, out=tmp_path / "run", epochs=1)


def test_latents_of_another_source_or_folder_are_never_made_out_to_be_this_ones(shapes, tmp_path):
    with pytest.raises(SourceError, match="is not the source that .* was made from"):
        latentprep.write_latents(shapes / "x8", open_source("shapes", seed=1).take(59), out=tmp_path / "floats")
    latentprep.encode("shapes", codec="dct", size=64, limit=30, bits=8, out=tmp_path / "other")
    with pytest.raises(DatasetError, match="latents of another dataset"):
        latentprep.write_latents(tmp_path / "other", open_source("shapes").take(30), out=shapes / "floats")


def test_what_cannot_be_compared_is_refused_before_anything_is_made(make_dataset, shapes, tmp_path):
    with pytest.raises(UsageError, match="3 views, but float latents have view 0"):
        sweep(make_dataset(views=3), bits=[2], latents=shapes / "floats", out=tmp_path / "sweep")
    for bits, stems, words in (([2], ["affin"], "unknown stem 'affin'"), ([2.5], ["affine"], "got 2.5")):
        with pytest.raises(UsageError, match=words):
            sweep(shapes / "x8", bits=bits, stems=stems, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_latents_again_leave_whole_splits_alone(shapes):
    before = (shapes / "floats" / "train.npy").stat().st_mtime_ns
    latentprep.write_latents(shapes / "x8", open_source("shapes").take(60), out=shapes / "floats")
    assert (shapes / "floats" / "train.npy").stat().st_mtime_ns == before


def test_a_sweep_measures_every_bit_stem_and_seed_and_goes_on_where_it_stopped(shapes, tmp_path):
    asked = {
        "seeds": 2,
        "epochs": 1,
        "limit": 20,
        "device": "cpu",
        "out": tmp_path / "sweep",
        "latents": shapes / "floats",
    }
    result = sweep(shapes / "x8", bits=[1, 8], stems=["affine", "bitplane"], **asked)
    want = {(FLOAT, "affine"), (1, "affine"), (1, "bitplane"), (8, "affine"), (8, "bitplane")}
    assert {(g.bits, g.stem) for g in result.groups} == want
    assert all(g.n == 2 for g in result.groups)
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["bits"] for row in rows} == {"float", "1", "8"}
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    sizes = {g.bits: g.bytes_per_image for g in result.groups}
    assert sizes[1] < sizes[8] < sizes[FLOAT]
    weights = [p.stat().st_mtime_ns for p in sorted((tmp_path / "sweep").rglob("best.safetensors"))]
    again = sweep(shapes / "x8", bits=[1, 8], stems=["affine", "bitplane"], **asked)
    assert again.groups == result.groups
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "sweep").rglob("best.safetensors"))] == weights


def test_more_bits_than_there_are_are_refused(codes, tmp_path):
    with pytest.raises(UsageError, match="bits must be 1 to 4, .* got 5"):
        sweep(codes, bits=[2, 5], out=tmp_path / "sweep")


def test_the_fewest_bits_within_the_margin_are_recommended():
    groups = [Group(b, "affine", top1, 0.0, 3, b * 400.0) for b, top1 in ((FLOAT, 0.87), (4, 0.868), (2, 0.855))]
    assert recommended(groups, 0.5)[0] == 4
    assert recommended(groups, 2)[0] == 2
    none, why = recommended(groups, 0.1)
    assert none is None
    assert "loses more than 0.1 points" in why


def test_a_recommendation_regards_the_noise_of_the_seeds():
    def advice(deviation, n, margin=0.5):
        rows = ((FLOAT, "affine", 0.87), (4, "affine", 0.866), (4, "embedding", 0.868))
        return recommended([Group(b, stem, top1, deviation, n, 400.0) for b, stem, top1 in rows], margin)[1]

    assert advice(0.004, 3).startswith(
        "4 bits with stem affine: 0.40 points below float latents (within the noise of 0.65)"
    )
    assert advice(0.0001, 3).startswith("4 bits with stem embedding: 0.20 points below float latents (beyond the noise")
    assert "one seed, so the noise is unknown" in advice(0.0, 1)


def test_a_held_out_part_of_train_takes_the_place_of_val(codes, tmp_path, small):
    dataset = latentprep.open(codes)
    learned, judged = load_trained(dataset, CPU, holdout=0.25)
    assert (len(learned), len(judged)) == (150, 50)
    whole = {row.tobytes() for row in dataset.load("train").codes}
    assert {row.numpy().tobytes() for row in [*learned.codes, *judged.codes]} == whole
    again = load_trained(dataset, CPU, holdout=0.25)[1]
    assert torch.equal(again.codes, judged.codes)
    latenttrain.fit(codes, holdout=0.25, out=tmp_path / "run", **small)
    assert read_config(tmp_path / "run").dataset["holdout"] == 0.25
    with pytest.raises(UsageError, match="holdout must be a number from 0 to 0.9"):
        latenttrain.fit(codes, holdout=1, out=tmp_path / "other", **small)


def test_presets_set_what_goes_together_unless_it_is_given(codes, tmp_path):
    fast = latenttrain.fit(codes, preset="fast", epochs=1, device="cpu", out=tmp_path / "fast")
    config = read_config(tmp_path / "fast")
    assert (config.net.width, config.recipe.epochs, fast.epochs) == (1, 1, 1)
    assert (config.recipe.batch_size, config.recipe.lr) == (32, default_lr(32, 1, 200))
    latenttrain.fit(codes, preset="best", width=0.3, depth=0.5, epochs=1, device="cpu", out=tmp_path / "best")
    config = read_config(tmp_path / "best")
    assert (config.net.width, config.net.full_grid) == (0.3, 2)
    assert (config.recipe.batch_size, config.recipe.lr) == (32, default_lr(32, 1, 200))
    assert preset_settings("best")["epochs"] > preset_settings("fast")["epochs"]
    with pytest.raises(UsageError, match="unknown preset 'fats'"):
        latenttrain.fit(codes, preset="fats", out=tmp_path / "other")


def test_the_talks_recipe_is_plain_adam(codes, tmp_path):
    latenttrain.fit(codes, recipe="talk", epochs=2, width=0.25, depth=0.5, device="cpu", out=tmp_path / "run")
    config = read_config(tmp_path / "run")
    recipe = config.recipe
    assert (recipe.optimizer, recipe.schedule, recipe.batch_size, recipe.lr) == ("adam", "constant", 32, 0.001)
    assert (recipe.weight_decay, recipe.label_smoothing, recipe.warmup, recipe.ema) == (0, 0, 0, 0)
    assert {recipe.lr_at(step, 6) for step in range(12)} == {0.001}
    assert config.augment == latenttrain.Augment.none()
    assert load_net(tmp_path / "run", "last")[2]["epoch"] == 2
    with pytest.raises(UsageError, match="unknown recipe 'talks'"):
        latenttrain.fit(codes, recipe="talks", out=tmp_path / "other")


def test_the_talks_recipe_resumes_to_the_same_weights(codes, tmp_path):
    asked = {"recipe": "talk", "width": 0.25, "depth": 0.5, "device": "cpu", "epochs": 3}
    latenttrain.fit(codes, **asked, out=tmp_path / "whole")
    latenttrain.fit(codes, **(asked | {"epochs": 1}), out=tmp_path / "part")
    document = json.loads((tmp_path / "part" / "config.json").read_text())
    document["recipe"]["epochs"] = 3  # what a run killed after its first epoch left
    (tmp_path / "part" / "config.json").write_text(json.dumps(document))
    latenttrain.fit(codes, **asked, out=tmp_path / "part", resume=True)
    assert (tmp_path / "part" / "best.safetensors").read_bytes() == (
        tmp_path / "whole" / "best.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("text", "found"), [("0..3", [0, 1, 2, 3]), ("1-8", list(range(1, 9))), ("0,2.5", [0, 2.5])])
def test_numbers_as_people_write_them(text, found):
    assert _numbers("--bits", text) == found


@pytest.mark.parametrize("text", ["", "3..1", "a", "1..", "1...4"])
def test_numbers_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="--phi must be like"):
        _numbers("--phi", text)


def test_flops_grow_by_alpha_beta_squared_gamma_squared_within_rounding():
    """Whole blocks, multiples of 8 channels and whole cells: each row is between the steps next to the exact one."""
    rows = scale_table(None, [0, 1, 2, 3, 4, 5, 6])
    assert rows[0]["growth"] == rows[0]["expected"] == 1
    assert rows[1]["expected"] == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    assert rows[6]["growth"] == pytest.approx(rows[6]["expected"], rel=0.25)
    slope = np.polyfit([row["phi"] for row in rows], np.log([row["growth"] for row in rows]), 1)[0]
    assert np.exp(slope) == pytest.approx(1.2 * 1.1**2 * 1.15**2, rel=0.1)


def test_scale_and_sweep_on_the_command_line(latenttrain, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = latenttrain("scale", "--phi", "0..3", "--json")
    assert code == 0
    assert json.loads(out)["rows"][0]["parameters"] == 240_010
    code, out, _ = latenttrain("scale", shapes / "x8")
    assert "8×8×16" in out
    code, out, _ = latenttrain("fit", "--help")
    assert "default 15" in out
    code, out, _ = latenttrain("sweep", shapes / "x8", "--bits", "2", "--seeds", "1", "--epochs", "1")
    assert code == 0
    assert "recommended" in out
    assert (tmp_path / "sweeps" / "x8" / "sweep.png").exists()
    code, _, err = latenttrain("sweep", shapes / "x8", "--bits", "9")
    assert (code, "--bits must be 1 to 8" in err) == (2, True)
