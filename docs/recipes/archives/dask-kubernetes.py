"""Dask on Kubernetes (dask-kubernetes and its operator): a cluster, the batch, the end of it.

python dask-kubernetes.py /archive/scenes.csv /archive/out [options of batch]
"""

import subprocess
import sys

from dask_kubernetes.operator import KubeCluster, make_cluster_spec

spec = make_cluster_spec(
    name="sharpen",
    image="IMAGE",  # with uknowpan[dask], the same version as here
    n_workers=8,
    worker_command=["dask", "worker", "--nthreads", "1", "--memory-limit", "0"],
    resources={"requests": {"cpu": "4", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
)
pod = spec["spec"]["worker"]["spec"]
pod["volumes"] = [{"name": "archive", "persistentVolumeClaim": {"claimName": "archive"}}]
pod["containers"][0]["volumeMounts"] = [{"name": "archive", "mountPath": "/archive"}]

with KubeCluster(custom_cluster_spec=spec) as cluster:
    command = ["uknowpan", "batch", sys.argv[1], "-o", *sys.argv[2:], "-j", "4"]
    sys.exit(subprocess.call([*command, "--dask", cluster.scheduler_address]))
