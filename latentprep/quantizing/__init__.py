"""Latents to codes and back, on tensors: scalar and joint.

May import `format`, `storage` and the ground (`errors`, `progress`, `device`, `fitting`, `text`).
"""
