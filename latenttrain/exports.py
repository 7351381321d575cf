"""`export`: a run's network as one file for other runtimes, and predictions from such a file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from latentprep.device import code_tensor, full_float32, torch_dtype
from latentprep.errors import CheckpointError, LatentError, SystemFault, UsageError, opt, system_fault
from latentprep.format import Quantizer, open_dataset
from latentprep.format.fields import parse_json
from latentprep.format.quantizer import Codebook, read_quantizer
from latentprep.storage.atomic import write_atomic
from latentprep.storage.places import path_of
from latenttrain import __version__
from latenttrain.checkpoint import BEST, LAST, load_net
from latenttrain.config import RunConfig
from latenttrain.nets import Net
from latenttrain.networks import name_network

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from latentprep.codecs import Codec

NOTES = "latenttrain"  # the file's metadata under this name: JSON
KINDS = (".onnx", ".pt2")
_OPSET = 18
_CHECKED = 256  # samples that the file's results are compared on
_PIXELS_CHECKED = 8  # images, where the codec is in the file
_SAME = 1e-3  # the largest difference of a probability that is rounding
_SAME_PIXELS = 0.02  # where the codec is in the file: a latent between two codes may round either way


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote. input: ``codes`` or ``pixels``, u8, of this shape with any number of samples.

    checked: samples on which the file was compared with torch; real: whether they are of the run's dataset.
    difference: the largest of a probability; same_top1: how many have the same likeliest class.
    """

    to: str
    input: str
    shape: tuple[int, int, int]
    classes: int
    bytes: int
    checked: int
    real: bool
    difference: float
    same_top1: int

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def export(
    run: str | Path,
    *,
    to: str | Path,
    with_codec: bool = False,
    weights: str | Path | None = None,
    checkpoint: str = "best",
    arch: str | None = None,
) -> ExportResult:
    """Write a run's network, in float32, to one file: ``.onnx`` for onnxruntime, or ``.pt2``, of torch.export.

    It takes codes, u8 [B,C,h,w], i32 where they have more than 8 bits, or, with the codec's encoder and the quantizer
    in it, pixels, u8 [B,3,S,S], and gives probabilities, f32 [B,classes]. Classes, and how an image becomes pixels, are
    in the file's metadata. The file's results are compared with torch's before it is kept. weights: the folder of the
    codec's weights, if it has moved. checkpoint: ``best`` or ``last``. arch: the run's network, if it is one of your
    own, as for `evaluate`.

    Raises `CheckpointError` for a damaged run or a file that computes something else, `UsageError` for another ending,
    or a codec or quantizer that cannot be exported, `SystemFault` if the packages that it needs are not installed.
    """
    from latentprep.quantizing.scalar import quantize

    path = path_of(to)
    if path.suffix not in KINDS:
        raise UsageError(
            f"{opt('to')} must end in {' or '.join(KINDS)}, got {path.name}", f"use {opt('to', 'model.onnx')}"
        )
    name_network(arch or "")
    net, config, epoch = load_net(run, checkpoint)
    codes, real = _some_codes(config)
    if with_codec:
        codec, encoder = _encoder(config, weights)
        module: nn.Module = nn.Sequential(_Quantized(encoder, config.quantizer), _Codes(net))
        size = int(config.dataset["transform"]["size"])
        sample, real = _pictures(size), False
        codes_shape = (3, size, size)
        codes = quantize(codec.encode(sample), config.quantizer)  # by the codec itself, not by its graph
    else:
        module, sample, codes_shape = _Codes(net).eval(), codes, config.net.latent
    kind = "pixels" if with_codec else "codes"
    weights_file = path_of(run) / (BEST if checkpoint == "best" else LAST)
    notes = {
        "written_by": f"latenttrain {__version__}",
        "input": kind,
        "classes": list(config.classes),
        "transform": config.dataset["transform"],
        "codec": config.dataset["codec"],
        "quantizer": config.dataset["quantizer"],
        "epoch": epoch["epoch"],
        "checkpoint_sha256": hashlib.sha256(weights_file.read_bytes()).hexdigest(),
    }
    with torch.no_grad(), full_float32():
        module.eval()
        expected = net(codes).softmax(1).numpy()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporters' own, about torch's
                write = _onnx if path.suffix == ".onnx" else _pt2
                data = write(module, sample, kind, notes)
        except LatentError:
            raise
        except Exception as error:  # the exporters raise many kinds for what they do not know
            raise UsageError(
                f"this network cannot be exported to {path.suffix}: {_line(error)}", "try the other format"
            ) from error
        found = _run_onnx(data, sample.numpy()) if path.suffix == ".onnx" else _run_pt2(data, sample)
    difference = float(np.abs(found - expected).max())
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    result = ExportResult(
        str(path), kind, codes_shape, len(config.classes), len(data), len(sample), real, difference, same
    )
    if not difference <= (_SAME_PIXELS if with_codec else _SAME):  # nor NaN
        raise CheckpointError(
            f"{path.name} would compute something else: probabilities differ by up to {difference:.2g}, "
            f"{len(sample) - same} of {len(sample)} likeliest classes",
            "report this, with the versions of torch and onnx",
        )
    try:
        write_atomic(path, data)
    except OSError as error:
        raise system_fault(error) from error
    return result


