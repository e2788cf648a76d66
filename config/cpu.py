# An overlay: any recipe, dialled down until two CPU cores train it in minutes.
#   launch     python train.py config/train_shakespeare_char.py config/cpu.py config/modern.py
#   expected   val loss below 1.53 after 1.5 to 2 minutes; without config/modern.py it takes longer and ends higher
# It says how, not what: dataset, out_dir and the rest stay the recipe's own.

import os

device = 'cpu'
dtype = 'fast'  # bfloat16 where this CPU multiplies it faster
compile = False  # compiling would take longer than it saves here

_processes = int(os.environ.get('WORLD_SIZE', 1))  # under torchrun they share the 12 sequences
gradient_accumulation_steps = _processes
batch_size = max(1, 12 // _processes)
block_size = 128  # 12 * 128 = 1536 tokens per iteration
n_layer = 4
n_head = 2
n_embd = 128  # 0.8M parameters, plus the vocabulary's
dropout = 0.0  # so small a network cannot overfit in so short a time

max_iters = 2600  # 4 million tokens; config/modern.py makes it half of that
lr_decay_iters = 2600
warmup_iters = 100
learning_rate = 3e-3  # on tiny Shakespeare, block_size=64, after 2000 iterations: 1e-3 1.894, 3e-3 1.769, 5e-3 1.778 (seed 1337)
min_lr = 1e-4
beta2 = 0.99
eval_interval = 650
eval_iters = 20 * _processes
log_interval = 10
