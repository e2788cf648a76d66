import os

import pytest
import torch

from support import device
from support.device import cpu_threads, peak_flops, resolve, tune


@pytest.fixture
def machine(monkeypatch):
    """Pretend: machine(capability=(8, 0)) has a GPU of that kind, machine(mps=True) is an Apple laptop."""

    def pretend(
        capability=None,
        mps=False,
        triton=True,
        lacking='',
        gpus=1,
        name='NVIDIA H200',
        archs=('sm_50', 'sm_75', 'sm_90a', 'compute_120'),
    ):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus if capability else 0)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: list(archs))
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr('importlib.util.find_spec', lambda name: triton or None)
        monkeypatch.setattr('support.device.lacking', lambda: lacking)
        monkeypatch.delenv('LOCAL_RANK', raising=False)

    return pretend


def test_a_cpu_has_no_number():
    assert resolve('cpu:0', 'float32', False)[0] == 'cpu'


@pytest.mark.parametrize(
    'kind, want',
    [
        (dict(), ('cpu', 'float32', False)),
        (dict(mps=True), ('mps', 'float32', False)),
        (dict(capability=(9, 0)), ('cuda:0', 'bfloat16', True)),
        (dict(capability=(8, 0), triton=False), ('cuda:0', 'bfloat16', False)),  # Windows
        (
            dict(capability=(8, 0), lacking='a C compiler'),
            ('cuda:0', 'bfloat16', False),
        ),  # a bare image
        (dict(capability=(7, 5)), ('cuda:0', 'float16', True)),  # T4: no bf16 units
        (dict(capability=(6, 1)), ('cuda:0', 'float16', False)),  # too old for Triton
        (
            dict(capability=(9, 0), archs=['gfx90a', 'gfx942']),
            ('cuda:0', 'bfloat16', True),
        ),  # AMD's
    ],
)
def test_auto_is_what_the_machine_can_do(machine, kind, want):
    machine(**kind)
    assert resolve('auto', 'auto', 'auto') == want


def test_every_process_takes_its_own_gpu(machine, monkeypatch):
    machine(capability=(9, 0), gpus=4)
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert (
        resolve('auto', 'auto', 'auto')[0] == 'cuda:3'
        and resolve('cuda:1', 'auto', False)[0] == 'cuda:1'
    )


@pytest.mark.parametrize(
    'kind, asked, message',
    [
        (dict(), ('cuda', 'auto', 'auto'), "device='cuda': .*try --device=auto"),
        (dict(), ('mps', 'auto', 'auto'), 'no Apple GPU'),
        (dict(), ('gpu', 'auto', 'auto'), "device='gpu' is none of"),
        (dict(), ('cpu', 'fp8', 'auto'), "dtype='fp8' is none of"),
        (dict(), ('cpu', 'float16', 'auto'), 'float16.*needs a CUDA device'),
        (dict(), ('cpu', 'auto', 'yes'), "compile='yes' is none of"),
        (dict(), ('cpu', 'auto', False, 'int4'), "quantize='int4' is none of"),
        (
            dict(capability=(9, 0), gpus=1),
            ('auto', 'auto', False, 'int8'),
            'is for CPUs; add --device=cpu',
        ),
        (
            dict(capability=(6, 1), archs=['sm_75', 'sm_90a']),
            ('auto', 'auto', 'auto'),
            'has compute capability 6.1, and this torch has code from 7.5 up; use --device=cpu',
        ),
        (
            dict(capability=(6, 1)),
            ('auto', 'auto', True),
            'needs the package triton and compute capability 7.0',
        ),
        (dict(capability=(8, 0), triton=False), ('auto', 'auto', True), 'needs the package triton'),
        (
            dict(capability=(8, 0), lacking='a C compiler'),
            ('auto', 'auto', True),
            'needs a C compiler, for Triton',
        ),
        (dict(capability=(9, 0), gpus=2), ('cuda:2', 'auto', 'auto'), 'this machine has 2 GPU'),
    ],
)
def test_what_the_machine_cannot_do_is_a_one_line_error(machine, kind, asked, message):
    machine(**kind)
    with pytest.raises(ValueError, match=message):
        resolve(*asked)


def test_peak_flops_is_known_or_none_never_invented(machine):
    machine(capability=(9, 0), name='NVIDIA H100 80GB HBM3')
    assert peak_flops('cuda:0', 'bfloat16') == 989e12 and peak_flops('cuda:0', 'float32') is None
    machine(capability=(9, 0), name='NVIDIA H100 PCIe')
    assert peak_flops('cuda:0', 'bfloat16') == 756e12
    for name, peak in (
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A100 80GB PCIe', 312e12),
        ('Tesla V100-SXM2-16GB', 125e12),
        ('NVIDIA A1000', None),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
        ('NVIDIA GeForce RTX 4090 D', None),
    ):
        machine(capability=(9, 0), name=name)
        assert peak_flops('cuda:0', 'bfloat16') == peak, name
    machine(capability=(9, 0), name='Some GPU of 2030')
    assert peak_flops('cuda:0', 'bfloat16') is None and peak_flops('cpu', 'float32') is None


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='for Linux')
@pytest.mark.parametrize(
    'processes, quota, want',
    [
        (1, None, 6),
        (1, 'max 100000', 6),
        (1, '250000 100000', 2),
        (1, '50000 100000', 1),
        (2, None, 2),
        (8, None, 1),
        (2, '200000 100000', 1),
    ],
)
def test_threads_are_the_cores_that_a_process_may_use(
    tmp_path, monkeypatch, processes, quota, want
):
    for cpu in range(8):  # four cores of two threads
        folder = tmp_path / f'devices/system/cpu/cpu{cpu}/topology'
        folder.mkdir(parents=True)
        (folder / 'thread_siblings_list').write_text(f'{cpu % 4},{cpu % 4 + 4}\n')
    if quota:
        (tmp_path / 'fs/cgroup').mkdir(parents=True)
        (tmp_path / 'fs/cgroup/cpu.max').write_text(quota + '\n')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 6 if processes == 1 else 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert cpu_threads(str(tmp_path)) == want


def test_float32_is_exact_on_a_cpu():
    tune('cpu')
    assert torch.get_float32_matmul_precision() == 'highest'


def test_what_triton_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr('sysconfig.get_path', lambda name: str(tmp_path))
    monkeypatch.setattr('shutil.which', lambda name: None)
    assert device.lacking().startswith('a C compiler')
    monkeypatch.setattr('shutil.which', lambda name: '/usr/bin/cc')
    assert device.lacking().startswith("Python's headers")
    (tmp_path / 'Python.h').write_text('')
    assert device.lacking() == ''
