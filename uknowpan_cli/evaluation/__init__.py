"""Scores of results and models."""
