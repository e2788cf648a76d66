"""
How fast is this machine, and how much of it do we use? Times the step of train.py, the generation
of sample.py, the loader and the optimizers, each beside a ceiling that is measured on the spot.

$ python bench.py config/train_shakespeare_char.py config/cpu.py    # a training step, in parts
$ python bench.py config/train_gpt2.py --real_data=False --compare=transformers    # in turn with it
$ python bench.py config/train_gpt2.py --real_data=False --compare=../nanoGPT/model.py
$ python bench.py config/train_gpt2.py --compare="--pos=rotary --norm=rmsnorm"    # or other knobs
$ python bench.py --mode=generate    # text by GPT-2's size, random weights
$ python bench.py --mode=data    # batches
$ python bench.py --mode=optimizer    # AdamW and Muon, and torch's
$ python bench.py --mode=report --json=report.json    # most of it in one table, minutes
"""

from configurator import check, configure, fit, read_flag, read_knobs, writable

# -----------------------------------------------------------------------------
# what to time
mode = 'train'  # or 'generate', 'data', 'optimizer', 'report'
steps = 20  # measured steps; the figures are medians over them
warmup_steps = 5  # unmeasured ones before
real_data = True  # False: random tokens, so that nothing need be prepared
compare = ''  # in turn: 'transformers', a path of a model.py, --KNOB=VALUE of network or optimizer
json = ''  # also write the figures into this file
profile = False  # True: also write trace.json with torch's profiler, for chrome://tracing
prompt_tokens = 16  # to generate: tokens that are there before
new_tokens = 0  # to generate: tokens to make, 0: 64, on a CUDA device 240
# data
dataset = 'openwebtext'  # a folder of data/ that was prepared
batch_size = 12  # sequences per step
seed = 1337  # of weights and data
# model: its sizes stand in model.py
d_head: int | None = None  # width of a head; two of n_head, n_embd, d_head give the third
d_model: int | None = None  # the same as n_embd
bias = False  # biases in Linears and LayerNorms
gradient_checkpointing = False  # True: recompute activations in backward
loss_chunk = 0  # positions whose logits exist at a time, 0: all
# optimizer
optimizer = 'adamw'  # or 'muon'
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16', or 'fast': as 'auto', but bfloat16 on CPUs that multiply it faster
compile: bool | str = 'auto'  # torch.compile
cuda_graph: bool | str = (
    'auto'  # also time what is recorded as CUDA graphs; 'auto': where supported
)
config, given = configure(
    globals(), model='model.py:GPTConfig', also=('train.py',)
)  # a training recipe tells the sizes

# -----------------------------------------------------------------------------
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from json import dump, load
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

import generate
import muon
from data.loader import Loader
from data.tokenizer import dataset_dir, dataset_meta, model_vocab_size
from model import GPT, GPTConfig
from support import weights
from support.cpu import Linear, fast_dtype, pack
from support.device import DTYPES, autocast, memory_gb, peak_flops, resolve, tune
from support.graphs import Recorder, can_record

check(config, 'steps prompt_tokens batch_size block_size', least=1)
check(config, 'warmup_steps new_tokens loss_chunk', least=0)
check(config, 'seed', least=0, most=2**63 - 1)
check(config, 'optimizer', choices=('adamw', 'muon'))
check(config, 'mode', choices=('train', 'generate', 'data', 'optimizer', 'report'))
writable(config, 'json')
rivals = [compare] if os.path.exists(compare) else compare.split()
device, dtype, compile = resolve(device, dtype, compile)
kind = device.partition(':')[0]  # 'cuda' of 'cuda:0'
new_tokens = new_tokens or (240 if kind == 'cuda' else 64)  # 256 columns, so one recording
tune(device, lengths_vary=mode == 'generate')
redraws = gradient_checkpointing and bool(dropout or attn_dropout)  # dropout, in backward
recorder = Recorder(
    mode in ('train', 'optimizer') and can_record(cuda_graph, device, dtype, False, redraws)
)
if compile:
    torch._dynamo.config.recompile_limit = 64  # several networks, each compiled once
torch.manual_seed(seed)
ctx = autocast(device, dtype)
data_dir = dataset_dir(dataset)
if real_data and 'vocab_size' not in given:
    vocab_size = config['vocab_size'] = model_vocab_size(dataset_meta(data_dir))
