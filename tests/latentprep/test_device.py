"""Encoding on devices that are not here."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import meta, queued
from torch import Tensor

import latentprep
from latentprep.codecs import codec_from_config, make_codec
from latentprep.codecs.dct import DctCodec
from latentprep.device import Fitting, full_float32, has_fast_bfloat16, out_of_memory, sent, to_host
from latentprep.encoding import driver
from latentprep.encoding import encode as encoder
from latentprep.encoding.encode import encode
from latentprep.encoding.pipeline import Stages
from latentprep.errors import DatasetError, SystemFault
from latentprep.format import Quantizer
from latentprep.pictures.samples import decoded
from latentprep.quantizing import joint as joint_codes
from latentprep.quantizing.joint import constants, fit_filter
from latentprep.quantizing.scalar import dequantize, quantize, quantize_counting

OOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore"),
    RuntimeError("MPS backend out of memory"),
)
OTHER_OOM = (
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # of pinned memory, too
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
)


def tf32_allowed() -> bool:
    return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("joint", [False, True])
def test_no_batch_makes_the_host_wait(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: bool
) -> None:
    """Batches go to the device and come back in passing, and the codec's own stream says when they are there."""
    create = driver.create_dataset

    def calibrated(*arguments) -> None:
        watched.waits.clear()
        watched.passing = 0
        create(*arguments)

    monkeypatch.setattr(driver, "create_dataset", calibrated)

    def under_guard(encode, pixels):
        guards.add(torch.cuda.current_stream())
        return encode(pixels)

    batches, guards = {}, set[str]()
    for batch_size in (8, 1):
        constants.cache_clear()
        with queued() as (watched, streams):
            codec = DctCodec(luma=1, chroma=0, device="meta")  # a search of more channels is slow when watched
            codec.flip = lambda _: None  # type: ignore
            codec.encode = partial(under_guard, codec.encode)  # type: ignore
            encode(images, codec=codec, size=64, out=tmp_path / str(batch_size), joint=joint, bits=2,
                   batch_size=batch_size, workers=1)  # fmt: skip
        batches[batch_size] = len(streams.recorded)
        assert set(streams.recorded) == {("meta", "meta")}
        assert watched.waits == ["torch.tensor"] * 3  # the quantizer's constants, once
        assert watched.passing == 4 * len(streams.recorded)  # images; codes, which are finite, which saturate
    constants.cache_clear()
    assert batches[1] > 2 * batches[8]
    assert guards == {"meta"}


def test_constants_are_sent_to_a_device_once() -> None:
    constants.cache_clear()
    quantizer = Quantizer(2, (-1.0, -2.0), (0.5, 1.0), tuple(0.01 * i for i in range(36)))
    with meta() as watched:
        latents = torch.empty(3, 2, 8, 8, device="meta")
        quantize_counting(latents, quantizer)
        first = len(watched.waits)
        for _ in range(3):
            dequantize(quantize(latents, quantizer), quantizer)
            quantize_counting(latents, quantizer)
    constants.cache_clear()
    assert first == len(watched.waits) == 3


