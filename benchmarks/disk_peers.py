"""Bytes on disk a sample at equal quality: ours, vaezip, and the same codes in the formats of data loaders.

Our fitted quantizer and the store's compression against vaezip's codecs on the same latents, both ways: our codes at
2, 3, 4 and 8 bits against the smallest of all vaezip settings that is no worse in signal-to-noise ratio, and vaezip's
shortcuts at those bits against the smallest of ours, at 1 to 8 bits, that is no worse. Losslessly, our codes packed or
compressed in each loader's format.

Latents: `--latents FILE.npy`, f16 or f32 [n,C,h,w] as `latentprep latents` writes them, else what the block DCT makes
of the built-in shapes. Smaller ones are also made 32 x 32, in two ways, neither quite the real thing: mirrored
outwards, which repeats rows and so suits a compressor such as ours, and quilted, quarters of four images each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import loader_peers
from common import record
from loader_peers import Skipped, call, environment
from peers import PEERS, write_numpy

BITS = (2, 3, 4, 8)
RANGE_BITS = (2, 3, 4)  # for the ranges of vaezip's blocks; its shortcuts have 4
SIDE = 32
FORMATS = ("webdataset", "litdata_bytes", "mosaicml-streaming", "npy_files", "memmap_rows")  # whose `write` is meant


def shapes_latents() -> np.ndarray:
    """f32 [n,3,16,16]: the block DCT of the built-in pictures."""
    from latentprep.codecs import make_codec
    from latentprep.sources.images import load_views
    from latentprep.sources.source import open_source

    source, codec = open_source("shapes").take(1000), make_codec("dct")
    views = (load_views(source.read("train", row).data, 128) for row in range(source.size("train")))
    pixels = torch.from_numpy(np.concatenate(list(views))).permute(0, 3, 1, 2)
    return torch.cat([codec.encode(part) for part in pixels.split(64)]).numpy()


def mirrored(latents: np.ndarray, side: int = SIDE) -> np.ndarray:
    """[n,C,h,w] -> [n,C,side,side], mirrored outwards on all sides."""
    pad = [((side - n) // 2, (side - n + 1) // 2) for n in latents.shape[2:]]
    return np.pad(latents, [(0, 0), (0, 0), *pad], mode="reflect")


def quilted(latents: np.ndarray, side: int = SIDE) -> np.ndarray:
    """[n,C,h,w] -> [n,C,side,side], each of the corners of four images far apart: no value twice in one."""
    count, half = len(latents), side // 2
    top, bottom = (
        np.concatenate([np.roll(latents, i * count // 4, axis=0)[:, :, y, x] for i, x in parts], axis=3)
        for y, parts in (
            (slice(half), ((0, slice(half)), (1, slice(-half, None)))),
            (slice(-half, None), ((2, slice(half)), (3, slice(-half, None)))),
        )
    )
    return np.concatenate([top, bottom], axis=2)


def snr(latents: Tensor, restored: Tensor) -> float:
    """dB, over all values, each channel less its mean: an offset is no signal."""
    signal = (latents - latents.mean((0, 2, 3), keepdim=True)).square().mean(dtype=torch.float64)
    return 10 * math.log10(float(signal / (latents - restored).square().mean(dtype=torch.float64)))


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(latents: Tensor, bits: int, joint: bool) -> tuple[dict, np.ndarray]:
    """Bytes a sample and quality of what an encode would write, its quantizer fitted on as few images; the codes."""
    from latentprep.encoding.calibration import CALIBRATION
    from latentprep.encoding.encode import SHARD_ROWS
    from latentprep.format import Manifest
    from latentprep.format.zarr_store import choose_compression, chunk_rows, encode_shard_files, shard_files
    from latentprep.quantizing.scalar import dequantize, fit_quantizer, quantize

    rows, few = len(latents), np.arange(CALIBRATION) * len(latents) // CALIBRATION
    quantizer = fit_quantizer(latents[few], bits, joint)
    codes = torch.cat([quantize(some, quantizer) for some in latents.split(64)])
    stored = codes.numpy()[:, None]
    manifest = Manifest(
        codec={"name": "any"}, quantizer=quantizer, transform={"size": 224, "views": 1}, source={}, classes=("a", "b"),
        latent=tuple(latents.shape[1:]), flip=None, shard_rows=SHARD_ROWS,
        chunk_rows=chunk_rows(SHARD_ROWS, latents[0].numel()), compression=choose_compression(stored[few]),
        splits={"train": rows},
    )  # fmt: skip
    sizes = {"codes": 0, "labels": 0, "keys": 0}
    for index in range(manifest.shard_count("train")):
        start = index * SHARD_ROWS
        part = stored[start : start + SHARD_ROWS]
        labels = (np.arange(start, start + len(part)) * 10 // rows).astype(np.int32)
        keys = [f"train/n0{label:07}/n0{label:07}_{row:05}.JPEG" for row, label in enumerate(labels, start)]
        files = encode_shard_files(manifest, "train", index, part, labels, keys)
        for name, path in shard_files(manifest, "train", index).items():
            sizes[name] += len(files[path])
    size = sizes["codes"] / rows
    return {
        "bits": bits,
        "joint": joint,
        "bytes_a_sample": size,
        "bits_a_value": size * 8 / latents[0].numel(),
        "snr_db": snr(latents, dequantize(codes, quantizer)),
        "labels_and_keys_bytes_a_sample": (sizes["labels"] + sizes["keys"]) / rows,
        "compression": [step["name"] for step in manifest.compression],
    }, codes.numpy()


# --- vaezip ----------------------------------------------------------------------------------------------------------


def vaezip_codecs(side: int) -> Iterator[tuple[str, str, dict]]:
    """Label, class and settings: its shortcuts, and other bits, blocks and bits for the ranges of blocks."""
    blocks = sorted({8, *(block for block in (4, 7, 14, 16, side) if side % block == 0)})
    for bits in range(1, 9):
        yield f"rq_{bits}bit", "RangeQuantCodec", {"bits": bits}
        for kind, block, ranges in itertools.product(("brq", "lbrq"), blocks, RANGE_BITS):
            name = "BlockRangeQuantCodec" if kind == "brq" else "LloydBlockRangeQuantCodec"
            settings = {"value_bits": bits, "range_bits": ranges, "block_size": [block, block]}
            shipped = block == 8 and ranges == 4
            yield f"{kind}_{bits}bit" + ("" if shipped else f" {block}x{block}, range {ranges}"), name, settings


def vaezip(arrays: str) -> list[dict]:
    """Bytes a sample, all in one file, and quality of each codec. Runs in its own environment."""
    import vaezip

    latents = torch.from_numpy(np.load(arrays)).float()
    rows = []
    for label, name, settings in vaezip_codecs(latents.shape[-1]):
        codec = getattr(vaezip.codecs, name)(**settings)
        size, restored = 0, []
        for part in latents.split(1024):  # one header a thousand samples: next to nothing
            data = vaezip.save({"latents": vaezip.encode(part, codec)})
            size += len(data)
            restored.append(vaezip.load(data)["latents"].decode())
        bits = settings.get("bits", settings.get("value_bits"))
        rows.append(
            {
                "codec": label,
                "bits": bits,
                "bytes_a_sample": size / len(latents),
                "bits_a_value": size * 8 / latents.numel(),
                "snr_db": snr(latents, torch.cat(restored)),
            }
        )
    return rows


def smallest(rows: list[dict], snr_db: float) -> dict | None:
    """The row of the fewest bytes whose quality is not below that."""
    return min((row for row in rows if row["snr_db"] >= snr_db), key=lambda row: row["bytes_a_sample"], default=None)


def compared(mine: list[dict], theirs: list[dict]) -> list[dict]:
    """Each of mine with the smallest of theirs that is no worse, and the ratio of bytes; None where all are worse."""
    found = []
    for row in mine:
        other = smallest(theirs, row["snr_db"])
        ratio = other and row["bytes_a_sample"] / other["bytes_a_sample"]
        found.append({"this": row, "smallest_no_worse": other, "this_over_it": ratio})
    return found


# --- the same codes in loaders' formats -------------------------------------------------------------------------------


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8 [n,...] -> u8 [n, bytes]: the codes' low bits side by side."""
    planes = np.unpackbits(codes.reshape(len(codes), -1, 1), axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little")


def in_formats(codes: dict[int, np.ndarray], cache: Path, work: Path) -> dict:
    """By format and bits: bytes a sample of packed codes, and of codes a byte each under the format's own compression.
    Labels included."""
    jobs = {}
    for bits, values in codes.items():
        for kind, array in (("packed", packed(values, bits)), ("compressed", values)):
            arrays = work / f"{bits}-{kind}"
            arrays.mkdir()
            write_numpy(array, np.arange(len(array)) * 10 // len(array), arrays, False)
            jobs[bits, kind] = arrays
    found: dict[str, Any] = {}
    for name in FORMATS:
        kinds = ("packed",) if PEERS[name].packages == () else ("packed", "compressed")
        wanted = [key for key in jobs if key[1] in kinds]
        request = [
            {"arrays": str(jobs[key]), "folder": f"{jobs[key]}-{name}", "compress": key[1] == "compressed"}
            for key in wanted
        ]
        try:
            python = environment(PEERS[name].packages, cache)
            sizes = call(python, loader_peers.__file__, {"do": "write", "peer": name, "jobs": request})
            found[name] = [{"bits": key[0], "how": key[1], **size} for key, size in zip(wanted, sizes, strict=True)]
        except Skipped as reason:
            found[name] = {"skipped": str(reason)}
    return found


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(latents: np.ndarray, cache: Path, work: Path, formats: bool) -> dict:
    """One set of latents through everything."""
    values = torch.from_numpy(latents.astype(np.float32))
    made = {(bits, joint): ours(values, bits, joint) for joint in (False, True) for bits in range(1, 9)}
    own = [row for row, _ in made.values()]
    result: dict[str, Any] = {"samples": len(latents), "latent": list(latents.shape[1:]), "ours": own}
    np.save(work / "latents.npy", latents)
    try:
        python = environment(("vaezip",), cache)
        rows = call(python, __file__, {"arrays": str(work / "latents.npy")})
        shortcuts = [row for row in rows if " " not in row["codec"] and row["bits"] in BITS]
        result["ours_against_vaezip"] = compared([row for row in own if row["bits"] in BITS], rows)
        result["vaezip_shortcuts_against_ours"] = compared(shortcuts, own)
        result["vaezip"] = rows
    except Skipped as reason:
        result["vaezip"] = {"skipped": str(reason)}
    if formats:
        result["formats"] = in_formats({bits: made[bits, False][1] for bits in BITS}, cache, work)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, help="f16 or f32 [n,C,h,w]")
    parser.add_argument("--limit", type=int, default=2048, help="samples")
    parser.add_argument("--formats", action=argparse.BooleanOptionalAction, default=True, help="the loaders' too")
    parser.add_argument("--cache", type=Path, help="keep environments here (default: nowhere)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(vaezip(**json.loads(options.child))))
        return
    given = np.load(options.latents, mmap_mode="r") if options.latents else shapes_latents()
    latents = np.asarray(given[: options.limit])
    sets = {"as given": latents}
    height, width = latents.shape[2:]
    if max(height, width) < SIDE:
        if 2 * min(height, width) - 1 >= SIDE:
            sets[f"mirrored outwards to {SIDE}"] = mirrored(latents)
        if 2 * min(height, width) >= SIDE:
            sets[f"quilted to {SIDE}"] = quilted(latents)
    with tempfile.TemporaryDirectory() as temporary:
        cache = (options.cache or Path(temporary)).absolute()
        results = {}
        for number, (name, values) in enumerate(sets.items()):
            work = Path(temporary) / f"set{number}"
            work.mkdir()
            results[name] = measure(values, cache, work, options.formats)
    kind = f"{options.latents.stem} latents" if options.latents else "shapes, dct"
    record("disk_peers", {"latents": kind, "sets": results})


if __name__ == "__main__":
    main()
