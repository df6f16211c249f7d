"""PanCollection's HDF5 files: reading, writing, batches and the protocol behind them."""