def test_a_filter_is_fitted_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, which MPS has not."""
    real, seen = joint_codes._least_squares, set()
    monkeypatch.setattr(
        joint_codes, "_least_squares", lambda *some: seen.update(t.device.type for t in some) or real(*some)
    )
    constants.cache_clear()
    with meta():
        fit_filter(torch.empty(2, 1, 8, 8, device="meta"), Quantizer(2, (-1.0,), (0.5,)))
    constants.cache_clear()
    assert seen == {"cpu"}


def test_constants_made_in_inference_serve_outside_of_it() -> None:
    quantizer = Quantizer(3, (-1.25,), (0.375,))
    with torch.inference_mode():
        quantize(torch.zeros(1, 1, 8, 8), quantizer)
    latents = torch.zeros(1, 1, 8, 8, requires_grad=True)
    ((latents * constants(quantizer, latents.device)[1]).sum()).backward()
    assert latents.grad is not None


@pytest.mark.parametrize("error", OOM, ids=["cuda", "mps"])
def test_a_batch_that_does_not_fit_is_halved_and_the_codes_are_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    encode(images, codec="dct", size=64, out=tmp_path / "whole", device="cpu")
    real, sizes = DctCodec.encode, []

    def small(codec: DctCodec, pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise error
        return real(codec, pixels)

    monkeypatch.setattr(DctCodec, "encode", small)
    encode(images, codec="dct", size=64, out=tmp_path / "halved", device="cpu")
    assert max(sizes) > 3
    assert sum(size > 3 for size in sizes) <= 4  # what does not fit is remembered
    for split in latentprep.open(tmp_path / "whole").splits:
        codes = [latentprep.open(tmp_path / name).load(split).codes for name in ("whole", "halved")]
        assert np.array_equal(*codes)


@pytest.mark.parametrize("error", OOM, ids=["cuda", "mps"])
def test_one_image_that_does_not_fit_says_the_way_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def too_small(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(DctCodec, "encode", too_small)
    with pytest.raises(SystemFault, match=r"a single sample does not fit in memory: .*smaller size.*device='cpu'"):
        encode(images, codec="dct", size=64, out=tmp_path / "out", device="cpu")


def test_decoding_halves_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentprep.pictures.decode import decode

    encode(images, codec="dct", size=64, out=tmp_path / "codes", device="cpu")
    real = DctCodec.decode

    def small(codec: DctCodec, latents: Tensor) -> Tensor:
        if len(latents) > 2:
            raise OOM[0]
        return real(codec, latents)

    decode(tmp_path / "codes", out=tmp_path / "whole", device="cpu")
    monkeypatch.setattr(DctCodec, "decode", small)
    decode(tmp_path / "codes", out=tmp_path / "halved", device="cpu")
    pictures = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png"))
    assert len(pictures) > 2
    assert all((tmp_path / "whole" / p).read_bytes() == (tmp_path / "halved" / p).read_bytes() for p in pictures)


@pytest.mark.parametrize(("side", "batch"), [(8, 32), (32, 32), (64, 8), (128, 2), (256, 1)])
def test_a_decoder_gets_so_many_cells_at_once(side: int, batch: int) -> None:
    class Decoder:
        def decode(self, latents: Tensor) -> Tensor:
            return latents.new_zeros(len(latents), 3, 1, 1)

    codes = np.zeros((batch + 1, 1, side, side), np.uint8)
    assert next(len(part) for _, part in decoded(Decoder(), codes, Quantizer(1, (0.0,), (1.0,)))) == batch


@pytest.mark.parametrize("message", OTHER_OOM)
def test_libraries_say_otherwise_that_memory_does_not_suffice(message: str) -> None:
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(ValueError(message))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Fitting(lambda _: (_ for _ in ()).throw(RuntimeError("shape mismatch")), "")(torch.zeros(4))


@pytest.mark.parametrize(
    ("device", "light", "size", "samples"),
    [("cuda", False, 256, 128), ("cuda", False, 512, 32), ("cuda", False, 2048, 2), ("cuda", True, 32, 512),
     ("cpu", False, 224, 32), ("cpu", False, 1024, 8), ("cpu", True, 224, 64)],
)  # fmt: skip
def test_batches_are_of_so_many_pixels(device: str, light: bool, size: int, samples: int) -> None:
    class Named:
        pass

    codec = Named()
    codec.device, codec.light, codec.encode = device, light, None  # type: ignore[attr-defined]
    assert Stages(None, codec, None, 1, 1).batch_samples(1, size, size) == samples  # type: ignore[arg-type]
    assert Stages(None, codec, 7, 1, 1).batch_samples(1, size, size) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize("newer", [False, True], ids=["older flags", "newer flags"])
def test_codes_are_decided_in_full_float32_whatever_the_users_flags(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends, seen = torch.backends, []

    def watch(real):
        def call(*arguments, **options):
            seen.append(tf32_allowed())
            return real(*arguments, **options)

        return call

    for name in ("conv2d", "conv_transpose2d", "pad"):
        monkeypatch.setattr(F, name, watch(getattr(F, name)))
    codec, quantizer = make_codec("dct", luma=2, chroma=0), Quantizer(2, (0.0, 0.0), (1.0, 1.0), (0.1,) * 36)
    if newer and not hasattr(backends.cudnn, "conv"):
        pytest.skip("torch before 2.9")
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        if newer:
            backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision = "tf32", "ieee"
            flags = lambda: (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)  # noqa: E731
        else:
            torch.set_float32_matmul_precision("medium")
            flags = lambda: (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32)  # noqa: E731
        users = flags()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents = codec.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
            codec.decode(latents)
            dequantize(quantize(latents, quantizer), quantizer)
            fit_filter(latents, quantizer)
            with full_float32(), full_float32():
                assert not tf32_allowed()
        assert flags() == users
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]
    assert len(seen) > 4
    assert not any(seen)


@pytest.mark.parametrize("joint", [False, True])
def test_codes_are_the_same_inside_a_users_autocast_and_trials(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, trials = torch.backends.cudnn, []
    codec, pictures = make_codec("dct", luma=2, chroma=0), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    quantizer = Quantizer(4, (-40.0, -20.0), (5.0, 2.5), (0.1,) * 36 if joint else ())
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *some, **more: trials.append(cudnn.benchmark) or real(*some, **more))

    def found() -> list[Tensor]:
        latents = codec.encode(pictures)
        codes = quantize(latents, quantizer)
        return [latents, codes, dequantize(codes, quantizer), codec.decode(latents)]

    plain = found()
    monkeypatch.setattr(cudnn, "benchmark", True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = found()
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, plain, inside))
    assert trials and not any(trials)
    assert cudnn.benchmark


def test_bfloat16_is_asked_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"cuda:0": (8, 0), "cuda:1": (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    assert has_fast_bfloat16(torch.device("cuda:0"))
    assert not has_fast_bfloat16(torch.device("cuda:1"))


def test_only_pinned_memory_is_copied_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, **options: copies.append((str(device), options)) or tensor)
    for name in ("mps", "cuda"):
        sent(torch.zeros(2), torch.device(name))
    assert copies == [("mps", {}), "pinned", ("cuda", {"non_blocking": True})]


def test_to_host_takes_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes back and forth: on the CPU in the guise of a device."""
    tensors = [torch.tensor(3, dtype=torch.int64), torch.rand(3, 5).bfloat16(), torch.tensor([True, False, True]),
               torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.empty(0)]  # fmt: skip
    with meta() as watched:
        away = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
        back = to_host([*away, tensors[0]])
    assert len(watched.waits) == 1
    assert [(t.shape, t.dtype, t.device.type) for t in back[:-1]] == [(t.shape, t.dtype, "cpu") for t in tensors]
    assert torch.equal(back[-1], tensors[0])
    assert torch.equal(back[0], torch.tensor(0x0101010101010101))  # whose bytes are ones


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    return str(tmp_path / "tiny")


