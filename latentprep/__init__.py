"""Encode an image dataset once with a lossy codec and keep its low-bit codes.

`encode`, `open`, `requantize`, `verify` and `write_latents` are what the command line runs; they are imported on first
use, so that importing this package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["encode", "open", "requantize", "verify", "write_latents"]

if TYPE_CHECKING:
    from .encoder import encode
    from .format import open_dataset as open
    from .latents import write_latents
    from .requantizer import requantize
    from .verifier import verify


def __getattr__(name: str) -> Any:
    if name == "encode":
        from .encoder import encode

        return encode
    if name == "open":
        from .format import open_dataset

        return open_dataset
    if name == "requantize":
        from .requantizer import requantize

        return requantize
    if name == "verify":
        from .verifier import verify

        return verify
    if name == "write_latents":
        from .latents import write_latents

        return write_latents
    raise AttributeError(f"module 'latentprep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
