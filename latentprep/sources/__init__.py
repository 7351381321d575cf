"""Where samples come from: an index that is known without decoding, their bytes, and arrays made of the bytes.

May import `format`, `storage` and the ground.
"""

from latentprep.sources.source import Row, Sample, Source, fingerprint, open_own_source, open_source

__all__ = ["Row", "Sample", "Source", "fingerprint", "open_own_source", "open_source"]
