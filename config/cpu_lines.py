# An overlay: the tasks on lines on two CPU cores, in minutes.
#   launch     python train.py config/train_reverser.py config/cpu_lines.py config/modern.py
# Layers and iterations are the recipe's own, the network narrower and the batch smaller.

import os

device = 'cpu'
dtype = 'fast'  # bfloat16 where this CPU multiplies it faster
compile = False  # compiling would take longer than it saves here

_processes = int(os.environ.get('WORLD_SIZE', 1))  # under torchrun they share the 24 sequences
batch_size = max(1, 24 // _processes)  # 24 * 64 = 1536 tokens per iteration
n_head = 4  # narrow heads: reversing, two of 64 end at 99.74%, four of 32 at 99.97% after as many iterations
n_embd = 128  # 0.4M parameters in two layers, 0.8M in four
