"""
How fast is this machine, and how much of it do we use? Times the step of train.py, the generation of sample.py, the
loader and the optimizers, each beside a ceiling that is measured on the spot.

$ python bench.py config/train_shakespeare_char.py config/cpu.py                          # a training step, in parts
$ python bench.py config/train_gpt2.py --real_data=False --compare=transformers           # in turn with that of GPT2LMHeadModel
$ python bench.py config/train_gpt2.py --real_data=False --compare=../nanoGPT/model.py    # or with any model.py's, yesterday's for one
$ python bench.py config/train_gpt2.py --compare="--pos=rotary --norm=rmsnorm"            # or with other knobs, each by itself
$ python bench.py --mode=generate                                                         # GPT-2's size, random weights
$ python bench.py --mode=data                                                             # batches
$ python bench.py --mode=optimizer                                                        # AdamW and Muon, and torch's
$ python bench.py config/train_gpt2.py --mode=growth --png=growth.png                     # what a token costs in longer data and contexts
$ python bench.py config/train_gpt2.py --mode=project --tokens=2.4e9                      # on 8, 64 and 1024 GPUs: arithmetic, not measured
"""

from configurator import above, at_least, at_most, configure, fit, one_of, read_flag, read_knobs, writable

# -----------------------------------------------------------------------------
# what to time
mode = 'train' # or 'generate', 'data', 'optimizer', 'growth', 'project'
steps = 20 # measured steps; the figures are medians over them
warmup_steps = 5 # unmeasured ones before
real_data = True # False: random tokens, so that nothing need be prepared
compare = '' # in turn with ours: 'transformers' (its GPT-2), the path of a model.py, or --KNOB=VALUE of the network or optimizer; or several
json = '' # also write the figures into this file
guards = False # True: also alternate steps with and without train.py's checks for bad gradients, signals, and its log
profile = False # True: also write trace.json with torch's profiler, for chrome://tracing
prompt_tokens = 16 # to generate: tokens that are there before
new_tokens = 64 # to generate: tokens to make
png = '' # growth: also draw it
# to project
gpus = [8, 64, 1024] # how many, 8 to a machine
tokens = 10e9 # to train on
tokens_per_iter = 524288.0 # of all GPUs together
mfu = 0.4 # share of peak_tflops that a GPU computes at, as measured by the mode 'train'
peak_tflops = 989.0 # of a GPU, in TFLOP/s: an H100's in bfloat16
nvlink = 450.0 # GB/s that a GPU sends to others of its machine: an H100's
network = 400.0 # GB/s that a machine sends to others: 8 cards of 400 Gbit/s
gpu_hour = 2.5 # price of a GPU for an hour
# data
dataset = 'openwebtext' # a folder of data/ that was prepared
batch_size = 12 # sequences per step
block_size = 1024 # tokens per sequence
seed = 1337 # of weights and data
# model
n_layer = 12 # blocks
n_head = 12 # attention heads per block
n_embd = 768 # width
d_head: int | None = None # width of a head; two of n_head, n_embd, d_head give the third
d_model: int | None = None # the same as n_embd
dropout = 0.0 # costs time too
bias = False # biases in Linears and LayerNorms
gradient_checkpointing = False # True: recompute activations in backward
loss_chunk = 0 # positions whose logits exist at a time, 0: all
# optimizer
optimizer = 'adamw' # or 'muon'
# system
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto' # 'float32', 'bfloat16', 'float16', or 'fast': as 'auto', but bfloat16 on CPUs that multiply it faster
compile: bool | str = 'auto' # torch.compile
config, given = configure(globals(), model='model.py:GPTConfig', also=('train.py',)) # a training recipe tells the sizes

# -----------------------------------------------------------------------------
import importlib.util
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from json import dump
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint as ckpt
import muon
from data.loader import Loader
from data.tokenizer import dataset_meta, model_vocab_size
from device import DTYPES, autocast, memory_gb, peak_flops, resolve, tune
from generate import stream
from model import GPT, GPTConfig
from ops import Linear, fast_dtype, pack
from parallel import any_rank
from runlog import RunLog

