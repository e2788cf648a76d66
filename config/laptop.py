# An overlay with twice the parameters of cpu.py: nanoGPT's GPU loss on two CPU cores.
#   launch     python train.py config/train_shakespeare_char.py config/laptop.py config/modern.py \
#                  config/beyond.py
#   expected   val loss about 1.43 after two minutes; 1.46 without config/beyond.py

import os

device = 'cpu'
dtype = 'fast'  # bfloat16 on CPUs that multiply it faster
compile = False

_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 8 sequences
gradient_accumulation_steps = _processes
batch_size = max(1, 8 // _processes)
block_size = 256  # 8 * 256 = 2048 tokens per iteration
n_layer = 4
n_head = 3
n_embd = 192  # 1.8M parameters
dropout = 0.0

max_iters = 2600  # config/modern.py halves it
lr_decay_iters = 2600
warmup_iters = 100
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99
eval_interval = 650
eval_iters = 20 * _processes
log_interval = 10
