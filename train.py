"""
Train a GPT: from scratch, from a checkpoint, or from GPT-2's weights.

On one machine, with or without a GPU:
$ python train.py config/train_shakespeare_char.py
$ python train.py config/train_shakespeare_char.py config/cpu.py --max_iters=500

On 8 GPUs of one machine:
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

from configurator import configure, fail

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'  # folder for checkpoints, log.csv, loss.png and config.py
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between lines of the log
eval_iters = 200  # batches per evaluation of a split, at most the whole split
eval_only = False  # True: evaluate once and exit
save_interval: int | None = None  # iterations between checkpoints, None: eval_interval
always_save_checkpoint = True  # False: also keep the best weights, best.pt, for sampling
keep_checkpoints = 1  # number of latest checkpoints to keep, as ckpt-ITERATION.pt if above 1
init_from = 'scratch'  # or 'resume', 'auto' (resume if possible), a folder, a file, a hub name
# wandb logging
wandb_log = False  # needs the package wandb and a login
wandb_project = 'owt'  # the project that the run belongs to
wandb_run_name = 'gpt2'  # the name of the run
# data
dataset = 'openwebtext'  # a prepared folder of data/
mask_before_token = ''  # learn only what follows this token on a line, such as '='; '': learn all
mask_per_line = True  # False: learn everything after the first mark of a window
align_to_lines = False  # True: windows start at the start of a line
gradient_accumulation_steps = 40  # micro-batches per iteration, summed over all processes
batch_size_warmup_iters = 0  # iterations of linear batch-size warmup, 0: none
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence, the maximum context length
seed = 1337  # of the weights, the data order and dropout
# model (GPT-2 by default; GPTConfig in model.py has newer options)
n_layer = 12  # number of blocks
n_head = 12  # attention heads per block
n_embd = 768  # embedding width
d_head: int | None = None  # width of a head; any two of n_head, n_embd, d_head give the third
d_model: int | None = None  # another name for n_embd
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # biases in Linear and LayerNorm layers; GPT-2 has them
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices in the blocks, AdamW for the rest
learning_rate = 6e-4  # peak rate; with Muon, of biases and norms only
matrix_lr: float | None = None  # Muon's peak rate, None: the default in muon.py
embed_lr: float | None = None  # with Muon, peak rate of the embeddings, None: likewise
head_lr: float | None = None  # with Muon, peak rate of lm_head (and of a tied embedding)
max_iters = 600000  # number of iterations
weight_decay = 1e-1  # of matrices, not of biases and norms
beta1 = 0.9  # AdamW's decay rate of the mean gradient
beta2 = 0.95  # AdamW's decay rate of the mean squared gradient
grad_clip = 1.0  # maximum gradient norm, 0.0: no clipping
max_bad_steps = 20  # stop after this many consecutive steps without finite gradients, 0: never
# learning rate decay
decay_lr = True  # False: constant learning rate
lr_schedule = 'cosine'  # or 'trapezoid': constant, then linear decay
decay_share = 0.6  # fraction of lr_decay_iters over which a trapezoid decays
warmup_iters = 2000  # iterations of linear warmup
lr_decay_iters = 600000  # iteration at which decay ends, about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # final rate, about learning_rate / 10
# early stopping
target_loss = 0.0  # stop at this validation loss, 0.0: never
patience = 0  # stop after this many evaluations without improvement, 0: never
# system
backend = 'auto'  # of torch.distributed: 'nccl' for GPUs, 'gloo' for CPUs
dist_timeout = 600  # process-group timeout in seconds, longer than a save takes
fsdp = False  # True: shard weights and optimizer state over processes (FSDP2)
gradient_checkpointing = False  # True: recompute activations in backward, to save memory
loss_chunk = 0  # compute the loss in chunks of this many positions, to save memory, 0: all at once
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'fast': 'auto', with bfloat16 on CPUs too
compile: bool | str = 'auto'  # torch.compile; 'auto': on GPUs, if the run is long enough
cuda_graph: bool | str = 'auto'  # replay the step as CUDA graphs; 'auto': on a single GPU
config_files = {}
config, given = configure(
    globals(), model='model.py:GPTConfig', from_files=config_files, paths=('out_dir', 'init_from')
)
# -----------------------------------------------------------------------------

# imports come after the settings, so that --help and a mistyped flag do not wait for torch
import math
import os
import shlex

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import muon
from data.lines import read_lines
from data.loader import Loader, must_exist, must_hold
from data.tokenizer import dataset_dir, dataset_meta
from support import checkpoint, distributed, graphs, optimizers, resume, runlog, signals, weights
from support.cpu import seed_dropout
from support.device import autocast, pays_to_compile, resolve, tune
from support.distributed import print0
from support.settings import check_training

# -----------------------------------------------------------------------------
# settings, device and processes
stop = signals.StopSignals()  # true after SIGINT, SIGTERM, SIGHUP or SIGUSR1
save_interval = config['save_interval'] = eval_interval if save_interval is None else save_interval
device, dtype, compile = resolve(device, dtype, compile)
check_training(config, given, device)
tune(device)
ctx = autocast(device, dtype)
rank, world_size = distributed.start(backend, device, dist_timeout, gradient_accumulation_steps)
ddp = torch.distributed.is_initialized()
master_process = rank == 0  # prints, logs and saves
redraws = gradient_checkpointing and dropout > 0  # draws dropout masks in backward
cuda_graph = graphs.can_record(cuda_graph, device, dtype, ddp, redraws)

# -----------------------------------------------------------------------------
# model: new, or from weights
data_dir = dataset_dir(dataset)
train_bin = os.path.join(data_dir, 'train.bin')
must_exist(train_bin)  # before weights are downloaded
meta = dataset_meta(data_dir)  # describes the tokenizer, travels in the checkpoint
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
init_from = resume.where_from(init_from, ckpt_path, config, config_files)  # 'auto' may be 'resume'
torch.manual_seed(seed)
if init_from == 'scratch':
    must_hold(train_bin, block_size)  # before memory is allocated
    model, loaded = weights.new_model(config, given, meta), {}
else:
    model, loaded = weights.trained_model(init_from, ckpt_path, config, given, data_dir)
model.gradient_checkpointing, model.loss_chunk = gradient_checkpointing, loss_chunk
block_size = model.config.block_size
config = {**config, **vars(model.config), 'd_head': None, 'd_model': None}  # each size once

# 'auto' compiles a run that is long enough
start_iter = loaded['iter_num'] if init_from == 'resume' else 0
iters_left = 0 if eval_only else max_iters - start_iter
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
flops = model.flops_per_token() * tokens_per_iter * iters_left / world_size
too_short = compile and config['compile'] == 'auto' and not pays_to_compile(flops)
compile = compile and not too_short
if fsdp:
    distributed.shard(model, device, dtype, compile)
model.to(device)

# data: the batches of an iteration are the same for any number of processes
lines = read_lines(meta, model.config.vocab_size, mask_before_token, mask_per_line, align_to_lines)
inputs = block_size, batch_size, model.config.vocab_size, seed, lines, rank, world_size, device
train_data = Loader(train_bin, *inputs)
val_data = Loader(os.path.join(data_dir, 'val.bin'), *inputs)
if model.config.prefix_lm and not train_data.masked:
    fail('prefix_lm=True needs prompts: --mask_before_token=..., or add --prefix_lm=False')
print0(runlog.describe_data(dataset, train_data, val_data, tokens_per_iter))
notes = compile, too_short, cuda_graph, world_size, fsdp
print0(runlog.describe_model(model, device, dtype, *notes))

# optimizer
scaler = torch.amp.GradScaler(enabled=dtype == 'float16')  # does nothing unless float16
optimizer = optimizers.make_optimizer(model, config, given, device)
iter_num, best, run_id = 0, resume.Best(), None  # run_id: of wandb
if init_from == 'resume':
    resume.load_optimizer(optimizer, scaler, loaded)
    iter_num, best, run_id = resume.where_it_stood(out_dir, loaded, config, only_look=eval_only)
    print0(f'resuming {ckpt_path} at iteration {iter_num}')
del loaded  # frees memory

# compile and wrap; raw_model has the parameter names of checkpoints
raw_model = model
if compile:
    print0('compiling the model, this takes about half a minute ...')
if compile and not fsdp:  # shard() has compiled the blocks
    model = torch.compile(model, dynamic=False)
if ddp and not fsdp:
    device_ids = [torch.device(device).index] if 'cuda' in device else None
    model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)

# -----------------------------------------------------------------------------
# the parts of an iteration. On one GPU each is recorded as a CUDA graph (support/graphs.py), so
# whatever changes between iterations is a tensor that is written in place.
recorded = graphs.Recorder(cuda_graph, report=print0)
loss_sum, divisor = torch.zeros(2, device=device).unbind()
guard = optimizers.StepGuard(model, optimizer, scaler, grad_clip, max_bad_steps, device)
clip_gradients = recorded(guard.clip_gradients)


@recorded
def evaluate(X, Y):
    with ctx:
        return model(X, Y)[1]


@recorded
def add_gradients(X, Y):
    """Forward and backward of one micro-batch."""
    with ctx:
        loss = model(X, Y)[1]  # do not keep the logits alive
        loss = guard.check(train_data.scale_loss(loss, Y) / divisor)
    scaler.scale(loss).backward()
    loss_sum.add_(loss.detach())


@recorded
def step():
    guard.step()  # optimizer.step(), unless a gradient is not finite
    optimizer.zero_grad(set_to_none=not recorded.on)  # a graph needs gradients in place


# helpers
def estimate_loss():
    """Mean loss of both splits over fixed windows, as a dict; None if a signal comes meanwhile."""
    model.eval()
    splits = [data.eval_batches(eval_iters) for data in (train_data, val_data)]
    losses = distributed.mean_losses(evaluate, device, *splits, stop=stop)
    model.train()
    return None if losses is None else dict(zip(('train', 'val'), losses[:, 0].tolist()))


def get_lr(it):
    """Learning rate of iteration `it`: linear warmup, then decay to min_lr at lr_decay_iters."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if lr_schedule == 'trapezoid':
        left = (lr_decay_iters - it) / (decay_share * lr_decay_iters)
        return min_lr + (learning_rate - min_lr) * min(1.0, left)
    done = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def save(name='ckpt.pt'):
    """Write a checkpoint; all ranks call this. Returns False on the master if it failed."""
    state = {'model': raw_model.state_dict()}
    if name == 'ckpt.pt':  # best.pt is for sampling and has no optimizer state
        state['optimizer'] = {**optimizer.state_dict(), 'scaler': scaler.state_dict()}
    state = distributed.gather_state(state, keep=master_process)
    if master_process:
        content = {'model': state['model'], 'model_args': vars(raw_model.config), 'meta': meta}
        content |= {'config': config, 'iter_num': iter_num, **best.as_dict()}
        content['run_id'] = log.run_id or run_id  # wandb's
        path = os.path.join(out_dir, name)
        saved[name] = checkpoint.try_save(path, content, state.get('optimizer'), keep_checkpoints)
    return saved.get(name)


