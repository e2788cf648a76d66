"""
Train a GPT, from scratch, from a checkpoint, or from GPT-2's weights.

On one machine, with or without a GPU:
$ python train.py config/train_shakespeare_char.py
$ python train.py config/train_shakespeare_char.py config/cpu.py --max_iters=500

On 8 GPUs of one machine:
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

On 2 machines, each with its own node_rank:
$ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py --gradient_accumulation_steps=48
"""

from configurator import configure

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out' # checkpoints, log.csv and loss.png go here
eval_interval = 2000 # iterations between two evaluations
log_interval = 1 # iterations between two lines of the log
eval_iters = 200 # batches per evaluation and split; the whole split when it has fewer
eval_only = False # True: evaluate what was loaded and exit
always_save_checkpoint = True # False: save only when the validation loss improves
init_from = 'scratch' # 'scratch', 'resume', 'auto' (resume if there is a checkpoint), 'gpt2*', or a path to fine-tune from
# wandb logging
wandb_log = False # needs the package wandb and a login
wandb_project = 'owt' # the project that runs are filed under
wandb_run_name = 'gpt2' # this run's name
# data
dataset = 'openwebtext' # a folder of data/ that was prepared
gradient_accumulation_steps = 40 # micro-steps per iteration, over all processes together: 5 * 8 GPUs
batch_size = 12 # sequences per micro-step and process
block_size = 1024 # tokens per sequence, the longest context
seed = 1337 # of the weights, the order of the data, and dropout
# model
n_layer = 12 # blocks
n_head = 12 # attention heads per block
n_embd = 768 # width
d_head: int | None = None # width of a head; any sufficient two of n_head, n_embd, d_head will do
d_model: int | None = None # another word for n_embd
dropout = 0.0 # for pretraining 0 is good, for finetuning try 0.1+
bias = False # biases in Linears and LayerNorms, as GPT-2 has them?
# adamw optimizer
learning_rate = 6e-4 # the highest
max_iters = 600000 # iterations in all
weight_decay = 1e-1 # on matrices only
beta1 = 0.9 # decay of the mean gradient
beta2 = 0.95 # decay of the mean squared gradient
grad_clip = 1.0 # largest norm of the gradient, 0.0 for no limit
# learning rate decay
decay_lr = True # False: learning_rate throughout
warmup_iters = 2000 # iterations of linear rise
lr_decay_iters = 600000 # where the cosine ends, about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5 # where it ends, about learning_rate / 10
# system
backend = 'auto' # between processes: 'nccl' for GPUs, 'gloo' for CPUs
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto' # 'float32', 'bfloat16', 'float16'
compile: bool | str = 'auto' # torch.compile: a slow start, then faster steps
config, given = configure(globals()) # from here on the knobs are what files and flags made them

# -----------------------------------------------------------------------------
# imports come after the knobs, so that --help and a mistyped flag answer before torch has loaded
import math
import os
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import checkpoint as ckpt
from data.loader import Loader
from data.tokenizer import GPT2, load_meta
from device import autocast, peak_flops, resolve, tune
from model import GPT, GPTConfig, resolve_sizes
from runlog import RunLog

# -----------------------------------------------------------------------------
# devices and processes
for name in ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size', 'block_size'):
    if config[name] < 1:
        raise ValueError(f'{name}={config[name]} must be at least 1')
if seed < 0:
    raise ValueError(f'seed={seed} must not be negative')
