"""
How fast does this machine train, and write? Times the step of train.py, or the generation of sample.py, and sets it
beside what the machine can do.

$ python bench.py config/train_shakespeare_char.py config/cpu.py
$ python bench.py config/train_gpt2.py --real_data=False
$ python bench.py config/train_shakespeare_char.py --profile=True    # writes trace.json for chrome://tracing
$ python bench.py config/train_shakespeare_char.py config/cpu.py --guards=True --steps=300    # what the safety of a run costs
$ python bench.py --mode=generate    # GPT-2's size, random weights
"""

from configurator import at_least, configure, one_of, read_knobs

# -----------------------------------------------------------------------------
# what to time
mode = 'train' # or 'generate'
steps = 20 # measured steps; the figures are medians over them
warmup_steps = 5 # unmeasured ones before, compilation included
real_data = True # False: random tokens, so that nothing need be prepared
guards = False # True: also alternate steps with and without train.py's checks for bad gradients, signals, and its log
profile = False # True: also write trace.json with torch's profiler
prompt_tokens = 16 # to generate: tokens that are there before
new_tokens = 64 # to generate: tokens to make
# data
dataset = 'openwebtext' # a folder of data/ that was prepared
batch_size = 12 # sequences per step
block_size = 1024 # tokens per sequence
seed = 1337 # of weights and data
# model
n_layer = 12 # blocks
n_head = 12 # attention heads per block
n_embd = 768 # width
dropout = 0.0 # costs time too
bias = False # biases in Linears and LayerNorms
# optimizer
optimizer = 'adamw' # or 'muon', whose step is then also timed beside torch's own
# system
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto' # 'float32', 'bfloat16', 'float16', or 'fast': as 'auto', but bfloat16 on CPUs that multiply it faster
compile: bool | str = 'auto' # torch.compile
config, given = configure(globals(), model='model.py:GPTConfig', also=('train.py',)) # a training recipe tells the sizes

# -----------------------------------------------------------------------------
import itertools
import os
import statistics
import tempfile
import time
from functools import partial

import torch

import muon
from data.loader import Loader
from data.tokenizer import dataset_meta, model_vocab_size
from device import DTYPES, autocast, memory_gb, peak_flops, resolve, tune
from generate import stream
from model import GPT, GPTConfig
from ops import Linear, pack
from parallel import any_rank
from runlog import RunLog

at_least(config, 1, 'steps', 'prompt_tokens', 'new_tokens')
one_of(config, optimizer=('adamw', 'muon'), mode=('train', 'generate'))
device, dtype, compile = resolve(device, dtype, compile)
tune(device)
torch.manual_seed(seed)
ctx = autocast(device, dtype)

def clock():
    """Seconds, once the device has done all it was given."""
    if device != 'cpu':
        getattr(torch, device.partition(':')[0]).synchronize()
    return time.perf_counter()

