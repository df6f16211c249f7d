"""Indices of pansharpening quality, exactly as the DLPan-Toolbox computes them."""
