"""
Train a GPT, from scratch, from a checkpoint, or from GPT-2's weights.

On one machine, with or without a GPU:
$ python train.py config/train_shakespeare_char.py
$ python train.py config/train_shakespeare_char.py config/cpu.py --max_iters=500

On 8 GPUs of one machine:
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

from configurator import check, configure, fail

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'  # checkpoints, log.csv, loss.png and config.py go here
eval_interval = 2000  # iterations between two evaluations
log_interval = 1  # iterations between two lines of the log
eval_iters = 200  # batches per evaluation and split; the whole split when it has fewer
eval_only = False  # True: evaluate what was loaded and exit
save_interval: int | None = (
    None  # iterations between two checkpoints, None: as often as evaluations
)
always_save_checkpoint = (
    True  # False: beside the last checkpoint keep the best, best.pt, for sampling
)
keep_checkpoints = 1  # how many of the latest to keep, as ckpt-ITERATION.pt when more than one
init_from = 'scratch'  # 'resume', 'auto' (resume if there is a run, else as the recipe says), or weights: a folder, a file, a hub name
# wandb logging
wandb_log = False  # needs the package wandb and a login
wandb_project = 'owt'  # the project that runs are filed under
wandb_run_name = 'gpt2'  # this run's name
# data
dataset = 'openwebtext'  # a folder of data/ that was prepared
mask_before_token = ''  # '=' for lines such as 12+3=15: only what follows it on its line is learned; '': every token
mask_per_line = True  # False: all that follows a window's first mark is learned
align_to_lines = False  # True: sequences begin where lines do
gradient_accumulation_steps = (
    40  # micro-batches per iteration, of all processes together: 5 on each of 8 GPUs
)
batch_size_warmup_iters = 0  # iterations in which these grow linearly to all, 0: all from the start
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence, the longest context
seed = 1337  # of the weights, the order of the data, and dropout
# model, as GPT-2; GPTConfig in model.py has the knobs of newer architectures (pos, norm, activation, ...)
n_layer = 12  # blocks
n_head = 12  # attention heads per block
n_embd = 768  # width
d_head: int | None = None  # width of a head; two of n_head, n_embd, d_head give the third
d_model: int | None = None  # the same as n_embd
dropout = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
bias = False  # biases in Linears and LayerNorms; True: as GPT-2 has them
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices in the blocks, AdamW for the rest
learning_rate = (
    6e-4  # the highest; with muon that of biases and norms alone, the rest have the three below
)
matrix_lr: float | None = (
    None  # muon's: of the matrices in the blocks, None: see configure() in muon.py
)
embed_lr: float | None = (
    None  # beside muon: of wte and wpe, unless wte is tied to the head; None: as there
)
head_lr: float | None = (
    None  # beside muon: of lm_head, and of wte and wpe if tied to it; None: as there
)
max_iters = 600000  # iterations in all
weight_decay = 1e-1  # on matrices only
beta1 = 0.9  # how much of the running mean of gradients AdamW keeps each step
beta2 = 0.95  # the same of squared gradients
grad_clip = 1.0  # largest norm of the gradient, 0.0 for no limit
max_bad_steps = 20  # stop after so many steps in a row without a finite loss and gradient, 0: never
# learning rate decay
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'cosine'  # or 'trapezoid': constant, then linear to min_lr over the last decay_share of lr_decay_iters
decay_share = (
    0.6  # share of lr_decay_iters over which a trapezoid falls, 1.0: straight down from the start
)
warmup_iters = 2000  # iterations of linear rise
lr_decay_iters = (
    600000  # the iteration at which the decay ends, about max_iters (Hoffmann et al. 2022)
)
min_lr = 6e-5  # the rate it ends at, about learning_rate / 10
# when to stop before max_iters
target_loss = 0.0  # at this validation loss, 0.0: never
patience = 0  # after so many evaluations without a better one, 0: never
# system
backend = 'auto'  # between processes: 'nccl' for GPUs, 'gloo' for CPUs
dist_timeout = 600  # seconds without an answer after which another process is given up; longer than a save takes
fsdp = False  # True: share weights and optimizer state between processes (FSDP2), for models larger than a GPU
gradient_checkpointing = (
    False  # True: recompute activations in backward, a third more work for less memory
)
loss_chunk = 0  # positions whose logits are computed at a time, 0: all; less memory with large vocabularies, for one more product with the head
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16', or 'fast': as 'auto', but bfloat16 on CPUs that multiply it faster
compile: bool | str = (
    'auto'  # torch.compile: half a minute's wait, then faster steps; 'auto': on GPUs, for runs that earn the wait back
)
cuda_graph: bool | str = 'auto'  # record the step as CUDA graphs and replay it; 'auto': on one GPU
config, given = configure(
    globals(), model='model.py:GPTConfig', of_files=(of_files := {}), paths=('out_dir', 'init_from')
)  # now the knobs are what files and flags made them

# -----------------------------------------------------------------------------
# imports come after the knobs, so that --help and a mistyped flag answer before torch has loaded
import math
import os
import shlex

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_

import muon
from data.lines import read_lines
from data.loader import Loader, indices, micro_batches, must_exist, must_hold
from data.tokenizer import dataset_dir, dataset_meta
from support import checkpoint as ckpt
from support import distributed as parallel
from support import resume, weights
from support.cpu import seed_dropout
from support.device import autocast, memory_gb, pays_to_compile, peak_flops, resolve, tune
from support.distributed import print0
from support.graphs import Recorder, can_record
from support.runlog import RunLog, health, perplexity
from support.signals import StopSignals

# -----------------------------------------------------------------------------
# refuse knobs that make no sense
save_interval = config['save_interval'] = eval_interval if save_interval is None else save_interval
check(
    config,
    'eval_interval save_interval log_interval eval_iters keep_checkpoints dist_timeout',
    least=1,
)
check(config, 'gradient_accumulation_steps batch_size block_size', least=1)
check(
    config,
    'max_bad_steps batch_size_warmup_iters patience loss_chunk warmup_iters max_iters lr_decay_iters',
    least=0,
)
check(config, 'learning_rate min_lr weight_decay grad_clip matrix_lr embed_lr head_lr', least=0)
check(config, 'beta1 beta2', least=0, below=1)
check(config, 'decay_share', above=0)
check(config, 'seed', least=0, most=2**63 - 1)
check(config, 'optimizer', choices=('adamw', 'muon'))
check(config, 'lr_schedule', choices=('cosine', 'trapezoid'))
check(config, 'backend', choices=('auto', 'nccl', 'gloo'))
if optimizer != 'muon' and any(
    given.get(name, '').startswith('--') for name in ('matrix_lr', 'embed_lr', 'head_lr')
):
    raise ValueError(
        f'matrix_lr, embed_lr and head_lr are of --optimizer=muon (config/modern.py); {optimizer} has --learning_rate'
    )
if decay_lr and min_lr > learning_rate:
    raise ValueError(
        f'min_lr={min_lr} is more than learning_rate={learning_rate}; add --min_lr={learning_rate / 10:g}'
    )

# -----------------------------------------------------------------------------
# devices and processes
stop = StopSignals()  # true once SIGINT, SIGTERM, SIGHUP or SIGUSR1 has come
compile_auto = compile == 'auto'
device, dtype, could_compile = resolve(device, dtype, compile)
redraws = gradient_checkpointing and bool(
    dropout or attn_dropout
)  # backward draws dropout masks again
if redraws and 'mps' in device:
    raise ValueError(
        'gradient_checkpointing would draw other dropout masks in backward on MPS; add --dropout=0.0 --attn_dropout=0.0'
    )
tune(device)
ctx = autocast(device, dtype)
rank, world_size = parallel.start(
    backend, device, dist_timeout, gradient_accumulation_steps
)  # 0, 1 without torchrun
ddp = dist.is_initialized()  # launched by torchrun?
master_process = rank == 0  # the one that prints and writes
cuda_graph = can_record(cuda_graph, device, dtype, ddp, redraws)

# -----------------------------------------------------------------------------
# model
data_dir = dataset_dir(dataset)
must_exist(os.path.join(data_dir, 'train.bin'))  # before weights are fetched for nothing
meta = dataset_meta(data_dir)  # of its tokenizer, travels in the checkpoint
own = os.path.join(out_dir, 'ckpt.pt')  # this run's
init_from = resume.where_from(
    init_from, own, config, of_files
)  # 'auto', and a restart by torchrun after a fault, may mean 'resume'
torch.manual_seed(seed)
if init_from == 'scratch':
    must_hold(
        os.path.join(data_dir, 'train.bin'), block_size
    )  # before memory is taken for so long a context
    model, loaded = weights.new_model(config, given, meta), {}
else:  # this run's own checkpoint, or other weights to fine-tune
    model, loaded = weights.trained_model(init_from, own, config, given, data_dir)
model.gradient_checkpointing, model.loss_chunk = gradient_checkpointing, loss_chunk
block_size = model.config.block_size
tokens_per_micro_batch = batch_size * block_size
start_iter = loaded['iter_num'] if init_from == 'resume' else 0
tokens_left = (
    0
    if eval_only
    else (max_iters - start_iter) * gradient_accumulation_steps * tokens_per_micro_batch
)
short = compile_auto and not pays_to_compile(tokens_left * model.flops_per_token() / world_size)
compile = could_compile and not short
if fsdp:
    parallel.shard(model, device, dtype, compile)
model.to(device)
knobs = {
    **config,
    **vars(model.config),
    'd_head': None,
    'd_model': None,
}  # as they turned out, each size once

# -----------------------------------------------------------------------------
# data: every split is read through the same fixed or counted windows, whatever the number of processes
lines = read_lines(meta, model.config.vocab_size, mask_before_token, mask_per_line, align_to_lines)
load_split = lambda split: Loader(
    os.path.join(data_dir, f'{split}.bin'),
    block_size,
    batch_size,
    model.config.vocab_size,
    seed,
    lines,
)
train_data, val_data = load_split('train'), load_split('val')
print0(
    f'{dataset}: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} to validate, '
    f'{gradient_accumulation_steps * batch_size * block_size:,} per iteration'
    + (
        f', {train_data.targets / batch_size / block_size:.1%} of them targets that count'
        if train_data.masked
        else ''
    )
)
print0(
    f'model: {model.get_num_params() / 1e6:.2f}M parameters on {device}, {dtype}'
    + ', compiled' * compile
    + ', not compiled since the run is short' * (could_compile and short)
    + ', recorded as CUDA graphs' * cuda_graph
    + (
        f', {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f}M of them trained'
        if model.config.lora_rank
        else ''
    )
    + f', {world_size} processes' * ddp
    + ', sharded' * fsdp
)

# -----------------------------------------------------------------------------
# optimizer, and where the run stands
scaler = torch.amp.GradScaler(enabled=dtype == 'float16')  # does nothing unless float16
settings = weight_decay, learning_rate, (beta1, beta2), device.partition(':')[0]
optimizer = (
    muon.configure(model, config, *settings, given)
    if optimizer == 'muon'
    else model.configure_optimizers(*settings)
)
for group in optimizer.param_groups:
    group['capturable'] = (
        'cuda' in device
    )  # rates and step counts are tensors, as a CUDA graph needs them
iter_num, best_val_loss, best_iter, best_file, run_id = (
    0,
    float('inf'),
    0,
    None,
    None,
)  # best_file: of the best weights; run_id: wandb's
if init_from == 'resume':
    resume.load_optimizer(optimizer, scaler, loaded)
    iter_num, best_val_loss, best_iter, best_file, run_id = resume.where_it_stood(
        out_dir, loaded, knobs, only_look=eval_only
    )
    print0(f'resuming {own} at iteration {iter_num}')
loaded = None  # frees its memory

# -----------------------------------------------------------------------------
# compile and wrap; raw_model keeps the plain parameter names for checkpoints
raw_model = model
if compile:
    print0('compiling the model, this takes a minute ...')
    model = model if fsdp else torch.compile(model, dynamic=False)
if ddp and not fsdp:
    model = DDP(
        model,
        device_ids=[torch.device(device).index] if 'cuda' in device else None,
        gradient_as_bucket_view=True,
    )

# -----------------------------------------------------------------------------
# the parts of an iteration. On one GPU each is recorded as a CUDA graph and replayed (Recorder in device.py), so what they
# share stands in tensors that are written in place
recorded = Recorder(cuda_graph, report=print0)
loss_sum, divisor, grad_norm, bad, bad_in_row, bad_steps, clipped = torch.zeros(
    7, device=device
).unbind()
optimizer.found_inf = (
    bad  # 1: AdamW's fused kernel leaves weights and state alone, and nothing waits for the GPU
)


@recorded
def evaluate(X, Y):
    with ctx:
        return model(X, Y)[1]


@recorded
def add_gradients(X, Y):
    """Forward and backward of a micro-batch; DDP and FSDP average gradients over ranks at the last one."""
    with ctx:
        loss = model(X, Y)[1]  # no name holds the logits on
        loss = train_data.scale_loss(loss, Y) / divisor  # where not all targets count
        loss = loss * (
            1 + 0 * loss.detach()
        )  # an infinite loss can have a finite gradient: make it nan on all ranks
    scaler.scale(loss).backward()
    loss_sum.add_(loss.detach())


@recorded
def clip_gradients():
    """Clip them; a norm that is not finite, which is the same on all ranks, makes the step a bad one."""
    scaler.unscale_(optimizer)
    grad_norm.copy_(parallel.gather(clip_grad_norm_(model.parameters(), grad_clip or math.inf)))
    bad.copy_(~grad_norm.isfinite())
    bad_in_row.add_(1).mul_(bad)
    bad_steps.add_(bad)  # since the last log
    clipped.add_(grad_norm > (grad_clip or math.inf))


@recorded
def step():
    if not ('mps' in device and bad):  # MPS's kernel ignores found_inf
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not recorded.on)  # a graph adds to gradients that stay in place


# -----------------------------------------------------------------------------
# helpers
def estimate_loss():
    """Mean loss in nats per token over fixed windows of each split: all ranks, one reduction. None if a signal came meanwhile."""
    model.eval()
    batches = [
        data.eval_batches(eval_iters, rank, world_size, device) for data in (train_data, val_data)
    ]
    losses = parallel.mean_losses(evaluate, device, *batches, stop=stop)
    model.train()
    return None if losses is None else dict(zip(('train', 'val'), losses[:, 0].tolist()))


def get_lr(it):
    """Linear warmup, then to min_lr at lr_decay_iters: by a cosine (Loshchilov & Hutter 2016), or level and then straight down."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if lr_schedule == 'trapezoid':
        return min_lr + (learning_rate - min_lr) * min(
            1.0, (lr_decay_iters - it) / (decay_share * lr_decay_iters)
        )
    share = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (learning_rate - min_lr)


