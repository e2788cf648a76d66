# Train a GPT that reverses strings: hello world=dlrow olleh.
#   hardware   one GPU; two CPU cores with config/cpu_lines.py before modern.py, half a minute
#   launch     python train.py config/train_reverser.py config/modern.py
#   before     python data/reverser/prepare.py
#   after      python eval.py --out_dir=out-reverser; python sample.py config/sample_reverser.py

import os

out_dir = 'out-reverser'
wandb_project = 'lines'
wandb_run_name = 'reverser'

dataset = 'reverser'
mask_before_token = '='  # only the answers are learned
prefix_lm = True  # questions are read in both directions, and each line by itself
align_to_lines = True
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 128 sequences
gradient_accumulation_steps = _processes
batch_size = 128 // _processes
block_size = 64  # 128 * 64 = 8192 tokens per iteration; the longest line has 51

# 1.6M parameters
n_layer = 2  # enough: four layers need fewer iterations, but the same time
n_head = 4
n_embd = 256
dropout = 0.0  # the data never repeat

learning_rate = 5e-4
max_iters = 2000
lr_decay_iters = max_iters
min_lr = 5e-5
warmup_iters = 100
eval_interval = 500
eval_iters = 5 * _processes  # a rough estimate; eval.py counts right answers
log_interval = 10