class _Codes(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, codes: Tensor) -> Tensor:
        """u8 [B,C,h,w] -> f32 [B,classes]"""
        return self.net(codes).softmax(1)


class _Quantized(nn.Module):
    """Pixels to codes: an encoder, and what `quantize` does without a filter."""

    lo: Tensor
    step: Tensor
    tops: Tensor

    def __init__(self, encoder: nn.Module, quantizer: Quantizer) -> None:
        super().__init__()
        self.encoder = encoder
        for name in ("lo", "step"):
            self.register_buffer(name, torch.tensor(getattr(quantizer, name))[:, None, None])
        tops = torch.tensor(quantizer.channel_levels, dtype=torch.float32) - 1
        self.register_buffer("tops", tops[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """u8 [B,3,S,S] -> u8 [B,C,h,w]"""
        cells = (self.encoder(pixels) - self.lo) / self.step
        return cells.clamp(min=0).minimum(self.tops).floor().to(torch.uint8)


def _encoder(config: RunConfig, weights: str | Path | None) -> tuple[Codec, nn.Module]:
    """The codec in float32, and its encoder as a module that can be exported."""
    from latentprep.codecs import codec_from_config

    if config.quantizer.filter:
        raise UsageError(
            "codes that were chosen jointly come of a search, which cannot be exported",
            f"leave out {opt('with_codec', True)}, or encode with {opt('joint', False)}",
        )
    if isinstance(config.quantizer, Codebook):
        raise UsageError("a codec that gives tokens cannot be exported", f"leave out {opt('with_codec', True)}")
    document = config.dataset["codec"]
    document = document | ({"dtype": "float32"} if document.get("dtype") == "bfloat16" else {})
    codec = codec_from_config(document, device=torch.device("cpu"), weights=str(weights) if weights else None)
    if not hasattr(codec, "graph"):
        raise UsageError(
            f"codec '{codec.name}' has no graph() that could be exported", f"leave out {opt('with_codec', True)}"
        )
    return codec, codec.graph()


def _some_codes(config: RunConfig) -> tuple[Tensor, bool]:
    """Codes to compare on, u8 or i32 [n,C,h,w], and whether they are of the run's dataset; else they are random."""
    try:
        dataset = open_dataset(config.dataset["path"])
        if dataset.manifest.sha256 == config.dataset["manifest_sha256"]:
            split = "val" if "val" in dataset.splits else dataset.splits[0]
            return code_tensor(dataset.load(split, _CHECKED, keys=False).codes[:, 0].copy()), True
    except LatentError:
        pass  # it has moved, or is damaged: nothing of it is needed
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECKED, *config.net.latent)
    levels = torch.tensor(config.quantizer.channel_levels)[:, None, None]
    return (torch.rand(shape, generator=generator) * levels).to(torch_dtype(config.quantizer.dtype)), False


def _pictures(size: int) -> Tensor:
    """Random smooth pictures, u8 [n,3,S,S]"""
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(_PIXELS_CHECKED, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").round().to(torch.uint8)


def _onnx(module: nn.Module, sample: Tensor, kind: str, notes: dict) -> bytes:
    """The file's bytes."""
    _need("onnx", "onnxscript", "onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells what other packages it would know
    program = torch.onnx.export(
        module, (sample[:2],), dynamo=True, opset_version=_OPSET, input_names=[kind], output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 20)},), verbose=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props[NOTES] = json.dumps(notes)
    return program.model_proto.SerializeToString()


def _pt2(module: nn.Module, sample: Tensor, kind: str, notes: dict) -> bytes:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},)
    program = torch.export.export(module, (sample[:2],), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{NOTES}.json": json.dumps(notes)})
    return buffer.getvalue()


def _run_onnx(data: bytes, sample: np.ndarray) -> np.ndarray:
    session = _session(data)
    (given,) = session.get_inputs()
    return np.asarray(session.run(None, {given.name: sample})[0])


def _run_pt2(data: bytes, sample: Tensor) -> np.ndarray:
    return torch.export.load(io.BytesIO(data)).module()(sample).numpy()


def _session(model: bytes | str) -> InferenceSession:
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise SystemFault(f"ONNX files need the {package} package", "pip install 'latentprep[onnx]'")


class OnnxModel:
    """A file that `export` wrote, in onnxruntime.

    Raises `CheckpointError` for a file that is damaged or is of something else.
    """

    def __init__(self, path: Path, weights: str | Path | None = None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} is no file", "give the file that latenttrain export wrote")
        _need("onnxruntime")
        self.path = path
        try:
            self.session = _session(str(path))
        except Exception as error:  # onnxruntime's kinds are private
            raise CheckpointError(f"{path} is no ONNX file that runs: {_line(error)}", "export it again") from error
        written = self.session.get_modelmeta().custom_metadata_map.get(NOTES)
        if written is None:
            raise CheckpointError(f"{path} was not written by latenttrain export", "export the run")
        notes = parse_json(written.encode(), f"{path}: its metadata", way_out := "export it again")
        self.input = notes.text("input", ("codes", "pixels"))
        self.classes = notes.list("classes", str)
        transform = notes.object("transform")
        self.transform, size = transform.document, transform.whole("size", 1, 1 << 32)
        self.quantizer = read_quantizer(notes.object("quantizer"))
        notes.object("codec").text("name")
        given, gives = self.session.get_inputs(), self.session.get_outputs()
        self.name = given[0].name if given else ""
        shapes = [list(one.shape[1:]) for one in (*given, *gives)]
        takes = (
            [3, size, size] if self.input == "pixels" else [len(self.quantizer.lo), *(shapes[0][1:] if given else ())]
        )
        if shapes != [takes, [len(self.classes)]] or not self.classes:
            raise CheckpointError(f"{path}: what its network takes and gives is not what its metadata says", way_out)
        self._codec: Codec | None = None
        if self.input == "codes":
            from latentprep.codecs import codec_from_config

            self._codec = codec_from_config(
                notes.object("codec").document, device=torch.device("cpu"), weights=str(weights) if weights else None
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """u8 [B,3,S,S] -> probabilities, f32 [B,classes]"""
        if self._codec is not None:
            from latentprep.codecs import encoder_of
            from latentprep.quantizing.scalar import quantize

            pixels = quantize(encoder_of(self._codec)(pixels), self.quantizer)
        try:
            found = self.session.run(None, {self.name: pixels.cpu().numpy()})[0]
        except Exception as error:  # onnxruntime's kinds are private
            raise CheckpointError(f"{self.path} does not run: {_line(error)}", "export it again") from error
        return torch.from_numpy(np.asarray(found))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
