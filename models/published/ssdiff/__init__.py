"""SSDiff (NeurIPS 2024)."""
