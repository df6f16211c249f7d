"""Tensors and learning: networks, diffusion, training, metrics. No rasters here."""