def save(name='ckpt.pt'):
    """Write the run as it stands before the step of iter_num; all ranks call it, the master writes and tells whether it could."""
    state = {'model': raw_model.state_dict()}
    if name == 'ckpt.pt':  # best.pt is for sampling and goes without
        state['optimizer'] = {**optimizer.state_dict(), 'scaler': scaler.state_dict()}
    state = parallel.gather_state(state, keep=master_process)
    if master_process:
        checkpoint = dict(
            model=state['model'],
            model_args=vars(raw_model.config),
            meta=meta,
            config=knobs,
            iter_num=iter_num,
            best_val_loss=best_val_loss,
            best_iter=best_iter,
            best_file=best_file,
            run_id=log.run_id or run_id,
        )
        saved[name] = ckpt.try_save(
            os.path.join(out_dir, name), checkpoint, state.get('optimizer'), keep_checkpoints
        )
    return saved.get(name)


# -----------------------------------------------------------------------------
# loop
growth = gradient_accumulation_steps, batch_size_warmup_iters  # of the batch
batches = train_data.train_batches(indices(iter_num, *growth, rank, world_size), device)
if not eval_only:
    log = RunLog(
        out_dir,
        knobs,
        iter_num,
        micro_batches(iter_num, *growth)[0] * tokens_per_micro_batch,
        run_id,
        quiet=not master_process,
    )
    if master_process and init_from != 'resume':
        ckpt.set_aside(out_dir)