def test_pixels_are_scaled_in_float32(tiny: str) -> None:
    greys = torch.arange(256).to(torch.uint8).expand(1, 3, 8, 256)
    exact = greys.float() / 127.5 - 1
    seen: list[Tensor] = []
    for options in ({}, {"revision": 1}):
        codec = make_codec("taesd", weights=tiny, dtype="bfloat16", **options)
        codec._model.encode = lambda pixels: seen.append(pixels) or (_ for _ in ()).throw(KeyError)  # type: ignore
        with pytest.raises(KeyError):
            codec.encode(greys)
    assert torch.equal(seen[0], exact.bfloat16())
    assert not torch.equal(seen[1], exact.bfloat16())  # as ever for older datasets


def test_autoencoders_run_in_full_float32_whatever_the_users_flags(tiny: str) -> None:
    codec, seen, before = make_codec("taesd", weights=tiny), [], torch.get_float32_matmul_precision()
    for name in ("encode", "decode"):
        real = getattr(codec._model, name)
        setattr(codec._model, name, lambda some, real=real: seen.append(tf32_allowed()) or real(some))
    torch.set_float32_matmul_precision("high")
    try:
        codec.decode(codec.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, False]


def test_what_scales_pixels_is_part_of_what_a_code_means(tiny: str, images: Path, tmp_path: Path) -> None:
    codec = make_codec("taesd", weights=tiny, dtype="bfloat16")
    assert codec.config()["revision"] == 2
    assert codec_from_config(codec.config()).config() == codec.config()
    older = {key: value for key, value in codec.config().items() if key != "revision"}
    assert codec_from_config(older).config() == older
    assert "revision" not in make_codec("taesd", weights=tiny, dtype="float32").config()  # where both are the same
    encode(images, codec=codec_from_config(older), size=64, out=tmp_path / "older")
    with pytest.raises(DatasetError, match=r"codec.revision is none, but 2 was requested; an earlier version"):
        encode(images, codec=codec, size=64, out=tmp_path / "older")
    source = encoder.open_source(images)
    assert latentprep.verify(tmp_path / "older", source=source, device="cpu").compared.differing == 0
