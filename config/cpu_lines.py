# An overlay that trains the tasks on lines on two CPU cores in minutes.
#   launch     python train.py config/train_reverser.py config/cpu_lines.py config/modern.py
# The recipe sets layers and iterations; the network is narrower and the batch smaller.

import os

device = 'cpu'
dtype = 'fast'  # bfloat16 on CPUs that multiply it faster
compile = False  # compiling takes longer than it saves here

_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 24 sequences
batch_size = max(1, 24 // _processes)  # 24 * 64 = 1536 tokens per iteration
# narrow heads: reversing strings (causal), two heads of 64 reach 99.74%, four of 32 reach 99.97%
n_head = 4
n_embd = 128  # 0.4M parameters in two layers, 0.8M in four
