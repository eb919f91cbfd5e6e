"""One file (or small folder) per method: its config, its equation, its layer, its model."""