peak_speed = (
    world_size * (peak_flops(device, dtype) or 0) / raw_model.flops_per_token()
)  # tokens/s of an MFU of 1, 0 where unknown
save_due, saved = False, {}  # is a save due; whether each file took what was last written to it
ended = problem = ''  # why the run ends early; what makes its exit code 1
next_command = f'python sample.py --out_dir={shlex.quote(out_dir)}'  # what to type after the run
while True:
    # every rank sets the learning rate and the number of micro-batches of this iteration
    lr = get_lr(iter_num) if decay_lr else learning_rate
    muon.set_rates(optimizer, lr, iter_num)
    first, count = micro_batches(iter_num, *growth)
    micro_steps = -(-count // world_size)  # of this rank, a micro-batch each; rounded up

    # every rank evaluates its share of the windows; the master writes it down and keeps the best
    evaluated = iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only
    losses = estimate_loss() if evaluated else None
    if losses:  # no signal came meanwhile
        print0(
            f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f} (perplexity {perplexity(losses["val"]):.2f})'
        )
        if losses['val'] < best_val_loss:
            before = best_val_loss, best_iter, best_file
            best_val_loss, best_iter = losses['val'], iter_num
            best_file = (
                'best.pt'
                if (iter_num > 0 or init_from != 'scratch')
                and not always_save_checkpoint
                and not eval_only
                else None
            )
            if best_file and not parallel.broadcast(save(best_file)):
                best_val_loss, best_iter, best_file = before  # the file holds that one still
        if not eval_only:
            log.evaluation(
                iter_num,
                first * tokens_per_micro_batch,
                train_loss=losses['train'],
                val_loss=losses['val'],
                lr=lr,
            )
        if losses['val'] <= target_loss:
            ended = f'val loss {losses["val"]:.4f} reached target_loss={target_loss}: '
        elif patience and iter_num - best_iter >= patience * eval_interval:
            ended = f'no better val loss since iteration {best_iter}: '
    if iter_num >= max_iters or eval_only or ended:
        if losses and not math.isfinite(losses['val']):
            problem = 'the loss is not finite at the end; the last checkpoint is older'
        elif iter_num > start_iter:
            save()
        break

    # every rank adds up the gradients of its micro-steps
    loss_sum.zero_()
    for micro_step in range(micro_steps):
        number = micro_step * world_size + rank  # of this micro-batch within the iteration
        divisor.fill_(
            count / world_size if number < count else math.inf
        )  # beyond the last micro-batch: adds nothing
        seed_dropout(seed, iter_num, number)  # like the data, it is a function of the iteration
        X, Y = next(batches)
        with parallel.no_sync(model, on=micro_step == micro_steps - 1):
            add_gradients(X, Y)
    clip_gradients()

    # all ranks save, before the step: these weights have just shown a finite loss and gradient
    stopping = parallel.any_rank(stop)
    save_due = save_due or (iter_num % save_interval == 0 and iter_num > start_iter)
    if (save_due or stopping and iter_num > start_iter) and not bad:
        save()
        save_due = False
    if stopping and (not bad or not max_bad_steps):
        ended, next_command = 'stopped: ', 'the same command with --init_from=resume'
        break

    # every rank takes the same step
    logged = iter_num % log_interval == 0
    old_weights = (
        [p.detach().clone() for p in raw_model.parameters()] if logged and evaluated else None
    )
    step()

    # every rank helps to log, the master writes; .item() waits for the device, so it stands only here
    if logged:
        log.iteration(
            iter_num,
            (first + count) * tokens_per_micro_batch,
            loss=parallel.all_reduce(loss_sum).item() / world_size,
            lr=lr,
            grad_norm=grad_norm.item(),
            clipped=clipped.item(),
            bad_steps=int(bad_steps),
            peak_speed=peak_speed,
            memory_gb=memory_gb(device),
            **health(raw_model, old_weights),
        )
        bad_steps.zero_()
        clipped.zero_()
        old_weights = None  # their memory
    if max_bad_steps and (logged or device == 'cpu') and bad_in_row >= max_bad_steps:
        problem = (
            f'no finite loss or gradient in {int(bad_in_row)} steps in a row; the last checkpoint is from before them. Look at '
            f'grad_norm in {log.path}; lower rates, a longer warmup or bfloat16 in place of float16 may help'
        )
        break
    iter_num += 1
    stop.nothing_to_lose = False

# -----------------------------------------------------------------------------
# cleanup
parallel.destroy()  # all wait here until the master has saved
if not eval_only:
    log.close()
    print0(
        f'{ended}iteration {iter_num}, {log.seconds():.1f} s of training, best val loss {best_val_loss:.4f}'
    )
    if os.path.exists(own):
        print0(f'next: {next_command}')
    if not all(saved.values()):
        lost = ' and '.join(name for name in saved if not saved[name])
        problem = f'{lost} could not be written at the last attempt; what {out_dir} holds is older, if anything'
    if problem and master_process:
        fail(problem, 1)