# -----------------------------------------------------------------------------
# generation: every token reads all weights once, so the speed of a matrix times a vector is its ceiling
@torch.inference_mode()
def matvec_bandwidth(size=2**26, repeats=20):
    """Bytes/s at which this machine multiplies a matrix that no cache holds by a vector: torch's own way, and the fastest of ours on two shapes."""
    speeds = []
    for rows, cols in ((8192, size // 8192), (65536, size // 65536)):
        layer, x = Linear(cols, rows, bias=False, device=device, dtype=DTYPES[dtype]), torch.randn(1, cols, device=device).to(DTYPES[dtype])
        own = layer.weight.detach()
        if device == 'cpu':
            pack(layer)
        for product in (lambda: own @ x[0], lambda: layer(x)):
            t = clock()
            for _ in range(repeats): # a GPU is asked for the time once
                product()
            speeds.append(repeats * own.nbytes / (clock() - t))
    return speeds[0], max(speeds)

def theirs():
    """transformers' GPT-2 of the same shape with random weights, None for networks that are not GPT-2's (but for biases)."""
    plain = read_knobs('model.py:GPTConfig')
    if any(repr(globals()[name]) != plain[name].default for name in
           ('pos', 'norm', 'activation', 'qk_norm', 'tie_embeddings', 'embed_norm', 'logit_cap', 'n_kv_head')):
        return None
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size, bos_token_id=0, eos_token_id=None)
    return GPT2LMHeadModel(GPT2Config(**sizes)).to(device, DTYPES[dtype]).eval()

if mode == 'generate':
    if prompt_tokens + new_tokens > block_size:
        raise ValueError(f'prompt_tokens={prompt_tokens} and new_tokens={new_tokens} do not fit block_size={block_size}')
    sizes = GPTConfig(**{name: globals()[name] for name in GPTConfig.__dataclass_fields__})
    models = {'plain': GPT(sizes).to(device, DTYPES[dtype]).eval()}
    num_params = models['plain'].get_num_params()
    if device == 'cpu': # as sample.py does
        for rows in (1, 16):
            models[rows] = GPT(sizes).to(DTYPES[dtype]).eval()
            pack(models[rows], rows)
        models['int8'] = GPT(sizes).bfloat16().eval()
        pack(models['int8'], int8=True)
    prompt, other = torch.randint(vocab_size, (1, prompt_tokens), device=device), theirs()
    made = lambda B, name=None, **options: list(stream(models.get(name or B, models['plain']), prompt.tolist(), new_tokens, range(B), temperature=0, **options))
    step = torch.compile(models['plain'], dynamic=False, mode='reduce-overhead' if 'cuda' in device else None) if compile else None
    rivals = {'flatgpt, batch 1': (1, lambda: made(1)), 'flatgpt, batch 16': (16, lambda: made(16)),
              **({'flatgpt, int8, batch 1': (1, lambda: made(1, 'int8'))} if device == 'cpu' else {}),
              **({f'flatgpt, compiled, batch {B}': (B, partial(made, B, 'plain', compiled=step)) for B in (1, 16)} if compile else {}),
              'recomputing the context, batch 1': (1, lambda: recompute()),
              **({'transformers, batch 1': (1, lambda: other.generate(prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0))} if other else {})}

    @torch.inference_mode()
    def recompute():
        ids = prompt
        for _ in range(new_tokens):
            ids = torch.cat([ids, models['plain'](ids[:, -block_size:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)

    seconds, bandwidths = {name: [] for name in rivals}, []
    for i in range(1 + steps): # all in turn; the first round warms up
        bandwidths.append(matvec_bandwidth())
        for name, (_, run) in rivals.items():
            t = clock()
            run()
            seconds[name].append(clock() - t)
    read = num_params * DTYPES[dtype].itemsize
    own, best = map(statistics.median, zip(*bandwidths[1:]))
    ceiling = best / read
    print(f'{num_params / 1e6:.1f}M parameters on {device}, {dtype}; {prompt_tokens} tokens of prompt, {new_tokens} new ones, median of {steps}')
    print(f'  {"ceiling of batch 1":<34} {ceiling:8.1f} tokens/s   (a matrix times a vector: {best / 1e9:.1f} GB/s; by torch.mv {own / 1e9:.1f} GB/s, {own / read:.1f} tokens/s)')
    for name, (B, _) in rivals.items():
        speeds = sorted(B * new_tokens / each for each in seconds[name][1:])
        speed = statistics.median(speeds)
        print(f'  {name:<34} {speed:8.1f} tokens/s   ({speeds[0]:.1f} to {speeds[-1]:.1f})' + (f', {speed / ceiling:.0%} of the ceiling' if B == 1 else ''))
    raise SystemExit

# -----------------------------------------------------------------------------
# data and model
if real_data:
    data_dir = os.path.join('data', dataset)
    meta = dataset_meta(data_dir)
    vocab_size = vocab_size if 'vocab_size' in given else model_vocab_size(meta)
    batches = Loader(os.path.join(data_dir, 'train.bin'), block_size, batch_size, vocab_size, seed).train_batches(itertools.count(), device)
else:
    X, Y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
    batches = iter(lambda: (X, Y), None)
raw_model = model = GPT(GPTConfig(**{name: globals()[name] for name in GPTConfig.__dataclass_fields__})).to(device)
settings = 0.1, 1e-4, (0.9, 0.95), device.partition(':')[0]
rates = dict.fromkeys(('matrix_lr', 'embed_lr', 'head_lr'))
optimizer = model.configure_optimizers(*settings) if optimizer == 'adamw' else muon.configure(model, rates, *settings)
scaler = torch.amp.GradScaler(enabled=dtype == 'float16')
if compile:
    model = torch.compile(model, dynamic=False)

# -----------------------------------------------------------------------------
# the step, with a clock between its parts
def step(guarded=False):
    """One training step: seconds of data, forward, backward, optimizer (in it most of the guards, as in train.py)."""
    global bad_in_row, clipped
    ticks = [clock()]
    X, Y = next(batches)
    ticks.append(clock())
    with ctx:
        _, loss = model(X, Y)
        if guarded:
            loss = loss * (1 + 0 * loss.detach())
    ticks.append(clock())
    scaler.scale(loss).backward()
    ticks.append(clock())
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
    if guarded:
        bad = (~grad_norm.isfinite()).float()
        bad_in_row, clipped = (bad_in_row + 1) * bad, clipped + (grad_norm > 1.0)
        optimizer.found_inf = bad
        any_rank(False)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if guarded: # a row of the log at every step
        log.row(iter=0, tokens=0, loss=loss.item(), lr=1e-4, grad_norm=grad_norm.item(), clipped=clipped.item(), bad_steps=int(bad_in_row),
                tokens_per_second=0.0, memory_gb=memory_gb(device))
        vars(optimizer).pop('found_inf', None) # the scaler of float16 takes it away itself
    ticks.append(clock())
    return [b - a for a, b in zip(ticks, ticks[1:])]

def matmul_ceiling(n=2048, repeats=10):
    """FLOP/s of a large square matmul in the dtype of the run: the honest ceiling of this machine, now."""
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[dtype])
    seconds = []
    for _ in range(repeats):
        t = clock()
        a @ b
        seconds.append(clock() - t)
    return 2 * n**3 / statistics.median(seconds)

def muon_steps(matrices):
    """Median seconds of a step of our Muon and of torch's, alternating, with gradients like those of training."""
    pair = muon.Muon([dict(params=matrices, muon=True, momentum=0.95, steps=0)], fused=False), torch.optim.Muon(matrices)
    grads, seconds = [torch.randn_like(p) for p in matrices], ([], [])
    for i in range(warmup_steps + steps):
        for each, optimizer in zip(seconds, pair):
            for p, grad in zip(matrices, grads):
                p.grad = grad.clone()
            t = clock()
            optimizer.step()
            each.append(clock() - t)
    return [statistics.median(each[warmup_steps:]) for each in seconds]

# -----------------------------------------------------------------------------
t = clock()
for _ in range(warmup_steps):
    step()
print(f'{raw_model.get_num_params() / 1e6:.2f}M parameters on {device}, {dtype}{", compiled" if compile else ""}; '
      f'{warmup_steps} steps of warmup took {clock() - t:.1f} s')
parts = [step() for _ in range(steps)]
totals = sorted(map(sum, parts))
dt = statistics.median(totals)
for name, seconds in zip(('data', 'forward', 'backward', 'optimizer'), zip(*parts)):
    print(f'  {name:<10} {statistics.median(seconds) * 1000:9.2f} ms')
print(f'  step       {dt * 1000:9.2f} ms   (median of {steps}, {totals[0] * 1000:.2f} to {totals[-1] * 1000:.2f})')
print(f'  {batch_size * block_size / dt:,.0f} tokens/s')
ceiling = matmul_ceiling()
print(f'  {raw_model.estimate_mfu(batch_size, dt, ceiling) * 100:.1f}% of a 2048 x 2048 matmul on this machine now ({ceiling / 1e12:.3f} TFLOP/s)')
if peak_flops(device, dtype):
    print(f'  {raw_model.estimate_mfu(batch_size, dt, peak_flops(device, dtype)) * 100:.1f}% MFU (data sheet: {peak_flops(device, dtype) / 1e12:.0f} TFLOP/s)')
if isinstance(optimizer, muon.Muon):
    matrices = next(group['params'] for group in optimizer.param_groups if group.get('muon'))
    ours, theirs = muon_steps(matrices)
    print(f'  muon       {ours * 1000:9.2f} ms   ({ours / dt * 100:.0f}% of the step; torch.optim.Muon on the same {len(matrices)} matrices: {theirs * 1000:.2f} ms)')
if guards:
    bad_in_row, clipped = torch.zeros(2, device=device)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(folder, config, quiet=False)
        log.bar.disable = True
        plain, guarded = zip(*((sum(step()), sum(step(guarded=True))) for _ in range(steps)))
    plain, guarded = statistics.median(plain), statistics.median(guarded)
    print(f'  guards     {(guarded - plain) * 1000:9.2f} ms   ({(guarded / plain - 1) * 100:+.2f}% of {plain * 1000:.2f} ms, medians of {steps} alternating pairs)')
if profile:
    with torch.profiler.profile() as trace:
        step()
    trace.export_chrome_trace('trace.json')
    print(trace.key_averages().table(sort_by='self_cpu_time_total' if device == 'cpu' else 'self_device_time_total', row_limit=12, max_name_column_width=40))
    print('wrote trace.json; open it in chrome://tracing or ui.perfetto.dev')