n_head, n_embd = weights.resolve_sizes(weights.asked_sizes(config, given), default=(n_head, n_embd))
figures = {}  # what json holds


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
    """Seconds each of `runs` (by name) took, sorted, in turn; rounds before warm up and record."""
    if sys.stdout.isatty():  # the next line stands in its place
        print('  measuring ...', end='\r', flush=True)
    taken = [
        [seconds(run) for run in runs.values()]
        for _ in range(1 + Recorder.FIRST_CALLS * recorder.on + rounds)
    ]
    return {
        name: sorted(each)
        for name, each in zip(runs, zip(*taken[-rounds:]))
        if recorder.on or 'CUDA graph' not in name
    }  # a recording may fail


def report(name, value, unit, note='', digits=2):
    """One line, and a figure of the json file."""
    print(
        f'  {name:<34} {value:11,.{digits}f} {unit:<9} {"(" + note + ")" if note else ""}'.rstrip()
    )
    figures[name] = {'value': value, 'unit': unit, 'note': note}


def spread(taken, scale=1000.0, digits=2):
    return f'median of {len(taken)}, {min(taken) * scale:,.{digits}f} to {max(taken) * scale:,.{digits}f}'


def matmul_ceiling(dtype=DTYPES[dtype], repeats=5):
    """FLOP/s of a large matrix product, the faster of torch's own and our Linear's."""
    n = 8192 if kind == 'cuda' else 2048
    a, layer = (
        torch.randn(n, n, device=device, dtype=dtype),
        Linear(n, n, bias=False, device=device, dtype=dtype),
    )
    products = {
        'torch': lambda: a @ layer.weight.detach(),
        'ours': lambda: layer(a),
    }  # with gradients wanted, as in training, they differ
    many = {
        name: lambda product=product: [product() for _ in range(repeats)]
        for name, product in products.items()
    }  # a GPU is asked for the time once
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
            speeds.append(
                repeats * own.nbytes / seconds(lambda: [product() for _ in range(repeats)])
            )
    return speeds[0], max(speeds)


# -----------------------------------------------------------------------------
# what is timed
def make_model(**others):
    model = GPT(
        GPTConfig(
            **{name: {**globals(), **others}[name] for name in GPTConfig.__dataclass_fields__}
        )
    )
    model.loss_chunk, model.gradient_checkpointing = loss_chunk, gradient_checkpointing
    return model


def make_optimizer(model, which=optimizer):
    settings = 0.1, 1e-4, (0.9, 0.95), kind  # the time of a step does not depend on them
    if which == 'adamw':
        return model.configure_optimizers(*settings)
    return muon.configure(model, dict.fromkeys(('matrix_lr', 'embed_lr', 'head_lr')), *settings)


def transformers_gpt2():
    """transformers' GPT-2 of the same shape, with random weights; a ValueError for networks that are not GPT-2's (but for biases)."""
    odd = [
        name
        for name, field in GPTConfig.__dataclass_fields__.items()
        if globals()[name] != field.default
        and name
        not in (
            'n_layer',
            'n_head',
            'n_embd',
            'block_size',
            'vocab_size',
            'dropout',
            'bias',
            'init',
        )
    ]
    if odd:
        raise ValueError(
            f'compare=transformers is for GPT-2\'s network, not with {", ".join(f"{name}={globals()[name]!r}" for name in odd)}'
        )
    if not bias:
        print('transformers has biases, ours with --bias=True too')
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size
    )
    drop = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=None))


def trainer(model, optimizer, forward=lambda model, X, Y: model(X, Y)[1], recorded=Recorder(False)):
    """A function of a batch (X, Y) that takes a step in train.py's parts; forward: its loss."""
    model.to(device).train()
    loss_of = torch.compile(forward, dynamic=False) if compile else forward  # whoever's network
    scaler = torch.amp.GradScaler(enabled=dtype == 'float16')
    loss_sum, grad_norm, bad, bad_in_row, clipped = torch.zeros(5, device=device).unbind()
    if optimizer.defaults.get('fused'):  # the others do not take it
        optimizer.found_inf = bad
    for group in optimizer.param_groups:
        group['capturable'] = kind == 'cuda'
    ticks = []  # a clock, then its times

    @recorded
    def add_gradients(X, Y):
        with ctx:
            loss = loss_of(model, X, Y)
            loss = loss * (1 + 0 * loss.detach())
        ticks.append(ticks[0]())
        scaler.scale(loss).backward()
        loss_sum.add_(loss.detach())

    @recorded
    def clip_gradients():
        scaler.unscale_(optimizer)
        grad_norm.copy_(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        bad.copy_(~grad_norm.isfinite())
        bad_in_row.add_(1).mul_(bad)
        clipped.add_(grad_norm > 1.0)

    @recorded
    def step():
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not recorded.on)

    def train(X, Y, clock=lambda: 0.0):
        """Seconds of forward, backward and optimizer by `clock`, by default without a stop."""
        ticks[:] = clock, clock()
        muon.set_rates(optimizer, 1e-4, 0)
        loss_sum.zero_()
        add_gradients(X, Y)
        ticks.append(clock())
        clip_gradients()
        step()
        ticks.append(clock())
        return [b - a for a, b in zip(ticks[1:], ticks[2:])]

    return train