device, dtype, compile = resolve(device, dtype, compile)
tune(device)
ddp = 'RANK' in os.environ # launched by torchrun?
rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master_process = rank == 0 # the one that prints and writes
if gradient_accumulation_steps % world_size:
    fits = [world_size * n for n in (gradient_accumulation_steps // world_size, gradient_accumulation_steps // world_size + 1) if n]
    raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by {world_size} processes; '
                     f'{" or ".join(map(str, fits))} can')
micro_steps = gradient_accumulation_steps // world_size # per process
if ddp:
    if 'cuda' in device:
        torch.cuda.set_device(device)
    if backend == 'auto':
        backend = 'nccl' if 'cuda' in device and dist.is_nccl_available() else 'gloo'
    dist.init_process_group(backend)
ctx = autocast(device, dtype)

def say(text):
    if master_process:
        tqdm.write(text, file=sys.stdout)

# -----------------------------------------------------------------------------
# model
data_dir = os.path.join('data', dataset)
meta_path = os.path.join(data_dir, 'meta.pkl')
meta = load_meta(meta_path) if os.path.exists(meta_path) else GPT2 # travels in the checkpoint
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(os.path.join(out_dir, 'ckpt.pt')) else 'scratch'
iter_num, best_val_loss = 0, float('inf')
torch.manual_seed(seed)
sizes = {name: config[name] if name in given else None for name in ('n_head', 'n_embd', 'd_head', 'd_model')}

if init_from == 'scratch':
    n_head, n_embd = resolve_sizes(**sizes, default=(n_head, n_embd))
    vocab_size = meta['vocab_size'] if 'stoi' in meta else GPTConfig.vocab_size
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
else: # this run's own checkpoint to go on with, or other weights to fine-tune
    model, loaded = ckpt.open_model(os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from, dropout)
    if (loaded.get('meta') or meta) != meta:
        raise ValueError(f'{init_from}: the weights were trained with another vocabulary than that of {data_dir}')
    # the sizes are those of the weights; a flag that asks for others is refused
    asked = {name: config[name] for name in ('n_layer', 'bias') if name in given}
    asked['n_head'], asked['n_embd'] = resolve_sizes(**sizes, default=(model.config.n_head, model.config.n_embd))
    for name, value in asked.items():
        if value != getattr(model.config, name):
            raise ValueError(f'{init_from}: the weights have {name}={getattr(model.config, name)}, you ask for {value}; '
                             f'drop --{name}, or start anew with --init_from=scratch')
    block_size = block_size if 'block_size' in given else model.config.block_size
    if block_size > model.config.block_size:
        raise ValueError(f'{init_from}: the weights have block_size={model.config.block_size}, you ask for {block_size}; lower --block_size')
    model.crop_block_size(block_size)
model.to(device)
config.update(vars(model.config))

# -----------------------------------------------------------------------------
# data: every split is read through the same fixed or counted windows, whatever the number of processes
load_split = lambda split: Loader(os.path.join(data_dir, f'{split}.bin'), block_size, batch_size, model.config.vocab_size, seed)
train_data, val_data = load_split('train'), load_split('val')
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
say(f'{dataset}: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} to validate, '
    f'{tokens_per_iter:,} per iteration')
say(f'model: {model.get_num_params() / 1e6:.2f}M parameters on {device}, {dtype}{", compiled" if compile else ""}'
    f'{f", {world_size} processes" if ddp else ""}')

# -----------------------------------------------------------------------------
# optimizer
scaler = torch.amp.GradScaler(enabled=dtype == 'float16') # does nothing unless float16
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device.partition(':')[0])
if init_from == 'resume':
    ckpt.load_optimizer(optimizer, loaded)
    iter_num, best_val_loss = loaded['iter_num'], float(loaded['best_val_loss'])
    say(f'resuming {loaded["path"]} at iteration {iter_num}')
loaded = None # frees its memory
start_iter = iter_num

# -----------------------------------------------------------------------------
# compile and wrap; raw_model keeps the plain parameter names for checkpoints
raw_model = model
if compile:
    say('compiling the model, this takes a minute ...')
    model = torch.compile(model, dynamic=False)
if ddp:
    model = DDP(model, device_ids=[torch.device(device).index] if 'cuda' in device else None)

# -----------------------------------------------------------------------------
# helpers
@torch.no_grad()
def estimate_loss():
    """Mean loss in nats per token over the same windows of each split every time: all ranks, one reduction."""
    model.eval()
    out = {}
    for split, data in (('train', train_data), ('val', val_data)):
        total = torch.zeros(2, device=device) # sum of losses, number of targets
        for X, Y in data.eval_batches(eval_iters, rank, world_size, device):
            with ctx:
                _, loss = model(X, Y)
            count = (Y >= 0).sum()
            total += torch.stack([loss * count, count])
        if ddp:
            dist.all_reduce(total)
        out[split] = (total[0] / total[1]).item()
    model.train()
    return out

