# An overlay that makes any recipe small enough for two CPU cores to train it in minutes.
#   launch     python train.py config/train_shakespeare_char.py config/cpu.py config/modern.py \
#                  config/beyond.py
#   expected   val loss about 1.48 after one to two minutes; 1.51 without config/beyond.py; without
#              config/modern.py too it takes longer and the loss is higher
# It changes how to train, not what: dataset, out_dir and the rest stay those of the recipe.

import os

device = 'cpu'
dtype = 'fast'  # bfloat16 on CPUs that multiply it faster
compile = False  # compiling takes longer than it saves here

_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 12 sequences
gradient_accumulation_steps = _processes
batch_size = max(1, 12 // _processes)
block_size = 128  # 12 * 128 = 1536 tokens per iteration
n_layer = 4
n_head = 2
n_embd = 128  # 0.8M parameters, and those of the vocabulary
dropout = 0.0  # a small network does not overfit in a short run

max_iters = 2600  # 4 million tokens; config/modern.py halves it
lr_decay_iters = 2600
warmup_iters = 100
# val loss on tiny Shakespeare, block_size=64, after 2000 iterations (seed 1337):
# 1.894 at 1e-3, 1.769 at 3e-3, 1.778 at 5e-3
learning_rate = 3e-3
min_lr = 1e-4
beta2 = 0.99
eval_interval = 650
eval_iters = 20 * _processes
log_interval = 10
