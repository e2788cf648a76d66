"""
What this machine supports: the device, number format and compiler that 'auto' stands for, CPU
threads, peak speed and memory use.
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
from support.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Peak dense FLOP/s in bf16/fp16 (no sparsity), from the makers' data sheets. The names are matched
# against the start of the name that CUDA reports; a GPU that is not listed gets no MFU.
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


# -----------------------------------------------------------------------------
# device, dtype, compile
def resolve(device, dtype, compile, quantize=''):
    """
    (device, dtype, compile) with every 'auto' replaced by what suits this machine.

    device: 'cuda' (under torchrun, this process's own GPU), else 'mps', else 'cpu'
    dtype: bfloat16 on GPUs that have it in hardware (compute capability 8.0 and up), float16 on
        older GPUs, float32 on CPU and MPS; 'fast' also takes bfloat16 on CPUs that have it
    compile: True on GPUs that Triton supports (compute capability 7.0 and up)
    quantize: 'int8', on CPUs only, runs everything else in bfloat16; '' is off
    Raises UserError for an unknown value and for what this machine does not support.
    """
    device = resolve_device(device)
    if quantize:
        dtype = dtype_beside(quantize, device, dtype)
    if 'cuda' in device:
        check_capability(device)
    dtype = resolve_dtype(device, dtype)
    return device, dtype, resolve_compile(device, compile)


def resolve_device(device):
    if device == 'auto' and torch.cuda.is_available():
        device = 'cuda'
    elif device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind, _, number = device.partition(':')
    if kind not in ('cuda', 'mps', 'cpu') or (number and not number.isdigit()):
        raise UserError(f"device={device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    if kind == 'cuda':
        return resolve_gpu(device, number)
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps': no Apple GPU here; try --device=auto or --device=cpu")
    return device if kind == 'mps' else 'cpu'  # there is one CPU device, whatever its number


def resolve_gpu(device, number):
    """'cuda' or 'cuda:N' as 'cuda:N'; number: N as text, or '' for this process's own GPU."""
    if not torch.cuda.is_available():
        why = 'torch finds no usable GPU'
        if torch.version.cuda is None:
            why = 'this torch has no CUDA support'
        raise UserError(f"device={device!r}: {why}; try --device=auto or --device=cpu")
    if number and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1:
        raise UserError(
            f'device=cuda:{number} would be the GPU of every process; '
            'torchrun gives each its own with --device=cuda'
        )
    number = number or os.environ.get('LOCAL_RANK', '0')
    count = torch.cuda.device_count()
    if int(number) >= count:
        raise UserError(f'device cuda:{number}: this machine has {count} GPU(s), numbered from 0')
    return f'cuda:{number}'


def check_capability(device):
    """Raise UserError if this build of torch has no code for a GPU as old as `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    archs = [arch for arch in torch.cuda.get_arch_list() if arch.startswith('sm_')]  # 'sm_90a'
    oldest = min([int(arch[3:].rstrip('af')) for arch in archs], default=0)
    if major * 10 + minor < oldest:
        raise UserError(
            f'{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, '
            f'and this torch has code from {oldest // 10}.{oldest % 10} up; '
            'use --device=cpu, or a build of torch for older GPUs (pytorch.org)'
        )


def dtype_beside(quantize, device, dtype):
    """The dtype of everything that is not quantized."""
    if quantize != 'int8':
        raise UserError(f"quantize={quantize!r} is none of '', 'int8'")
    if device != 'cpu':
        raise UserError(f'quantize={quantize!r} is for CPUs; add --device=cpu')
    if dtype not in ('auto', 'fast', 'bfloat16'):
        raise UserError(
            f'quantize={quantize!r} computes the rest in bfloat16; leave --dtype={dtype} out'
        )
    return 'bfloat16'


def resolve_dtype(device, dtype):
    kind = device.partition(':')[0]
    if dtype in ('auto', 'fast'):
        if kind == 'cuda':
            return 'bfloat16' if fast_bfloat16(device) else 'float16'
        return 'bfloat16' if dtype == 'fast' and fast_bfloat16(device) else 'float32'
    if dtype not in DTYPES:
        names = "'auto', 'fast', 'float32', 'bfloat16', 'float16'"
        raise UserError(f'dtype={dtype!r} is none of {names}')
    if dtype == 'float16' and kind != 'cuda':
        raise UserError(
            "dtype='float16' needs a CUDA device (its gradients are scaled); "
            f'on {kind} use float32 or bfloat16'
        )
    return dtype


def resolve_compile(device, compile):
    if compile != 'auto' and not isinstance(compile, bool):
        raise UserError(f"compile={compile!r} is none of 'auto', True, False")
    if not compile:
        return False
    problem = compile_problem(device)
    if compile == 'auto':
        return 'cuda' in device and not problem
    if problem:
        raise UserError(f'compile=True {problem}; use --compile=False')
    return True


def compile_problem(device):
    """Why torch.compile does not work on `device`, '' if it does."""
    if device == 'cpu' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        return 'on CPU needs a C++ compiler (g++, clang++ or MSVC)'
    if 'cuda' not in device:
        return ''
    has_triton = importlib.util.find_spec('triton') is not None
    if not has_triton or torch.cuda.get_device_capability(device) < (7, 0):
        return 'on a GPU needs the package triton and compute capability 7.0'
    missing = missing_for_triton() if os.name == 'posix' else ''
    return f'on a GPU needs {missing}, for Triton; install it' if missing else ''


def missing_for_triton():
    """What Triton needs to build its first module and this machine lacks, '' for nothing."""
    if not (os.environ.get('CC') or any(map(shutil.which, ('gcc', 'clang', 'cc')))):
        return 'a C compiler (gcc or clang)'
    header = os.path.join(sysconfig.get_path('include'), 'Python.h')
    return '' if os.path.exists(header) else "Python's headers (python3-dev)"


def pays_to_compile(flops):
    """
    Whether torch.compile saves a run of `flops` operations more than the half minute it takes.

    A large GPU reaches about 1e14 FLOP/s, and saves a third of the time if compiled: on an H100 the
    step of 10.65M parameters takes 5.7 instead of 8.6 ms. On a smaller GPU both times are longer.
    """
    return flops / 1e14 / 3 > 30


# -----------------------------------------------------------------------------
# settings of torch and the C library
def tune(device, lengths_vary=False):
    """
    Set up torch: TF32 on GPUs; on CPUs, threads and an allocator without page faults.
    lengths_vary: True if sequences of many lengths follow, as in sampling
    """
    if 'cuda' in device:
        # TF32. Only for GPUs, since CPUs with AMX-FP16 would round too
        torch.set_float32_matmul_precision('high')
        if lengths_vary:
            # on an H100 cuDNN plans attention anew for each length, which takes tens of ms
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_device(device)  # the current GPU, where no other is named
    if 'cpu' in device and sys.platform == 'linux':
        threads = cpu_threads()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        keep_freed_memory()


def cpu_threads(root='/sys'):
    """
    Number of threads for this process on Linux: torch's choice, which is the physical cores. But
    torchrun sets OMP_NUM_THREADS=1, which leaves cores idle, so its processes share the cores; and
    a container may be allowed less processor time than it sees cores.
    """
    threads = torch.get_num_threads()
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if processes > 1 and os.environ.get('OMP_NUM_THREADS') == '1':
        siblings = 'devices/system/cpu/cpu{}/topology/thread_siblings_list'  # threads of a core
        cores = {words_of(root, siblings.format(i)) for i in os.sched_getaffinity(0)}
        threads = max(1, len(cores) // processes)
    quota = words_of(root, 'fs/cgroup/cpu.max')  # microseconds allowed, and of how many
    if len(quota) == 2 and quota[0] != 'max':
        threads = min(threads, max(1, int(quota[0]) // int(quota[1]) // processes))
    return threads


def words_of(*path):
    """The words of a small file as a tuple, () if it cannot be read."""
    try:
        with open(os.path.join(*path), encoding='ascii') as f:
            return tuple(f.read().split())
    except (OSError, ValueError):
        return ()


def keep_freed_memory():
    """
    Let glibc reuse freed memory. By default every tensor over 32 MB gets new pages, and each page
    faults when first touched: a fifth of a training step (8.7 against 7.1 s at 10.65M parameters).
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'mallopt'):
        return
    # glibc before 2.35 takes at most 2**25
    if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device, dtype):
    """The context that runs matmuls in `dtype`; it does nothing for float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device.partition(':')[0], DTYPES[dtype])


# -----------------------------------------------------------------------------
# speed and memory
def peak_flops(device, dtype):
    """Data-sheet FLOP/s of this device in this dtype, or None if unknown."""
    if 'cuda' not in device or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    if {'Laptop', 'Ti', 'D', 'MIG'} & set(name.split()):  # slower than the listed GPU
        return None
    for start, peak in PEAK_FLOPS.items():
        if re.match(rf'{start}\b', name):
            return peak
    return None


def memory_gb(device):
    """
    Peak memory so far in GB, of this process's GPU, else of the process. On MPS it is the memory
    in use now; None on systems that do not report it.
    """
    if 'cuda' in device:
        return torch.cuda.max_memory_allocated(device) / 1e9
    if 'mps' in device:
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
