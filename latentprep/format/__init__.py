"""The on-disk format: the contract between latentprep and latenttrain. Imports numpy, zarr and nothing heavier."""

from .dataset import LatentDataset, open_dataset
from .dataset import open_dataset as open
from .manifest import INVALID_LABEL, FileRecord, Manifest, Plan, ShardId, ShardRecord
from .quantizer import Quantizer
from .shard import Codes, EncodedShard

__all__ = [
    "INVALID_LABEL",
    "Codes",
    "EncodedShard",
    "FileRecord",
    "LatentDataset",
    "Manifest",
    "Plan",
    "Quantizer",
    "ShardId",
    "ShardRecord",
    "open",
    "open_dataset",
]
