# Never built: no machine of ours has a Docker daemon. The image that the recipes for AWS and Kubernetes call IMAGE.
#   docker build -t IMAGE .                             CPU
#   docker build -t IMAGE --build-arg TORCH=cu128 .     GPU; TORCH is a folder of PyTorch's package index
FROM python:3.11-slim
# GDAL in rasterio's wheel needs this library of the system.
RUN apt-get update && apt-get install -y --no-install-recommends libexpat1 && rm -rf /var/lib/apt/lists/*
ARG TORCH=cpu
RUN pip install --no-cache-dir "torch>=2.6" --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE /source/
COPY uknowpan_cli /source/uknowpan_cli
COPY models /source/models
COPY tiling /source/tiling
RUN pip install --no-cache-dir "/source[dask]" && rm -r /source
CMD ["uknowpan", "--help"]
