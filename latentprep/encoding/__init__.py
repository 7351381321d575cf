"""The main job: a plan, the engine that makes its shards, the driver that commits them, resuming, and the profile.

May import `quantizing`, `codecs`, `sources` and what these may import.
"""
