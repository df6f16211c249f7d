"""PAN-Crafter (ICCV 2025)."""
