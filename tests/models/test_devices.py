"""Threads of this process."""

import os
import sys

import pytest
import torch

from uknowpan.models import devices
from uknowpan.models.devices import may_have_gpu, tune_cpu


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
    torch.set_flush_denormal(False)


def test_one_thread_for_each_core_of_this_process():
    assert tune_cpu() == len(os.sched_getaffinity(0)) == torch.get_num_threads()
    assert tune_cpu(1) == 1 == torch.get_num_threads()


def test_the_environment_sets_the_threads(monkeypatch):
    """Two processes of two threads each spin on two cores; OMP_NUM_THREADS=1 prevents that."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tune_cpu() == 1 == torch.get_num_threads()
    assert tune_cpu(2) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert tune_cpu() == len(os.sched_getaffinity(0))


def test_systems_that_do_not_say_which_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert tune_cpu() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert tune_cpu() == 1


def test_pytorch_is_asked_for_a_gpu_only_where_a_driver_has_devices(monkeypatch):
    """Its import takes seconds."""
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    for platform, devices_of_driver, visible, expected in (
        ("linux", "nul?", "0", True),
        ("linux", "nul?", "", False),
        ("linux", "none?", "0", False),
        ("win32", "none?", "0", True),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(devices, "_DRIVEN", (devices_of_driver,))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert may_have_gpu() == expected
    assert "torch" not in sys.modules
