"""The layer-by-layer run, from a checkpoint and a recipe to a quantized checkpoint."""
