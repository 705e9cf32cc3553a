"""Host memory as a device's: uploads alias, copies convert, and a container's limit counts."""

import numpy as np
import torch

from baton_engine.exec.cpu import HostMemory, available_bytes


def test_available_memory_is_the_least_of_machine_and_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    assert available_bytes(meminfo=meminfo, cgroup=tmp_path) == 1000 * 1024
    (tmp_path / "memory.current").write_text("150000\n")
    (tmp_path / "memory.stat").write_text("anon 90000\nactive_file 10000\ninactive_file 50000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo=meminfo, cgroup=tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    assert available_bytes(meminfo=meminfo, cgroup=tmp_path) == 400000


def test_a_machine_without_these_files_still_has_memory(tmp_path):
    assert available_bytes(meminfo=tmp_path / "none", cgroup=tmp_path) > 1 << 20


def test_nothing_is_copied_that_need_not_be():
    memory, array = HostMemory(), np.arange(6).reshape(2, 3)
    tensor = memory.upload(array)
    assert tensor.tolist() == array.tolist()
    assert tensor.data_ptr() == array.ctypes.data
    assert memory.download(tensor) is tensor
    assert memory.available_bytes() > 1 << 20


def test_a_copy_converts_the_dtype():
    target = torch.zeros(2, 2)
    HostMemory().copy_in(target, torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16))
    assert target.tolist() == [[1.0, 2.0], [3.0, 4.0]]
