"""What people look at: decoded samples, metrics, contact sheets, linear decoding, rate and distortion, reports.

May import `audit`, `derived`, `encoding` and what these may import.
"""
