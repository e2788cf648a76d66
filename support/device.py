"""
What this machine can do: which device, number format and compiler a script uses when its knobs say 'auto', and functions
that are recorded as CUDA graphs.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from contextlib import nullcontext

import torch

from support.cpu import fast_bfloat16

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Peak dense FLOP/s of the matrix units in bf16/fp16, from the makers' data sheets (without sparsity).
# Matched against the start of the name that CUDA reports; a GPU that is not here gets no MFU.
PEAK_FLOPS = {
    'NVIDIA H200 NVL': 835e12,
    'NVIDIA H200': 989e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835e12,
    'NVIDIA H100': 989e12,
    'NVIDIA A100': 312e12,
    'NVIDIA L40S': 362e12,
    'NVIDIA L4': 121e12,
    'NVIDIA A10G': 70e12,
    'NVIDIA GeForce RTX 4090': 165e12,
    'NVIDIA GeForce RTX 3090': 71e12,
    'Tesla V100-PCIE': 112e12,
    'Tesla V100': 125e12,
    'Tesla T4': 65e12,
}


def resolve(device, dtype, compile, quantize=''):
    """
    The knobs device, dtype, compile with every 'auto' replaced by what suits this machine.

    device: 'cuda' (this process's GPU under torchrun), 'mps' or 'cpu', or as given
    dtype: bfloat16 on GPUs that have it in hardware (compute capability 8.0 up), float16 on older
        ones, float32 on CPU and MPS; 'fast' is the same, but bfloat16 on CPUs that have it too
    compile: on GPUs that Triton supports (capability 7.0 up)
    quantize: 'int8' takes bfloat16 for the rest, and is for CPUs
    Raises ValueError for a device that is not there, an unknown dtype, a compile that is neither.
    """
    if device == 'auto':
        device = (
            'cuda'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    kind, _, number = device.partition(':')
    if kind not in ('cuda', 'mps', 'cpu') or (number and not number.isdigit()):
        raise ValueError(f"device={device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    if kind == 'cuda' and not torch.cuda.is_available():
        why = (
            'this torch has no CUDA support'
            if torch.version.cuda is None
            else 'torch finds no usable GPU'
        )
        raise ValueError(f"device={device!r}: {why}; try --device=auto or --device=cpu")
    if kind == 'cuda':
        if number and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1:
            raise ValueError(
                f'device=cuda:{number} would be the GPU of every process; torchrun gives each its own with --device=cuda'
            )
        number = number or os.environ.get('LOCAL_RANK', '0')
        if int(number) >= torch.cuda.device_count():
            raise ValueError(
                f'device cuda:{number}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0'
            )
        device = f'cuda:{number}'
    if kind == 'cpu':
        device = 'cpu'  # there is one, whatever its number
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise ValueError("device='mps': no Apple GPU here; try --device=auto or --device=cpu")
    if quantize not in ('', 'int8'):
        raise ValueError(f"quantize={quantize!r} is none of '', 'int8'")
    if quantize and kind != 'cpu':
        raise ValueError(f'quantize={quantize!r} is for CPUs; add --device=cpu')
    if quantize and dtype not in ('auto', 'fast', 'bfloat16'):
        raise ValueError(
            f'quantize={quantize!r} computes the rest in bfloat16; leave --dtype={dtype} out'
        )
    dtype = 'bfloat16' if quantize else dtype
    triton = importlib.util.find_spec('triton') is not None
    capability = torch.cuda.get_device_capability(device) if kind == 'cuda' else (0, 0)
    oldest = (
        min(
            [
                int(arch[3:].rstrip('af'))
                for arch in torch.cuda.get_arch_list()
                if arch.startswith('sm_')
            ],
            default=0,
        )
        if kind == 'cuda'
        else 0
    )
    if capability[0] * 10 + capability[1] < oldest:
        raise ValueError(
            f'{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and this torch has code from '
            f'{oldest // 10}.{oldest % 10} up; use --device=cpu, or a build of torch for older GPUs (pytorch.org)'
        )
    if dtype in ('auto', 'fast'):
        has_it = fast_bfloat16(device) and (kind == 'cuda' or dtype == 'fast')
        dtype = 'bfloat16' if has_it else 'float16' if kind == 'cuda' else 'float32'
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is none of 'auto', 'fast', 'float32', 'bfloat16', 'float16'"
        )
    if dtype == 'float16' and kind != 'cuda':
        raise ValueError(
            f"dtype='float16' needs a CUDA device (its gradients are scaled); on {kind} use float32 or bfloat16"
        )
    if compile == 'auto':
        compile = capability >= (7, 0) and triton and (os.name != 'posix' or not lacking())
    if not isinstance(compile, bool):
        raise ValueError(f"compile={compile!r} is none of 'auto', True, False")
    if compile and kind == 'cpu' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        raise ValueError(
            'compile=True on CPU needs a C++ compiler (g++, clang++ or MSVC); use --compile=False'
        )
    if compile and kind == 'cuda' and not (capability >= (7, 0) and triton):
        raise ValueError(
            'compile=True on a GPU needs the package triton and compute capability 7.0; use --compile=False'
        )
    if compile and kind == 'cuda' and os.name == 'posix' and lacking():
        raise ValueError(
            f'compile=True on a GPU needs {lacking()}, for Triton; install it, or use --compile=False'
        )
    return device, dtype, compile


def lacking():
    """What Triton needs to build its first module and this machine has not, '' for nothing: a C compiler, Python's headers."""
    if not (os.environ.get('CC') or any(map(shutil.which, ('gcc', 'clang', 'cc')))):
        return 'a C compiler (gcc or clang)'
    return (
        ''
        if os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))
        else "Python's headers (python3-dev)"
    )


