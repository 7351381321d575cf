"""Where bytes are stored: a folder, a bucket, a web server, the hub. Atomic writes, one writer at a time, a cache.

May import only the ground.
"""
