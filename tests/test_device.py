import pytest
import torch

from device import peak_flops, resolve


@pytest.fixture
def machine(monkeypatch):
    """Pretend: machine(capability=(8, 0)) has a GPU of that kind, machine(mps=True) is an Apple laptop."""
    def pretend(capability=None, mps=False, triton=True, gpus=1, name='NVIDIA H200'):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus if capability else 0)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr('importlib.util.find_spec', lambda name: triton or None)
        monkeypatch.delenv('LOCAL_RANK', raising=False)
    return pretend


@pytest.mark.parametrize('kind, want', [
    (dict(), ('cpu', 'float32', False)),
    (dict(mps=True), ('mps', 'float32', False)),
    (dict(capability=(9, 0)), ('cuda:0', 'bfloat16', True)),
    (dict(capability=(8, 0), triton=False), ('cuda:0', 'bfloat16', False)), # Windows
    (dict(capability=(7, 5)), ('cuda:0', 'float16', True)), # T4: no bf16 units
    (dict(capability=(6, 1)), ('cuda:0', 'float16', False)), # too old for Triton
])
def test_auto_is_what_the_machine_can_do(machine, kind, want):
    machine(**kind)
    assert resolve('auto', 'auto', 'auto') == want


def test_every_process_takes_its_own_gpu(machine, monkeypatch):
    machine(capability=(9, 0), gpus=4)
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert resolve('auto', 'auto', 'auto')[0] == 'cuda:3' and resolve('cuda:1', 'auto', False)[0] == 'cuda:1'


@pytest.mark.parametrize('kind, asked, message', [
    (dict(), ('cuda', 'auto', 'auto'), "device='cuda': .*try --device=auto"),
    (dict(), ('mps', 'auto', 'auto'), 'no Apple GPU'),
    (dict(), ('gpu', 'auto', 'auto'), "device='gpu' is none of"),
    (dict(), ('cpu', 'fp8', 'auto'), "dtype='fp8' is none of"),
    (dict(), ('cpu', 'float16', 'auto'), 'float16.*needs a CUDA device'),
    (dict(), ('cpu', 'auto', 'yes'), "compile='yes' is none of"),
    (dict(), ('cpu', 'auto', False, 'int4'), "quantize='int4' is none of"),
    (dict(capability=(9, 0), gpus=1), ('auto', 'auto', False, 'int8'), 'is for CPUs; add --device=cpu'),
    (dict(capability=(9, 0), gpus=2), ('cuda:2', 'auto', 'auto'), 'this machine has 2 GPU'),
])
def test_what_the_machine_cannot_do_is_a_one_line_error(machine, kind, asked, message):
    machine(**kind)
    with pytest.raises(ValueError, match=message):
        resolve(*asked)


def test_peak_flops_is_known_or_none_never_invented(machine):
    machine(capability=(9, 0), name='NVIDIA H100 80GB HBM3')
    assert peak_flops('cuda:0', 'bfloat16') == 989e12 and peak_flops('cuda:0', 'float32') is None
    machine(capability=(9, 0), name='NVIDIA H100 PCIe')
    assert peak_flops('cuda:0', 'bfloat16') == 756e12
    machine(capability=(9, 0), name='Some GPU of 2030')
    assert peak_flops('cuda:0', 'bfloat16') is None and peak_flops('cpu', 'float32') is None
