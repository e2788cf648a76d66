import os

import pytest
import torch

from support import device
from support.device import cpu_threads, peak_flops, resolve, tune

ARCHS = 'sm_50', 'sm_75', 'sm_90a', 'compute_120'


@pytest.fixture
def machine(monkeypatch):
    """machine((8, 0)) pretends to have a GPU of that capability, machine(mps=True) to be a Mac."""

    def pretend(capability=None, name='NVIDIA H200', archs=ARCHS, **others):
        options = dict(mps=False, triton=True, missing='', gpus=1) | others
        for attribute, value in (
            ('torch.cuda.is_available', capability is not None),
            ('torch.cuda.device_count', options['gpus'] if capability else 0),
            ('torch.cuda.get_device_capability', capability),
            ('torch.cuda.get_device_name', name),
            ('torch.cuda.get_arch_list', list(archs)),
            ('torch.backends.mps.is_available', options['mps']),
            ('importlib.util.find_spec', options['triton'] or None),
            ('support.device.missing_for_triton', options['missing']),
        ):
            monkeypatch.setattr(attribute, lambda *args, value=value: value)
        monkeypatch.delenv('LOCAL_RANK', raising=False)

    return pretend


def test_a_cpu_has_no_number():
    assert resolve('cpu:0', 'float32', False)[0] == 'cpu'


A100, H100, T4, GTX_1080 = (8, 0), (9, 0), (7, 5), (6, 1)


@pytest.mark.parametrize(
    'kind, want',
    [
        (dict(), ('cpu', 'float32', False)),
        (dict(mps=True), ('mps', 'float32', False)),
        (dict(capability=H100), ('cuda:0', 'bfloat16', True)),
        (dict(capability=A100, triton=False), ('cuda:0', 'bfloat16', False)),  # Windows
        (dict(capability=A100, missing='gcc'), ('cuda:0', 'bfloat16', False)),  # a bare image
        (dict(capability=T4), ('cuda:0', 'float16', True)),  # no bf16 units
        (dict(capability=GTX_1080), ('cuda:0', 'float16', False)),  # too old for Triton
        (dict(capability=H100, archs=['gfx90a', 'gfx942']), ('cuda:0', 'bfloat16', True)),  # AMD
    ],
)
def test_auto_is_what_the_machine_can_do(machine, kind, want):
    machine(**kind)
    assert resolve('auto', 'auto', 'auto') == want


def test_every_process_takes_its_own_gpu(machine, monkeypatch):
    machine(H100, gpus=4)
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert resolve('auto', 'auto', 'auto')[0] == 'cuda:3'
    assert resolve('cuda:1', 'auto', False)[0] == 'cuda:1'


OLD = 'has compute capability 6.1, and this torch has code from 7.5 up; use --device=cpu'
TRITON = 'needs the package triton and compute capability 7.0'
AUTO = 'auto', 'auto'


@pytest.mark.parametrize(
    'kind, asked, message',
    [
        (dict(), ('cuda', *AUTO), "device='cuda': .*try --device=auto"),
        (dict(), ('mps', *AUTO), 'no Apple GPU'),
        (dict(), ('gpu', *AUTO), "device='gpu' is none of"),
        (dict(), ('cpu', 'fp8', 'auto'), "dtype='fp8' is none of"),
        (dict(), ('cpu', 'float16', 'auto'), 'float16.*needs a CUDA device'),
        (dict(), ('cpu', 'auto', 'yes'), "compile='yes' is none of"),
        (dict(), ('cpu', 'auto', False, 'int4'), "quantize='int4' is none of"),
        (dict(capability=H100), (*AUTO, False, 'int8'), 'is for CPUs; add --device=cpu'),
        (dict(capability=GTX_1080, archs=['sm_75', 'sm_90a']), ('auto', *AUTO), OLD),
        (dict(capability=GTX_1080), (*AUTO, True), TRITON),
        (dict(capability=A100, triton=False), (*AUTO, True), TRITON),
        (dict(capability=A100, missing='gcc'), (*AUTO, True), 'needs gcc, for Triton'),
        (dict(capability=H100, gpus=2), ('cuda:2', *AUTO), 'this machine has 2 GPU'),
    ],
)
def test_what_the_machine_cannot_do_is_a_one_line_error(machine, kind, asked, message):
    machine(**kind)
    with pytest.raises(ValueError, match=message):
        resolve(*asked)


@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A100 80GB PCIe', 312e12),
        ('Tesla V100-SXM2-16GB', 125e12),
        ('NVIDIA A1000', None),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
        ('NVIDIA GeForce RTX 4090 D', None),
        ('Some GPU of 2030', None),
    ],
)
def test_peak_flops_is_known_or_none_never_invented(machine, name, peak):
    machine(H100, name=name)
    assert peak_flops('cuda:0', 'bfloat16') == peak
    assert peak_flops('cuda:0', 'float32') is None and peak_flops('cpu', 'float32') is None


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
    assert device.missing_for_triton().startswith('a C compiler')
    monkeypatch.setattr('shutil.which', lambda name: '/usr/bin/cc')
    assert device.missing_for_triton().startswith("Python's headers")
    (tmp_path / 'Python.h').write_text('')
    assert device.missing_for_triton() == ''
