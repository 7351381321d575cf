"""From latents to codes and back, on tensors: scalar and joint quantizers.

May import `format`, `storage` and the ground (`errors`, `progress`, `device`, `text`).
"""
