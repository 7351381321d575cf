"""The on-disk format: the contract between latentprep and latenttrain. Imports nothing heavier than numpy and zarr."""

from latentprep.format.dataset import LatentDataset, open_dataset
from latentprep.format.dataset import open_dataset as open
from latentprep.format.manifest import INVALID_LABEL, FileRecord, Manifest, Plan, ShardId, ShardRecord
from latentprep.format.quantizer import Quantizer
from latentprep.format.shard import Codes, EncodedShard

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