at_least(config, 1, 'steps', 'prompt_tokens', 'new_tokens', 'batch_size', 'block_size')
at_least(config, 0, 'warmup_steps', 'gpu_hour', 'loss_chunk', 'seed')
at_most(config, 2**63 - 1, 'seed')
above(config, 0, 'tokens', 'tokens_per_iter', 'mfu', 'peak_tflops', 'nvlink', 'network')
one_of(config, optimizer=('adamw', 'muon'), mode=('train', 'generate', 'data', 'optimizer', 'growth', 'project'))
writable(config, 'json', 'png')
if not all(type(n) is int and n > 0 for n in gpus):
    raise ValueError(f'gpus={gpus} must be numbers of at least 1')
rivals = [compare] if os.path.exists(compare) else compare.split()
device, dtype, compile = resolve(device, dtype, compile)
kind = device.partition(':')[0] # 'cuda' of 'cuda:0'
tune(device, lengths_vary=mode == 'generate')
if compile:
    torch._dynamo.config.recompile_limit = 64 # several networks, each compiled once
torch.manual_seed(seed)
ctx = autocast(device, dtype)
data_dir = os.path.join('data', dataset)
if real_data and 'vocab_size' not in given:
    vocab_size = config['vocab_size'] = model_vocab_size(dataset_meta(data_dir))
n_head, n_embd = ckpt.resolve_sizes(ckpt.asked_sizes(config, given), default=(n_head, n_embd))
figures = {} # what json holds

# -----------------------------------------------------------------------------
# clocks and ceilings
def clock():
    """Seconds, once the device has done all it was given."""
    if kind != 'cpu':
        getattr(torch, kind).synchronize()
    return time.perf_counter()

def seconds(run, *args):
    t = clock()
    run(*args)
    return clock() - t

def in_turn(runs, rounds):
    """Seconds that each of `runs` (a dict of functions) took, sorted, `rounds` times one after the other; one round before warms up."""
    if sys.stdout.isatty(): # the next line stands in its place
        print('  measuring ...', end='\r', flush=True)
    taken = [[seconds(run) for run in runs.values()] for _ in range(1 + rounds)]
    return {name: sorted(each) for name, each in zip(runs, zip(*taken[1:]))}

def report(name, value, unit, note='', digits=2):
    """One line, and a figure of the json file."""
    print(f'  {name:<34} {value:11,.{digits}f} {unit:<9} {"(" + note + ")" if note else ""}'.rstrip())
    figures[name] = {'value': value, 'unit': unit, 'note': note}

def spread(taken, scale=1000.0, digits=2):
    return f'median of {len(taken)}, {min(taken) * scale:,.{digits}f} to {max(taken) * scale:,.{digits}f}'

def matmul_ceiling(dtype=DTYPES[dtype], repeats=5):
    """FLOP/s of a large matrix product, the faster of torch's own and our Linear's."""
    n = 8192 if kind == 'cuda' else 2048
    a, layer = torch.randn(n, n, device=device, dtype=dtype), Linear(n, n, bias=False, device=device, dtype=dtype)
    products = {'torch': lambda: a @ layer.weight.detach(), 'ours': lambda: layer(a)} # with gradients wanted, as in training, they differ
    many = {name: lambda product=product: [product() for _ in range(repeats)] for name, product in products.items()} # a GPU is asked for the time once
    taken = in_turn(many, 5)
    return repeats * 2 * n**3 / min(map(median, taken.values()))

def copy_ceiling(device=device, size=2**26):
    """Bytes/s, read and written, of copying what no cache holds."""
    a, b = torch.ones(2, size, device=device)
    return 2 * a.nbytes / median(in_turn({'copy': lambda: b.copy_(a)}, 10)['copy'])

