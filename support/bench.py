"""What the modes of bench.py share: settings, clocks, figures, ceilings and networks."""

import re
import subprocess
import sys
import time
from dataclasses import fields
from statistics import median

import torch

import muon
from model import GPT, GPTConfig
from support.cpu import pack
from support.device import DTYPES
from support.errors import UserError
from support.graphs import Recorder


class Bench:
    """
    A call of bench.py. Its settings are attributes, with 'auto' and the sizes resolved; `figures`
    is what --json writes.
    """

    def __init__(self, settings, recorder):
        vars(self).update(settings)
        self.recorder, self.figures = recorder, {}
        self.kind = self.device.partition(':')[0]  # 'cuda' of 'cuda:0'
        self.float_type = DTYPES[self.dtype]

    def clock(self):
        """Seconds, when the device has done all its work."""
        if self.kind != 'cpu':
            getattr(torch, self.kind).synchronize()
        return time.perf_counter()

    def seconds(self, run, *args):
        start = self.clock()
        run(*args)
        return self.clock() - start

    def interleave(self, runs, rounds):
        """
        Time `runs`, {name: function}, each once per round: {name: sorted seconds}. Earlier rounds
        warm up and record, and do not count. A run that could not be recorded is left out.
        """
        if sys.stdout.isatty():
            print('  measuring ...', end='\r', flush=True)  # the next line overwrites it
        warmup = 1 + Recorder.FIRST_CALLS if self.recorder.on else 1
        taken = {name: [] for name in runs}
        for _ in range(warmup + rounds):
            for name, run in runs.items():
                taken[name].append(self.seconds(run))
        timed = [name for name in runs if self.recorder.on or 'CUDA graph' not in name]
        return {name: sorted(taken[name][warmup:]) for name in timed}

    def report(self, name, value, unit, note='', digits=2):
        """Print a figure, and keep it for the json file."""
        shown = f'({note})' if note else ''
        print(f'  {name:<34} {value:11,.{digits}f} {unit:<9} {shown}'.rstrip())
        self.figures[name] = {'value': value, 'unit': unit, 'note': note}

    def describe(self, model):
        compiled = ', compiled' if self.compile else ''
        size = f'{model.get_num_params() / 1e6:.2f}M parameters'
        return f'{size} on {self.device}, {self.dtype}{compiled}'

    def machine(self):
        """The name of the GPU, or of the CPU with its number of threads."""
        if self.kind == 'cuda':
            return torch.cuda.get_device_name(self.device)
        found = re.search('Model name: *(.*)', subprocess.getoutput('lscpu'))
        return f'{found[1] if found else "CPU"}, {torch.get_num_threads()} threads'

    # -------------------------------------------------------------------------
    # ceilings
    def matmul_ceiling(self, dtype, repeats=5):
        """FLOP/s of a large matrix product."""
        n = 8192 if self.kind == 'cuda' else 2048
        a, b = torch.randn(2, n, n, device=self.device, dtype=dtype)
        taken = self.interleave({'product': repeated(lambda: a @ b, repeats)}, 5)['product']
        return repeats * 2 * n**3 / median(taken)

    def copy_ceiling(self, device, size=2**26):
        """Bytes/s, read and written, of copying an array that no cache holds."""
        a, b = torch.ones(2, size, device=device)
        return 2 * a.nbytes / median(self.interleave({'copy': lambda: b.copy_(a)}, 10)['copy'])

    @torch.inference_mode()
    def matvec_ceiling(self, size=2**26, repeats=20):
        """Bytes/s of a matrix that no cache holds times a vector: (by torch, the fastest way)."""
        speeds = []
        for rows in (8192, 65536):
            settings = dict(bias=False, device=self.device, dtype=self.float_type)
            layer = torch.nn.Sequential(torch.nn.Linear(size // rows, rows, **settings))
            x = torch.randn(1, size // rows, device=self.device).to(self.float_type)
            weight = layer[0].weight.detach()
            if self.device == 'cpu':
                pack(layer)  # as sample.py does
            for product in (lambda: weight @ x[0], lambda: layer(x)):
                speeds.append(repeats * weight.nbytes / self.seconds(repeated(product, repeats)))
        return speeds[0], max(speeds)

    # -------------------------------------------------------------------------
    # networks
    def make_model(self, **others):
        """A GPT with random weights, of the settings or of `others`."""
        settings = {**vars(self), **others}
        model = GPT(GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig)}))
        model.loss_chunk = self.loss_chunk
        model.gradient_checkpointing = self.gradient_checkpointing
        return model

    def make_optimizer(self, model, which):
        """An optimizer as in train.py. The values do not change the time that a step takes."""
        values = 0.1, 1e-4, (0.9, 0.95), self.kind  # weight decay, rate, betas
        if which == 'adamw':
            return model.configure_optimizers(*values)
        rates = dict.fromkeys(('matrix_lr', 'embed_lr', 'head_lr'))
        return muon.configure(model, rates, *values)

    def transformers_gpt2(self):
        """
        transformers' GPT-2 of the same size, with random weights. Raises UserError if our network
        differs from GPT-2's in more than its biases.
        """
        free = 'n_layer n_head n_embd block_size vocab_size dropout bias init'.split()
        differ = []
        for field in fields(GPTConfig):
            value = getattr(self, field.name)
            if field.name not in free and value != field.default:
                differ.append(f'{field.name}={value!r}')
        if differ:
            what = ', '.join(differ)
            raise UserError(f"compare=transformers is for GPT-2's network, not with {what}")
        if not self.bias:
            print('transformers has biases, ours has them with --bias=True')
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {name: getattr(self, name) for name in ('n_layer', 'n_head', 'n_embd')}
        sizes |= {'n_positions': self.block_size, 'vocab_size': self.vocab_size}
        drop = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), self.dropout)
        return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=None))


def repeated(function, number):
    """A function that calls `function` this many times; a GPU then waits for the clock once."""

    def run():
        for _ in range(number):
            function()

    return run


def spread(values, scale=1000.0, digits=2):
    """'median of 20, 8.31 to 9.02': the number of values and their range."""
    lowest, highest = min(values) * scale, max(values) * scale
    return f'median of {len(values)}, {lowest:,.{digits}f} to {highest:,.{digits}f}'
