"""Encode an image dataset once with a lossy codec and keep its low-bit codes.

`__all__` is what the command line runs, and `webdataset` for loops of your own; all of it is imported on first use, so
that importing this package stays cheap. `latentprep.torch` has more for such loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "convert",
    "decode",
    "encode",
    "fit_linear_decoder",
    "info",
    "linear_preview",
    "list_codecs",
    "merge",
    "open",
    "open_source",
    "preview",
    "push",
    "rd",
    "report",
    "requantize",
    "subset",
    "train_codec",
    "verify",
    "webdataset",
    "write_latents",
]

if TYPE_CHECKING:
    from latentprep.audit.hub import push
    from latentprep.audit.info import info
    from latentprep.audit.latents import write_latents
    from latentprep.audit.verify import verify
    from latentprep.codecs.listing import list_codecs
    from latentprep.derived.derive import convert
    from latentprep.derived.requantize import requantize
    from latentprep.derived.selection import merge, subset
    from latentprep.encoding.encode import encode
    from latentprep.format import open_dataset as open
    from latentprep.learning.train import train_codec
    from latentprep.pictures.decode import decode
    from latentprep.pictures.linear_decoder import fit_linear_decoder
    from latentprep.pictures.preview import linear_preview, preview
    from latentprep.pictures.rd import rd
    from latentprep.pictures.report import report
    from latentprep.sources.source import open_source
    from latentprep.torch import webdataset

_HOMES = {
    "convert": ".derived.derive",
    "decode": ".pictures.decode",
    "encode": ".encoding.encode",
    "fit_linear_decoder": ".pictures.linear_decoder",
    "info": ".audit.info",
    "linear_preview": ".pictures.preview",
    "list_codecs": ".codecs.listing",
    "merge": ".derived.selection",
    "open_source": ".sources.source",
    "preview": ".pictures.preview",
    "push": ".audit.hub",
    "rd": ".pictures.rd",
    "report": ".pictures.report",
    "requantize": ".derived.requantize",
    "subset": ".derived.selection",
    "train_codec": ".learning.train",
    "verify": ".audit.verify",
    "webdataset": ".torch",
    "write_latents": ".audit.latents",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "open":
        return import_module(".format", __name__).open_dataset
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module 'latentprep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