if eval_only:
    print0(runlog.describe_losses(iter_num, estimate_loss()))
    distributed.destroy()
    raise SystemExit

# -----------------------------------------------------------------------------
# loop
log = runlog.RunLog(out_dir, config, iter_num, run_id, raw_model, device, dtype, world_size)
if master_process and init_from != 'resume':
    checkpoint.set_aside(out_dir)
iterations = train_data.iterations(iter_num, gradient_accumulation_steps, batch_size_warmup_iters)
save_due, saved = False, {}  # saved: did the last attempt to write each file succeed?
ended = problem = ''  # why the run ends early; why the exit code is 1
next_command = f'python sample.py --out_dir={shlex.quote(out_dir)}'
while True:
    # all ranks: set the learning rate
    lr = get_lr(iter_num) if decay_lr else learning_rate
    muon.set_rates(optimizer, lr, iter_num)

    # all ranks: evaluate; the master logs and keeps the best weights
    evaluated = iter_num % eval_interval == 0 or iter_num >= max_iters
    losses = estimate_loss() if evaluated else None
    if losses:
        print0(runlog.describe_losses(iter_num, losses))
        keep_best = not always_save_checkpoint and (iter_num > 0 or init_from != 'scratch')
        best.update(losses['val'], iter_num, save if keep_best else None)
        log.evaluation(iter_num, losses, lr)
        ended = best.why_stop(losses['val'], iter_num, target_loss, patience * eval_interval)
    if iter_num >= max_iters or ended:
        if losses and not math.isfinite(losses['val']):
            problem = 'the loss is not finite at the end; the last checkpoint is older'
        elif iter_num > start_iter:
            save()
        break

    # all ranks: accumulate gradients, each over its own micro-batches
    loss_sum.zero_()
    for batch in next(iterations):
        divisor.fill_(batch.divisor)
        seed_dropout(seed, iter_num, batch.number)  # like the data, a function of the iteration
        with distributed.no_sync(model, unless=batch.is_last):
            add_gradients(batch.X, batch.Y)
    clip_gradients()

    # all ranks: save before the step, since these weights have just given a finite loss
    stopping = distributed.any_rank(stop)
    save_due = save_due or (iter_num % save_interval == 0 and iter_num > start_iter)
    if (save_due or stopping) and iter_num > start_iter and not guard.bad:
        save()
        save_due = False
    # a bad step is not saved: go on to a good one, or until max_bad_steps end the run
    if stopping and (not guard.bad or not max_bad_steps):
        ended, next_command = 'stopped: ', 'the same command with --init_from=resume'
        break

    # all ranks: update the weights
    step()

    # all ranks: sum the loss; the master logs. Reading it waits for the device, so not always
    logged = iter_num % log_interval == 0
    if logged:
        loss = distributed.all_reduce(loss_sum).item() / world_size
        log.iteration(iter_num, loss, lr, evaluated, **guard.read())
    problem = guard.problem(log.path, wait=logged)
    if problem:
        break
    iter_num += 1
    stop.nothing_to_lose = False

# cleanup
distributed.destroy()  # all ranks wait here until the master has saved
log.close()
summary = f'{log.seconds():.1f} s of training, best val loss {best.loss:.4f}'
print0(f'{ended}iteration {iter_num}, {summary}')
if os.path.exists(ckpt_path):
    print0(f'next: {next_command}')
problem = checkpoint.not_saved(saved, out_dir) or problem
if problem and master_process:
    fail(problem, 1)
