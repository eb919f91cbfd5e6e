"""What enters a patch embedding."""

from __future__ import annotations

from typing import Any


def patch_inputs(config: Any) -> int:
    """Inputs of the patch embedding, the fan-in of published initialisations; for text, the width in its place."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    config = next((part for part in parts if getattr(part, "patch_size", None) is not None), config)
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return int(config.hidden_size)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    channels = 1 if hasattr(config, "num_mel_bins") else getattr(config, "num_channels", 3)
    return int(channels * height * width)