def rival(compare):
    """The trainer() that a word of `compare` names; what is not our network takes AdamW."""
    if compare.startswith('--'):
        networks = read_knobs(os.path.join(os.path.dirname(__file__), 'model.py:GPTConfig'))
        knobs = {'optimizer': read_knobs(__file__, globals())['optimizer'], **networks}
        ((name, (value, where)),) = read_flag(compare, knobs).items()
        others = {'optimizer': optimizer, name: fit(knobs[name], value, where)}
        check(others, 'optimizer', choices=('adamw', 'muon'))
        model = make_model(**others)
        return trainer(model, make_optimizer(model, others['optimizer']))
    if compare == 'transformers':
        model = transformers_gpt2()
        forward = lambda model, X, Y: F.cross_entropy(
            model(X, use_cache=False).logits.flatten(0, 1), Y.flatten()
        )
        return trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), forward)
    if not (os.path.isfile(compare) and compare.endswith('.py')):
        raise ValueError(
            f"compare={compare!r} is neither 'transformers' nor the path of a model.py nor --KNOB=VALUE"
        )
    ours = sys.modules.pop('ops')  # what it imports lies beside it
    sys.path.insert(0, os.path.dirname(os.path.abspath(compare)))
    spec = importlib.util.spec_from_file_location('model_to_compare', compare)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(
        spec
    )  # dataclasses look themselves up
    spec.loader.exec_module(module)
    sys.path.pop(0)
    sys.modules['ops'] = ours
    if not (hasattr(module, 'GPT') and hasattr(module, 'GPTConfig')):
        raise ValueError(f'compare={compare!r} has no GPT and GPTConfig')
    fields = getattr(module.GPTConfig, '__dataclass_fields__', {})
    model = module.GPT(
        module.GPTConfig(**{name: value for name, value in globals().items() if name in fields})
    )
    return trainer(model, make_optimizer(model, 'adamw'))


def get_batches():
    """Endless training batches."""
    if not real_data:
        X, Y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
        return iter(lambda: (X, Y), None)
    return Loader(
        os.path.join(data_dir, 'train.bin'), block_size, batch_size, vocab_size, seed
    ).train_batches(itertools.count(), device)


def describe(model):
    return f'{model.get_num_params() / 1e6:.2f}M parameters on {device}, {dtype}{", compiled" if compile else ""}'


