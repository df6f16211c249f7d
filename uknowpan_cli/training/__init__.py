"""From options and TOML files to a training run."""
