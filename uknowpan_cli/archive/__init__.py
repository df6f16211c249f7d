"""Many scenes: manifests, shards, reports, Dask."""