def pays_to_compile(flops):
    """
    Does a run of `flops` floating-point operations earn back torch.compile's wait of about half a minute?

    Without the compiler a large GPU reaches about 1e14 FLOP/s, and with it a third of the time goes: on an H100 the step of
    10.65M parameters takes 5.7 ms instead of 8.6. On a smaller GPU both the wait and the saving are longer.
    """
    return flops / 1e14 / 3 > 30


def cpu_threads(root='/sys'):
    """
    How many threads suit this process on Linux: torch's own choice, the physical cores. But torchrun sets OMP_NUM_THREADS=1,
    which leaves cores idle (and looks like a 1 of the user's own), so there they are dealt out; and a container may be allowed
    less processor time than it sees cores.
    """

    def read(path):
        try:
            with open(os.path.join(root, path), encoding='ascii') as f:
                return f.read().split()
        except (OSError, ValueError):
            return []

    threads, processes = torch.get_num_threads(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if processes > 1 and os.environ.get('OMP_NUM_THREADS') == '1':
        cores = {
            tuple(read(f'devices/system/cpu/cpu{i}/topology/thread_siblings_list'))
            for i in os.sched_getaffinity(0)
        }
        threads = max(1, len(cores) // processes)
    quota = read('fs/cgroup/cpu.max')  # microseconds of so many
    if len(quota) == 2 and quota[0] != 'max':
        threads = min(threads, max(1, int(quota[0]) // int(quota[1]) // processes))
    return threads


def tune(device, lengths_vary=False):
    """
    Settings of torch and the C library that cost nothing and help: TF32 on GPUs; on CPUs threads, and no page faults.
    lengths_vary: are sequences of many lengths to come, as in sampling?
    """
    if 'cuda' in device:
        torch.set_float32_matmul_precision(
            'high'
        )  # TF32; CPUs with AMX-FP16 would take it too, and are to be exact
        if (
            lengths_vary
        ):  # on an H100 cuDNN would plan attention anew for each, for tens of milliseconds
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_device(device)  # what asks for the current GPU means this one
    if 'cpu' in device and sys.platform == 'linux':
        threads = cpu_threads()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        # glibc gives every tensor over 32 MB pages of its own, and each page faults when first touched: a
        # fifth of a training step (8.7 against 7.1 s at 10.65M parameters, measured). So let it keep freed memory.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(
                M_MMAP_THRESHOLD, 2**25
            ):  # glibc before 2.35 takes no more
                libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device, dtype):
    """The context that runs matmuls in `dtype`; it does nothing for float32."""
    return (
        nullcontext()
        if dtype == 'float32'
        else torch.autocast(device.partition(':')[0], DTYPES[dtype])
    )


def peak_flops(device, dtype):
    """Data-sheet FLOP/s of this device in this dtype, or None where unknown."""
    if 'cuda' not in device or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    if {'Laptop', 'Ti', 'D', 'MIG'} & set(name.split()):  # these are slower
        return None
    return next((peak for start, peak in PEAK_FLOPS.items() if re.match(rf'{start}\b', name)), None)


def memory_gb(device):
    """Most memory held so far in GB: of this process's GPU, else of the process itself; None on systems that do not tell."""
    if 'cuda' in device:
        return torch.cuda.max_memory_allocated(device) / 1e9
    if 'mps' in device:
        return torch.mps.driver_allocated_memory() / 1e9  # now, not at most
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == 'darwin' else 1024)
        / 1e9
    )
