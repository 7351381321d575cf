"""Where samples come from: an index that needs no decoding, their bytes, and arrays decoded from the bytes.

May import `format`, `storage` and the ground.
"""

from latentprep.sources.source import Row, Sample, Source, fingerprint, open_own_source, open_source

__all__ = ["Row", "Sample", "Source", "fingerprint", "open_own_source", "open_source"]
