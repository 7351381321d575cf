"""The on-disk format: the contract between latentprep and latenttrain. Imports numpy, zarr and nothing heavier."""

from .dataset import Codes, LatentDataset, open_dataset
from .dataset import open_dataset as open
from .manifest import INVALID_LABEL, FileRecord, Manifest, ShardRecord
from .quantizer import Quantizer

__all__ = [
    "INVALID_LABEL",
    "Codes",
    "FileRecord",
    "LatentDataset",
    "Manifest",
    "Quantizer",
    "ShardRecord",
    "open",
    "open_dataset",
]
