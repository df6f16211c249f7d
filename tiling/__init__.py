"""Rasters to arrays and back."""