# -----------------------------------------------------------------------------
def bench_train():
    batches = get_batches()
    model = make_model()
    us = trainer(model, make_optimizer(model))
    print(f'{describe(model)}; {batch_size} sequences of {block_size} tokens')
    report(
        'first step',
        seconds(lambda: us(*next(batches))) * 1000,
        'ms',
        'compiles' if compile else '',
    )
    for _ in range(warmup_steps):
        us(*next(batches))
    parts = []
    for _ in range(steps):
        t = clock()
        batch = next(batches)
        parts.append([clock() - t, *us(*batch, clock=clock)])
    memory, graphs = (
        memory_gb(device),
        compile and torch._dynamo.utils.counters['stats']['unique_graphs'],
    )  # before anybody else has some
    runs = {'step': us}
    if recorder.on:
        twin = make_model()
        runs['step, CUDA graph'] = trainer(twin, make_optimizer(twin), recorded=recorder)
    runs.update({name: rival(name) for name in rivals})
    turns = {name: lambda run=run: run(*next(batches)) for name, run in runs.items()}
    taken = in_turn(turns, steps)  # without a clock between the parts
    medians = {name: median(each) for name, each in taken.items()}
    ours = [name for name in medians if name not in rivals]
    fastest = min(ours, key=medians.get)
    dt, middle = medians[fastest], list(map(median, zip(*parts)))
    for name, each in zip(('data', 'forward', 'backward', 'optimizer'), middle):
        report(name, each * 1000, 'ms', f'{each / sum(middle):.1%}')
    for name in ours:
        ratio = '' if name == 'step' else f'; {medians[name] / medians["step"]:.2f} of the step'
        report(name, medians[name] * 1000, 'ms', spread(taken[name]) + ratio)
    report('speed', batch_size * block_size / dt, 'tokens/s', fastest, digits=0)
    flops, ceiling = model.flops_per_token() * batch_size * block_size / dt, matmul_ceiling()
    note = f'of large matrices, on this machine now: {ceiling / 1e12:.3f} TFLOP/s'
    report('share of a matmul', flops / ceiling * 100, '%', note, 1)
    if peak := peak_flops(device, dtype):
        report('MFU', flops / peak * 100, '%', f'data sheet: {peak / 1e12:.0f} TFLOP/s', 1)
    if memory:
        report('memory', memory, 'GB', 'now' if kind == 'mps' else 'at most')
    if compile:
        report('graphs compiled', graphs, '', digits=0)
    for name in rivals:
        report(f'{name}: step', medians[name] * 1000, 'ms', spread(taken[name]))
        over = 'its time over ours' if name == compare else f'{name}: over ours'
        note = '' if fastest == 'step' else f'{medians[name] / dt:.2f} over our {fastest}'
        report(over, medians[name] / medians['step'], 'times', note)
    if profile:
        with torch.profiler.profile() as trace:
            us(*next(batches))
        trace.export_chrome_trace('trace.json')
        order = 'self_cpu_time_total' if kind == 'cpu' else 'self_device_time_total'
        print(trace.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
        print('wrote trace.json; open it in chrome://tracing or ui.perfetto.dev')


def bench_generate():
    """Every token reads all weights once: the ceiling is the speed of a matrix times a vector."""
    if prompt_tokens + new_tokens > block_size:
        raise ValueError(f'{prompt_tokens=} and {new_tokens=} do not fit block_size={block_size}')
    if compare not in ('', 'transformers'):
        raise ValueError(f"compare={compare!r}: generation is compared with 'transformers'")
    plain = make_model().to(device, DTYPES[dtype]).eval()
    prompt = torch.randint(vocab_size, (1, prompt_tokens), device=device)

    def made(model, B, **how):
        list(generate.stream(model, prompt.tolist(), new_tokens, range(B), temperature=0, **how))

    @torch.inference_mode()
    def recompute():
        ids = prompt
        for _ in range(new_tokens):
            ids = torch.cat([ids, plain(ids)[0][:, -1].argmax(-1, keepdim=True)], dim=1)

    graph = cuda_graph is not False and generate.can_record(torch.device(device))
    ways = {'': graph, 'no graph, ': False} if graph else {'': False}
    models = {B: make_model().to(device, DTYPES[dtype]).eval() for B in (1, 16)}
    runs = {}
    for (name, on), B in itertools.product(ways.items(), models):
        runs[f'flatgpt, {name}batch {B}'] = partial(made, models[B], B, cuda_graph=on, kept={})
        if compile:
            how = dict(cuda_graph=on, compiled=torch.compile(plain, dynamic=False), kept={})
            runs[f'flatgpt, compiled, {name}batch {B}'] = partial(made, plain, B, **how)
    if device == 'cpu':  # as sample.py does
        for B, model in models.items():
            pack(model, B)
        int8 = make_model().bfloat16().eval()
        pack(int8, int8=True)
        runs['flatgpt, int8, batch 1'] = partial(made, int8, 1)
    runs['recomputing the context, batch 1'] = recompute
    if compare:
        other = transformers_gpt2().to(device, DTYPES[dtype]).eval()
        how = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        runs['transformers, batch 1'] = lambda: other.generate(prompt, **how)
    bandwidths = []
    taken = in_turn({'': lambda: bandwidths.append(matvec_ceiling()), **runs}, steps)
    read = plain.get_num_params() * DTYPES[dtype].itemsize
    own, best = map(median, zip(*bandwidths[1:]))
    print(f'{describe(plain)}; {prompt_tokens} tokens of prompt, {new_tokens} new ones')
    note = f'a matrix times a vector: {best / 1e9:.1f} GB/s; by torch.mv {own / 1e9:.1f} GB/s, {own / read:.1f} tokens/s'
    report('ceiling of batch 1', best / read, 'tokens/s', note, 1)
    for name in runs:
        B = int(name.split()[-1])
        speeds = [B * new_tokens / each for each in taken[name]]
        share = (
            f', {median(speeds) * read / best:.0%} of the ceiling'
            if B == 1 and 'int8' not in name
            else ''
        )
        report(name, median(speeds), 'tokens/s', spread(speeds, 1, 1) + share, 1)


def random_window_batch(path, dtype):
    """A batch as the simplest loader makes it: the file opened anew, one window after the other from random places."""
    ids = np.memmap(path, dtype=dtype, mode='r')
    starts = torch.randint(len(ids) - block_size, (batch_size,)).tolist()
    X, Y = [
        torch.stack(
            [
                torch.from_numpy(ids[i + shift : i + shift + block_size].astype(np.int64))
                for i in starts
            ]
        )
        for shift in (0, 1)
    ]
    return [
        z.pin_memory().to(device, non_blocking=True) if kind == 'cuda' else z.to(device)
        for z in (X, Y)
    ]


def bench_data(number=500):
    """Batches alone: `number` of them by a loader that begins anew each time, so that nothing is made ahead of the clock."""

    def drain(batches):
        for _ in batches:
            pass

    with tempfile.TemporaryDirectory() as folder:
        path, width = (
            os.path.join(data_dir, 'train.bin'),
            dataset_meta(data_dir).get('dtype', 'uint16'),
        )
        if not real_data:
            path, width = os.path.join(folder, 'train.bin'), 'uint16'
            np.random.default_rng(seed).integers(0, min(vocab_size, 65536), 10**7).astype(
                width
            ).tofile(path)
        loader = Loader(path, block_size, batch_size, vocab_size, seed)
        taken = in_turn(
            {
                'flatgpt': lambda: drain(loader.train_batches(range(number), device)),
                'a window at a time': lambda: drain(
                    random_window_batch(path, width) for _ in range(number)
                ),
            },
            steps,
        )
        print(f'batches of {batch_size} sequences of {block_size} tokens, to {device}')
        size = number * batch_size * block_size
        ceiling = (
            copy_ceiling('cpu') / 18
        )  # of a token two bytes are read and twice eight are written
        for name, each in taken.items():
            note = f'{spread([t / number for t in each], 1e6, 0)} us a batch, {size / median(each) / ceiling:.0%} of copying'
            report(name, size / median(each) / 1e6, 'M tokens/s', note, 1)
        report('ratio', median(taken['a window at a time']) / median(taken['flatgpt']), 'times')
        del loader  # lets go of the file


def bench_optimizer():
    """AdamW reads four numbers of each parameter and writes three; Muon multiplies matrices."""
    model = make_model().to(device)
    params = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if '.h.' in name and p.dim() == 2]
    for p in params:
        p.grad = torch.randn_like(p)

    def muons(recorder):
        """Muon's step as train.py takes it."""
        ours = muon.Muon([dict(params=matrices, muon=True, momentum=0.95)], fused=False)
        ours.param_groups[0]['capturable'] = kind == 'cuda'
        ours.found_inf = torch.zeros((), device=device)
        recorded = recorder(ours.step)
        return lambda: (muon.set_rates(ours, 0.02, 0), recorded())

    runs = {
        'AdamW, fused': make_optimizer(model, 'adamw').step,
        "AdamW, torch's default": torch.optim.AdamW(params).step,
        'Muon, matrices of the blocks': muons(Recorder(on=False)),
        'torch.optim.Muon': torch.optim.Muon(matrices).step,
        'torch.optim.Muon, four steps as ours': torch.optim.Muon(matrices, ns_steps=4).step,
    }
    if recorder.on:
        runs['Muon, CUDA graph'] = muons(recorder)
    taken = in_turn(runs, steps)
    memory, products = copy_ceiling(), matmul_ceiling(fast_dtype(device))
    total, in_blocks = (sum(p.numel() for p in each) for each in (params, matrices))
    print(f'{describe(model)}, {in_blocks / 1e6:.2f}M of them in matrices of the blocks')
    flops = 0
    for p in matrices:  # queries, keys and values are three matrices in one
        n = 3 if p.size(0) == 3 * p.size(1) else 1
        small, large = sorted((p.size(0) // n, p.size(1)))
        flops += 4 * n * (4 * small * small * large + 2 * small**3)  # four steps
    for name, each in taken.items():
        share = 'queries, keys and values as one matrix'
        if name.startswith('AdamW'):
            share = f'{28 * total / median(each) / memory:.0%} of copying, {memory / 1e9:.1f} GB/s'
        elif name.startswith('Muon'):
            rate = flops / median(each) / products
            share = f'{rate:.0%} of a matmul, {products / 1e12:.3f} TFLOP/s'
        report(name, median(each) * 1000, 'ms', f'{spread(each)}; {share}')


# -----------------------------------------------------------------------------
CHAR = 'config/train_shakespeare_char.py --vocab_size=65'
BATTERY = {  # of the report
    '10.65M': f'{CHAR} --compile=False',
    '10.65M compiled': f'{CHAR} --compile=True',
    '10.65M modern short': f'{CHAR} config/modern.py config/short.py --compile=False',
    '10.65M modern short compiled': f'{CHAR} config/modern.py config/short.py --compile=True',
    '124M compiled': 'config/train_gpt2.py --batch_size=32 --compile=True',
    '124M modern compiled': 'config/train_gpt2.py config/modern.py --batch_size=32 --n_head=6 --compile=True',
    'text by 124M': '--mode=generate --steps=3',
    'optimizers of 124M': '--mode=optimizer',
    'batches': '--mode=data --steps=5',
}
ON_CPU = '--steps=3 --warmup_steps=1 --batch_size=8 --new_tokens=16'
NOT_IN_TABLE = 'first step', 'data', 'forward', 'backward', 'optimizer', 'graphs compiled'


def bench_report():
    """A battery of commands as one table; further words of the command line are handed to all."""
    own = '--mode=', '--json=', '--compare='
    further = [word for word in sys.argv[1:] if not word.startswith(own)]
    if kind == 'cpu':
        print(f'on a CPU: {ON_CPU}; no compiler, no training and optimizers of 124M')
        further = ON_CPU.split() + further
    if 'transformers' in rivals and not importlib.util.find_spec('transformers'):
        print('transformers is not installed: left out')
        rivals.remove('transformers')
    rows = [('what', 'figure', 'unit', 'note', 'command'), ('---', '---:', '---', '---', '---')]
    for what, flags in BATTERY.items():
        if kind == 'cpu' and re.search('compiled|optimizers', what):
            continue
        takes = rivals if 'train_' in flags and 'modern' not in flags else []
        if 'generate' in flags:
            takes = [name for name in rivals if name == 'transformers']
        words = [*flags.split(), '--real_data=False', *further]
        words += [f'--compare={" ".join(takes)}'] if takes else []
        told, command = run_command(what, words), shlex.join(['python', 'bench.py', *words])
        figures.update({f'{what}: {name}': {**told[name], 'command': command} for name in told})
        for i, name in enumerate(name for name in told if name not in NOT_IN_TABLE):
            value, unit, note = told[name].values()
            told_value = f'{value:,.0f}' if value >= 1000 else f'{value:.2f}'
            rows.append((f'{what}: {name}', told_value, unit, note, '' if i else f'`{command}`'))
    git = f'git -C {shlex.quote(sys.path[0])} rev-parse --short HEAD 2>{os.devnull}'
    print(f'\n{machine()}, torch {torch.__version__}, commit {subprocess.getoutput(git)}\n')
    print('\n'.join(f'| {" | ".join(row)} |' for row in rows))


def run_command(what, words):
    """The figures of a command of this script, run as a process of its own."""
    print(f'  {what} ...', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'figures.json')
        with open(f'{path}.out', 'w+', errors='replace') as f:  # what it starts could hold a pipe
            try:
                subprocess.run(
                    [sys.executable, __file__, *words, f'--json={path}'],
                    stdout=f,
                    stderr=f,
                    timeout=180,
                    check=True,
                )
            except subprocess.SubprocessError as e:
                f.seek(0)
                print(f'  {what}: {type(e).__name__}, {["no word", *f.read().splitlines()][-1]}')
                return {}
        with open(path, encoding='utf-8') as f:
            return load(f)['figures']


def machine():
    """The name of the GPU, or of the CPU and how many threads are used of it."""
    if kind == 'cuda':
        return torch.cuda.get_device_name(device)
    found = re.search('Model name: *(.*)', subprocess.getoutput('lscpu'))
    return f'{found[1] if found else "CPU"}, {torch.get_num_threads()} threads'


{
    'train': bench_train,
    'generate': bench_generate,
    'data': bench_data,
    'optimizer': bench_optimizer,
    'report': bench_report,
}[mode]()
if json:
    with open(json, 'w', encoding='utf-8') as f:
        dump(
            dict(
                command=shlex.join(['python', *sys.argv]),
                device=device,
                machine=machine(),
                dtype=dtype,
                compiled=compile,
                torch=torch.__version__,
                knobs=config,
                figures=figures,
            ),
            f,
            indent=1,
        )
    print(f'wrote {json}')
