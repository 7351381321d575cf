"""Where bytes lie: a folder, a bucket, a web server, the hub. Whole files or none, one writer at a time, a cache.

May import the ground alone.
"""
