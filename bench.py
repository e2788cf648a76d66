"""
How fast is this machine, and how much of it do we use? Times the training step, text generation,
the loader and the optimizers, each beside a ceiling that is measured at the same time. It also
draws the logs of training runs.

$ python bench.py config/train_shakespeare_char.py config/cpu.py    # a training step, in parts
$ python bench.py config/train_gpt2.py --real_data=False --compare=transformers    # interleaved
$ python bench.py config/train_gpt2.py --real_data=False --compare=../nanoGPT/model.py
$ python bench.py config/train_gpt2.py --compare="--pos=rotary --norm=rmsnorm"    # other settings
$ python bench.py --mode=generate    # text by a network of GPT-2's size, random weights
$ python bench.py --mode=data    # batches
$ python bench.py --mode=optimizer    # AdamW and Muon, ours and torch's
$ python bench.py --mode=report --json=report.json    # most of the above in one table, minutes
$ python bench.py --mode=plot --runs=out-a,out-b --png=both.png --labels='first,second'
"""

from configurator import check, configure, writable

# -----------------------------------------------------------------------------
# what to time
mode = 'train'  # or 'generate', 'data', 'optimizer', 'report', 'plot'
steps = 20  # measured steps; the figures are their medians
warmup_steps = 5  # steps before that are not measured
real_data = True  # False: random tokens, no dataset needed
compare = ''  # 'transformers', the path of a model.py, or --NAME=VALUE of network or optimizer
json = ''  # also write the figures to this file
profile = False  # True: also write trace.json by torch's profiler, for chrome://tracing
prompt_tokens = 16  # generate: number of tokens in the prompt
new_tokens = 0  # generate: number of tokens to generate, 0: 64, on a CUDA device 240
# what to draw
runs = ''  # plot: out_dirs of training runs, separated by commas
png = 'loss.png'  # plot: the picture to write
labels = ''  # plot: names of the runs in the legend, separated by commas; '': the folders
title = ''  # plot: title of the picture
# data
dataset = 'openwebtext'  # a prepared folder of data/
batch_size = 12  # sequences per step
seed = 1337  # of weights and data
# model (GPTConfig in model.py has the sizes)
d_head: int | None = None  # width of a head; any two of n_head, n_embd, d_head give the third
d_model: int | None = None  # another name for n_embd
bias = False  # biases in Linear and LayerNorm layers
gradient_checkpointing = False  # True: recompute activations in backward
loss_chunk = 0  # compute the loss in chunks of this many positions, 0: all at once
# optimizer
optimizer = 'adamw'  # or 'muon'
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'fast': 'auto', with bfloat16 on CPUs too
compile: bool | str = 'auto'  # torch.compile
cuda_graph: bool | str = 'auto'  # also time CUDA graphs; 'auto': if they are supported
config, given = configure(globals(), model='model.py:GPTConfig', recipes_of=('train.py',))

# -----------------------------------------------------------------------------
# check the settings
MODES = 'train', 'generate', 'data', 'optimizer', 'report', 'plot'
check(config, 'mode', choices=MODES)
check(config, 'steps prompt_tokens batch_size block_size', least=1)
check(config, 'warmup_steps new_tokens loss_chunk', least=0)
check(config, 'seed', least=0, most=2**63 - 1)
check(config, 'optimizer', choices=('adamw', 'muon'))
writable(config, 'json')

# -----------------------------------------------------------------------------
# draw
if mode == 'plot':
    from support import bench_plot

    writable(config, 'png')
    bench_plot.run(runs, png, labels, title)
    print(f'wrote {png}')
    raise SystemExit

# -----------------------------------------------------------------------------
# set up
import os
import shlex
import sys
from json import dump

import torch

from data.tokenizer import dataset_dir, dataset_meta, model_vocab_size
from support import bench_data, bench_generate, bench_optimizer, bench_report, bench_train, weights
from support.bench import Bench
from support.device import resolve, tune
from support.graphs import Recorder, can_record

device, dtype, compile = resolve(device, dtype, compile)
on_cuda = 'cuda' in device
if not new_tokens:
    new_tokens = 240 if on_cuda else 64  # with the prompt 256, a single recording
tune(device, lengths_vary=mode == 'generate')
redraws = gradient_checkpointing and dropout > 0  # draws dropout masks in backward
graphs = can_record(cuda_graph, device, dtype, torchrun=False, redraws=redraws)
recorder = Recorder(graphs and mode in ('train', 'optimizer'))
if compile:
    torch._dynamo.config.recompile_limit = 64  # several networks, each compiled once
torch.manual_seed(seed)
if real_data and 'vocab_size' not in given:
    vocab_size = model_vocab_size(dataset_meta(dataset_dir(dataset)))
    config['vocab_size'] = vocab_size
default = n_head, n_embd
n_head, n_embd = weights.resolve_sizes(weights.asked_sizes(config, given), default)
bench = Bench({name: globals()[name] for name in config}, recorder)

# -----------------------------------------------------------------------------
# measure
rivals = [compare] if os.path.exists(compare) else compare.split()
if mode == 'train':
    bench_train.run(bench, rivals)
elif mode == 'generate':
    bench_generate.run(bench, compare)
elif mode == 'data':
    bench_data.run(bench)
elif mode == 'optimizer':
    bench_optimizer.run(bench)
elif mode == 'report':
    bench_report.run(bench, rivals)
if json:
    command = shlex.join(['python', *sys.argv])
    machine = dict(device=device, machine=bench.machine(), torch=torch.__version__)
    content = dict(command=command, **machine, dtype=dtype, compiled=compile, knobs=config)
    with open(json, 'w', encoding='utf-8') as f:
        dump({**content, 'figures': bench.figures}, f, indent=1)
    print(f'wrote {json}')