@torch.inference_mode()
def matvec_ceiling(size=2**26, repeats=20):
    """Bytes/s at which a matrix that no cache holds is multiplied by a vector: torch's own way, and the fastest of ours on two shapes."""
    speeds = []
    for rows in (8192, 65536):
        layer = Linear(size // rows, rows, bias=False, device=device, dtype=DTYPES[dtype])
        x = torch.randn(1, size // rows, device=device).to(DTYPES[dtype])
        own = layer.weight.detach()
        if device == 'cpu':
            pack(layer)
        for product in (lambda: own @ x[0], lambda: layer(x)):
            speeds.append(repeats * own.nbytes / seconds(lambda: [product() for _ in range(repeats)]))
    return speeds[0], max(speeds)

# -----------------------------------------------------------------------------
# what is timed
def make_model(**others):
    model = GPT(GPTConfig(**{name: {**globals(), **others}[name] for name in GPTConfig.__dataclass_fields__}))
    model.loss_chunk, model.gradient_checkpointing = loss_chunk, gradient_checkpointing
    return model

def make_optimizer(model, which=optimizer):
    settings = 0.1, 1e-4, (0.9, 0.95), kind # the time of a step does not depend on them
    if which == 'adamw':
        return model.configure_optimizers(*settings)
    return muon.configure(model, dict.fromkeys(('matrix_lr', 'embed_lr', 'head_lr')), *settings)

def transformers_gpt2():
    """transformers' GPT-2 of the same shape, with random weights; a ValueError for networks that are not GPT-2's (but for biases)."""
    odd = [name for name, field in GPTConfig.__dataclass_fields__.items() if globals()[name] != field.default
           and name not in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'dropout', 'bias', 'init')]
    if odd:
        raise ValueError(f'compare=transformers is for GPT-2\'s network, not with {", ".join(f"{name}={globals()[name]!r}" for name in odd)}')
    if not bias:
        print('transformers has biases, ours with --bias=True too')
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size)
    drop = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=None))

class Trainer:
    """A model and its optimizer; called with a batch (X, Y) it trains one step as train.py does."""

    def __init__(self, model, optimizer, forward=None):
        self.model, self.optimizer = model.to(device).train(), optimizer
        forward = forward or (lambda model, X, Y: model(X, Y)[1])
        self.forward = torch.compile(forward, dynamic=False) if compile else forward # whoever's network, its loss is compiled with it
        self.scaler = torch.amp.GradScaler(enabled=dtype == 'float16')
        self.bad_in_row, self.clipped = torch.zeros(2, device=device)

    def __call__(self, X, Y, log=None, clock=lambda: 0.0):
        """Seconds of forward, backward and optimizer by `clock`, by default without stopping for it; with `log` also train.py's guards."""
        ticks = [clock()]
        with ctx:
            loss = self.forward(self.model, X, Y)
            if log:
                loss = loss * (1 + 0 * loss.detach())
        ticks.append(clock())
        self.scaler.scale(loss).backward()
        ticks.append(clock())
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if log:
            bad = (~grad_norm.isfinite()).float()
            self.bad_in_row, self.clipped = (self.bad_in_row + 1) * bad, self.clipped + (grad_norm > 1.0)
            self.optimizer.found_inf = bad
            any_rank(False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if log: # a row at every step
            log.row(iter=0, tokens=0, loss=loss.item(), lr=1e-4, grad_norm=grad_norm.item(), clipped=self.clipped.item(),
                    bad_steps=int(self.bad_in_row), tokens_per_second=0.0, memory_gb=memory_gb(device))
            vars(self.optimizer).pop('found_inf', None) # the scaler of float16 takes it away itself
        ticks.append(clock())
        return [b - a for a, b in zip(ticks, ticks[1:])]

def rival(compare):
    """The Trainer that a word of `compare` names; what is not our network takes AdamW."""
    if compare.startswith('--'):
        networks = read_knobs(os.path.join(os.path.dirname(__file__), 'model.py:GPTConfig'))
        knobs = {'optimizer': read_knobs(__file__, globals())['optimizer'], **networks}
        (name, (value, where)), = read_flag(compare, knobs).items()
        others = {'optimizer': optimizer, name: fit(knobs[name], value, where)}
        one_of(others, optimizer=('adamw', 'muon'))
        model = make_model(**others)
        return Trainer(model, make_optimizer(model, others['optimizer']))
    if compare == 'transformers':
        model = transformers_gpt2()
        forward = lambda model, X, Y: F.cross_entropy(model(X, use_cache=False).logits.flatten(0, 1), Y.flatten())
        return Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), forward)
    if not (os.path.isfile(compare) and compare.endswith('.py')):
        raise ValueError(f"compare={compare!r} is neither 'transformers' nor the path of a model.py nor --KNOB=VALUE")
    ours = sys.modules.pop('ops') # what it imports lies beside it
    sys.path.insert(0, os.path.dirname(os.path.abspath(compare)))
    spec = importlib.util.spec_from_file_location('model_to_compare', compare)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec) # dataclasses look themselves up
    spec.loader.exec_module(module)
    sys.path.pop(0)
    sys.modules['ops'] = ours
    if not (hasattr(module, 'GPT') and hasattr(module, 'GPTConfig')):
        raise ValueError(f'compare={compare!r} has no GPT and GPTConfig')
    fields = getattr(module.GPTConfig, '__dataclass_fields__', {})
    model = module.GPT(module.GPTConfig(**{name: value for name, value in globals().items() if name in fields}))
    return Trainer(model, make_optimizer(model, 'adamw'))