def get_lr(it):
    """Linear warmup, then cosine decay to min_lr at lr_decay_iters (Loshchilov & Hutter 2016)."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    share = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (learning_rate - min_lr)

# -----------------------------------------------------------------------------
# loop
if master_process and not eval_only:
    log = RunLog(out_dir, iter_num, dict(project=wandb_project, name=wandb_run_name, config=config) if wandb_log else None)
    bar = tqdm(total=max_iters, initial=iter_num, desc='training', unit='it', dynamic_ncols=True,
               disable=not (sys.stdout.isatty() and sys.stderr.isatty())) # plain lines into files and pipes
batches = train_data.train_batches(iter_num, micro_steps, rank, world_size, device)
peak = peak_flops(device, dtype)
t_start = t_log = time.time()
steps_since_log = 0
model.train()
while True:

    # every rank sets the learning rate of this iteration
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr

    # every rank evaluates its share of the windows; the master writes it down and saves
    if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
        losses = estimate_loss()
        say(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        improved = losses['val'] < best_val_loss
        best_val_loss = min(best_val_loss, losses['val'])
        if master_process and not eval_only:
            log.row(time.time() - t_start, iter=iter_num, train_loss=losses['train'], val_loss=losses['val'], lr=lr)
            log.picture(final=iter_num >= max_iters)
            if iter_num > start_iter and (improved or always_save_checkpoint):
                ckpt.save(os.path.join(out_dir, 'ckpt.pt'), {
                    'model': raw_model.state_dict(),
                    'model_args': vars(raw_model.config),
                    'iter_num': iter_num,
                    'best_val_loss': best_val_loss,
                    'config': config,
                    'meta': meta,
                }, optimizer.state_dict())
        t_log, steps_since_log = time.time(), 0 # the log's speed is that of training alone
    if iter_num >= max_iters or eval_only:
        break

    # every rank adds up the gradients of its micro-steps; DDP averages them over ranks at the last one
    for micro_step in range(micro_steps):
        if raw_model.config.dropout > 0.0: # dropout, like the data, is a function of the iteration
            torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, micro_step, rank)).generate_state(1)[0]))
        X, Y = next(batches)
        last = micro_step == micro_steps - 1
        with nullcontext() if last or not ddp else model.no_sync():
            with ctx:
                _, loss = model(X, Y)
                loss = loss / micro_steps
            scaler.scale(loss).backward()

    # every rank takes the same step
    if grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    steps_since_log += 1

    # the master logs; .item() waits for the device, so it stands only here
    if master_process and iter_num % log_interval == 0:
        lossf = loss.item() * micro_steps # of the last micro-step, before the step
        dt = (time.time() - t_log) / steps_since_log # seconds per iteration
        mfu = raw_model.estimate_mfu(gradient_accumulation_steps * batch_size, dt, peak * world_size) if peak else None
        log.row(time.time() - t_start, iter=iter_num, loss=lossf, lr=lr, tokens_per_second=tokens_per_iter / dt, mfu=mfu)
        speed = f'{tokens_per_iter / dt:,.0f} tok/s' + (f', mfu {mfu * 100:.1f}%' if mfu else '')
        if bar.disable:
            print(f'iter {iter_num}: loss {lossf:.4f}, {dt * 1000:.2f} ms, {speed}', flush=True)
        bar.set_postfix_str(f'loss {lossf:.4f}, {speed}', refresh=False)
        t_log, steps_since_log = time.time(), 0
    iter_num += 1
    if master_process:
        bar.update(1)

# -----------------------------------------------------------------------------
# cleanup
if master_process and not eval_only:
    bar.close()
    say(f'trained to iteration {iter_num} in {time.time() - t_start:.1f} s, best val loss {best_val_loss:.4f}; '
        f'next: python sample.py --out_dir={out_dir}')
if ddp:
    dist.destroy_process_group()