def get_batches():
    """Endless training batches."""
    if not real_data:
        X, Y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
        return iter(lambda: (X, Y), None)
    return Loader(os.path.join(data_dir, 'train.bin'), block_size, batch_size, vocab_size, seed).train_batches(itertools.count(), device)

def describe(model):
    return f'{model.get_num_params() / 1e6:.2f}M parameters on {device}, {dtype}{", compiled" if compile else ""}'

# -----------------------------------------------------------------------------
def bench_train():
    batches = get_batches()
    model = make_model()
    us = Trainer(model, make_optimizer(model))
    print(f'{describe(model)}; {batch_size} sequences of {block_size} tokens')
    report('first step', seconds(lambda: us(*next(batches))) * 1000, 'ms', 'compiles' if compile else '')
    for _ in range(warmup_steps):
        us(*next(batches))
    parts = []
    for _ in range(steps):
        t = clock()
        batch = next(batches)
        parts.append([clock() - t, *us(*batch, clock=clock)])
    memory, graphs = memory_gb(device), compile and torch._dynamo.utils.counters['stats']['unique_graphs'] # before anybody else has some
    runs = {'flatgpt': lambda: us(*next(batches))}
    for name in rivals:
        runs[name] = lambda them=rival(name): them(*next(batches))
    taken = in_turn(runs, steps) # without a clock between the parts
    dt = median(taken['flatgpt'])
    for name, each in zip(('data', 'forward', 'backward', 'optimizer'), zip(*parts)):
        report(name, median(each) * 1000, 'ms', f'{median(each) / sum(map(median, zip(*parts))):.1%}')
    report('step', dt * 1000, 'ms', spread(taken['flatgpt']))
    report('speed', batch_size * block_size / dt, 'tokens/s', digits=0)
    flops, ceiling = model.flops_per_token() * batch_size * block_size / dt, matmul_ceiling()
    report('share of a matmul', flops / ceiling * 100, '%', f'of large matrices, on this machine now: {ceiling / 1e12:.3f} TFLOP/s', 1)
    if peak_flops(device, dtype):
        report('MFU', flops / peak_flops(device, dtype) * 100, '%', f'data sheet: {peak_flops(device, dtype) / 1e12:.0f} TFLOP/s', 1)
    if memory:
        report('memory', memory, 'GB', 'now' if kind == 'mps' else 'at most')
    if compile:
        report('graphs compiled', graphs, '', digits=0)
    for name in rivals:
        report(f'{name}: step', median(taken[name]) * 1000, 'ms', spread(taken[name]))
        report('its time over ours' if name == compare else f'{name}: over ours', median(taken[name]) / dt, 'times')
    if guards:
        with tempfile.TemporaryDirectory() as folder:
            log = RunLog(folder, config, quiet=False)
            log.bar.disable = True
            both = {'plain': lambda: us(*next(batches)), 'guarded': lambda: us(*next(batches), log=log)}
            plain, guarded = map(median, in_turn(both, steps).values())
        report('guards', (guarded - plain) * 1000, 'ms', f'{guarded / plain - 1:+.2%} of {plain * 1000:.2f} ms, medians of {steps} steps in turn')
    if profile:
        with torch.profiler.profile() as trace:
            us(*next(batches))
        trace.export_chrome_trace('trace.json')
        order = 'self_cpu_time_total' if kind == 'cpu' else 'self_device_time_total'
        print(trace.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
        print('wrote trace.json; open it in chrome://tracing or ui.perfetto.dev')

def bench_generate():
    """Every token reads all weights once, so the speed of a matrix times a vector is the ceiling."""
    if prompt_tokens + new_tokens > block_size:
        raise ValueError(f'prompt_tokens={prompt_tokens} and new_tokens={new_tokens} do not fit block_size={block_size}')
    if compare not in ('', 'transformers'):
        raise ValueError(f"compare={compare!r}: generation is compared with 'transformers'")
    models = {'plain': make_model().to(device, DTYPES[dtype]).eval()}
    if device == 'cpu': # as sample.py does
        for rows in (1, 16):
            models[rows] = make_model().to(DTYPES[dtype]).eval()
            pack(models[rows], rows)
        models['int8'] = make_model().bfloat16().eval()
        pack(models['int8'], int8=True)
    prompt, num_params = torch.randint(vocab_size, (1, prompt_tokens), device=device), models['plain'].get_num_params()
    def made(B, name=None, **options):
        return list(stream(models.get(name or B, models['plain']), prompt.tolist(), new_tokens, range(B), temperature=0, **options))
    runs = {'flatgpt, batch 1': lambda: made(1), 'flatgpt, batch 16': lambda: made(16)}
    if device == 'cpu':
        runs['flatgpt, int8, batch 1'] = lambda: made(1, 'int8')
    if compile:
        step = torch.compile(models['plain'], dynamic=False, mode='reduce-overhead' if kind == 'cuda' else None)
        runs.update({f'flatgpt, compiled, batch {B}': partial(made, B, 'plain', compiled=step) for B in (1, 16)})

    @torch.inference_mode()
    def recompute():
        ids = prompt
        for _ in range(new_tokens):
            ids = torch.cat([ids, models['plain'](ids[:, -block_size:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)

    runs['recomputing the context, batch 1'] = recompute
    if compare:
        other = transformers_gpt2().to(device, DTYPES[dtype]).eval()
        runs['transformers, batch 1'] = lambda: other.generate(prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    bandwidths = []
    taken = in_turn({'': lambda: bandwidths.append(matvec_ceiling()), **runs}, steps)
    read = num_params * DTYPES[dtype].itemsize
    own, best = map(median, zip(*bandwidths[1:]))
    print(f'{describe(models["plain"])}; {prompt_tokens} tokens of prompt, {new_tokens} new ones')
    note = f'a matrix times a vector: {best / 1e9:.1f} GB/s; by torch.mv {own / 1e9:.1f} GB/s, {own / read:.1f} tokens/s'
    report('ceiling of batch 1', best / read, 'tokens/s', note, 1)
    for name in runs:
        B = int(name.split()[-1])
        speeds = [B * new_tokens / each for each in taken[name]]
        share = f', {median(speeds) * read / best:.0%} of the ceiling' if B == 1 and 'int8' not in name else ''
        report(name, median(speeds), 'tokens/s', spread(speeds, 1, 1) + share, 1)

def random_window_batch(path, dtype):
    """A batch as the simplest loader makes it: the file opened anew, one window after the other from random places."""
    ids = np.memmap(path, dtype=dtype, mode='r')
    starts = torch.randint(len(ids) - block_size, (batch_size,)).tolist()
    X, Y = [torch.stack([torch.from_numpy(ids[i + shift:i + shift + block_size].astype(np.int64)) for i in starts]) for shift in (0, 1)]
    return [z.pin_memory().to(device, non_blocking=True) if kind == 'cuda' else z.to(device) for z in (X, Y)]

def bench_data(number=500):
    """Batches alone: `number` of them by a loader that begins anew each time, so that nothing is made ahead of the clock."""
    def drain(batches):
        for _ in batches:
            pass
    with tempfile.TemporaryDirectory() as folder:
        path, width = os.path.join(data_dir, 'train.bin'), dataset_meta(data_dir).get('dtype', 'uint16')
        if not real_data:
            path, width = os.path.join(folder, 'train.bin'), 'uint16'
            np.random.default_rng(seed).integers(0, min(vocab_size, 65536), 10**7).astype(width).tofile(path)
        loader = Loader(path, block_size, batch_size, vocab_size, seed)
        taken = in_turn({'flatgpt': lambda: drain(loader.train_batches(range(number), device)),
                         'a window at a time': lambda: drain(random_window_batch(path, width) for _ in range(number))}, steps)
        print(f'batches of {batch_size} sequences of {block_size} tokens, to {device}')
        size = number * batch_size * block_size
        ceiling = copy_ceiling('cpu') / 18 # of a token two bytes are read and twice eight are written
        for name, each in taken.items():
            note = f'{spread([t / number for t in each], 1e6, 0)} us a batch, {size / median(each) / ceiling:.0%} of copying'
            report(name, size / median(each) / 1e6, 'M tokens/s', note, 1)
        report('ratio', median(taken['a window at a time']) / median(taken['flatgpt']), 'times')
        del loader # lets go of the file

def bench_optimizer():
    """AdamW reads four numbers of each parameter and writes three; Muon multiplies matrices."""
    model = make_model().to(device)
    params, matrices = list(model.parameters()), [p for name, p in model.named_parameters() if '.h.' in name and p.dim() == 2]
    rows = {'AdamW, fused': (params, make_optimizer(model, 'adamw')), "AdamW, torch's default": (params, torch.optim.AdamW(params)),
            'Muon, matrices of the blocks': (matrices, muon.Muon([dict(params=matrices, muon=True, momentum=0.95, steps=0)], fused=False)),
            'torch.optim.Muon': (matrices, torch.optim.Muon(matrices)),
            'torch.optim.Muon, four steps as ours': (matrices, torch.optim.Muon(matrices, ns_steps=4))}
    grads = {p: torch.randn_like(p) for p in params}
    taken = {name: [] for name in rows}
    for i in range(warmup_steps + steps):
        for name, (mine, each) in rows.items():
            for p in mine:
                p.grad = grads[p].clone()
            taken[name].append(seconds(each.step))
            each.zero_grad()
    taken = {name: each[warmup_steps:] for name, each in taken.items()}
    memory, products = copy_ceiling(), matmul_ceiling(fast_dtype(device))
    print(f'{describe(model)}, {sum(p.numel() for p in matrices) / 1e6:.2f}M of them in matrices of the blocks')
    flops = 0
    for p in matrices: # queries, keys and values are three matrices in one
        n = 3 if p.size(0) == 3 * p.size(1) else 1
        small, large = sorted((p.size(0) // n, p.size(1)))
        flops += 4 * n * (4 * small * small * large + 2 * small**3) # four steps
    for name, each in taken.items():
        share = (f'{28 * sum(p.numel() for p in params) / median(each) / memory:.0%} of copying, {memory / 1e9:.1f} GB/s' if 'AdamW' in name
                 else f'{flops / median(each) / products:.0%} of a matmul, {products / 1e12:.3f} TFLOP/s' if name.startswith('Muon')
                 else 'queries, keys and values as one matrix' if 'Muon' in name else '')
        report(name, median(each) * 1000, 'ms', f'{spread(each)}; {share}'.rstrip('; '))

def bench_growth():
    """What a token costs as the data grows, and as the context does, attention's own share of the work taken out."""
    global block_size, batch_size
    most = max(4096, batch_size * block_size)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model()
        us = Trainer(model, make_optimizer(model))
        loaders = {}
        for size in (10**6, 10**7, 10**8, 10**9):
            os.makedirs(os.path.join(folder, str(size)))
            path = os.path.join(folder, str(size), 'train.bin')
            with open(path, 'wb') as f:
                f.truncate(2 * size) # zeros that take no space on disk
            loaders[f'{size // 10**6:,}M tokens'] = Loader(path, block_size, batch_size, vocab_size, seed).train_batches(itertools.count(), device)
        print(f'{describe(model)}; a step of {batch_size} sequences of {block_size} tokens, by the length of the data (zeros, which no disk holds)')
        taken = in_turn({name: lambda batches=batches: us(*next(batches)) for name, batches in loaders.items()}, steps)
        for name, each in taken.items():
            note = f'{median(each) / median(taken["1M tokens"]):.3f} of the first, {spread(each)} ms'
            report(name, median(each) / batch_size / block_size * 1e6, 'us/token', note)
        by_data = [figures[name]['value'] for name in taken]
        loaders.clear()
    print(f'the same, {most} tokens a step, by the length of the context')
    taken, flops = {}, {}
    for T in (256, 512, 1024, 2048, 4096):
        block_size, batch_size = T, most // T
        model = make_model()
        us, (X, Y) = Trainer(model, make_optimizer(model)), torch.randint(vocab_size, (2, batch_size, T), device=device)
        taken[T], flops[T] = in_turn({'': lambda: us(X, Y)}, steps)[''], model.flops_per_token()
        per_token = median(taken[T]) / batch_size / T
        rate, first = per_token / flops[T], median(taken[256]) / (most // 256 * 256) / flops[256]
        note = f'{flops[T] / flops[256]:.2f} of the work, {rate / first:.2f} of the time for it, {spread(taken[T])} ms'
        report(f'T = {T}', per_token * 1e6, 'us/token', note)
    if png:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
        axes[0].plot([1e6, 1e7, 1e8, 1e9], by_data, marker='.')
        axes[1].plot(list(taken), [figures[f'T = {T}']['value'] for T in taken], marker='.', label='measured')
        axes[1].plot(list(taken), [figures['T = 256']['value'] * flops[T] / flops[256] for T in taken], linestyle='--', label='as the work grows')
        for axis, label in zip(axes, ('tokens of data', 'tokens of context')):
            axis.set(xscale='log', xlabel=label, ylim=(0, 1.1 * axis.dataLim.y1)) # from zero: a share is to be seen as one
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(f'microseconds a token ({device}, {dtype})')
        axes[1].set_xticks(list(taken), list(taken))
        axes[1].minorticks_off()
        axes[1].legend()
        figure.savefig(png, dpi=110)
        print(f'wrote {png}')

def project():
    """Time and price of a training run on many GPUs, from the work, the share of the peak and the links; nothing is measured."""
    with torch.device('meta'):
        model = make_model()
    per_token, num_params = model.flops_per_token(), sum(p.numel() for p in model.parameters())
    iterations = tokens / tokens_per_iter
    shapes = Counter(p.shape for name, p in model.named_parameters() if '.h.' in name and p.dim() == 2) # of Muon's matrices
    print(f'{num_params / 1e6:.1f}M parameters; {per_token / 1e6:,.0f} MFLOP a token x {tokens / 1e9:g} billion tokens = '
          f'{per_token * tokens:.2e} FLOP\n'
          f'{iterations:,.0f} iterations of {tokens_per_iter:,.0f} tokens, at {mfu:.0%} of {peak_tflops:g} TFLOP/s a GPU\n'
          f'gradients: {4 * num_params / 1e9:.2f} GB in float32; they travel 2 (n - 1) / n times, at {nvlink:g} GB/s within a machine of 8, '
          f'{min(nvlink, network):g} GB/s between' + '; after them Muon\'s matrices, in 16 bits' * (optimizer == 'muon') + '\n')
    print(f'  {"GPUs":>6} {"tokens a GPU":>13} {"compute":>10} {"exchange":>10} {"of compute":>11} {"iteration":>10} {"whole run":>11} {"price":>9}')
    for n in gpus:
        compute = per_token * tokens_per_iter / n / (mfu * peak_tflops * 1e12)
        link = (nvlink if n <= 8 else min(nvlink, network)) * 1e9
        exchange = 2 * (n - 1) / n * 4 * num_params / link
        iteration = max(compute, compute / 3 + exchange) # DDP exchanges while backward, two thirds of the compute, still runs
        if optimizer == 'muon': # then each rank's share of the matrices goes to all, see orthogonalize_together()
            sent = sum(2 * shape.numel() * (2 * (n - 1) / n * count if count < n else (n - 1) * -(-count // n)) for shape, count in shapes.items())
            exchange, iteration = exchange + sent / link, iteration + sent / link
        hours = iterations * iteration / 3600
        print(f'  {n:>6,} {tokens_per_iter / n:>13,.0f} {compute * 1000:>7,.1f} ms {exchange * 1000:>7,.1f} ms {exchange / compute:>11.1%} '
              f'{iteration * 1000:>7,.1f} ms {hours * 60:>7,.1f} min {hours * n * gpu_hour:>9,.0f}')
        figures[f'{n} GPUs'] = {'value': hours, 'unit': 'hours', 'note': f'{exchange / compute:.1%} of the compute is exchanged'}
    print('\nof one micro-batch each; what does not hide behind backward, two thirds of the compute, adds to the iteration; latencies are left out')

{'train': bench_train, 'generate': bench_generate, 'data': bench_data,
 'optimizer': bench_optimizer, 'growth': bench_growth, 'project': project}[mode]()
if json:
    machine = torch.cuda.get_device_name(device) if kind == 'cuda' else f'{torch.get_num_threads()} threads'
    with open(json, 'w', encoding='utf-8') as f:
        dump(dict(command=shlex.join(['python', *sys.argv]), device=device, machine=machine, dtype=dtype, compiled=compile,
                  torch=torch.__version__, knobs=config, figures=figures), f, indent=1)
    print(f'wrote {json}')
