# Train a GPT that computes: 2+4-8*10=-74.
#   hardware   one GPU; two CPU cores with config/cpu_lines.py before modern.py, six minutes
#   launch     python train.py config/train_calculator.py config/modern.py
#   before     python data/calculator/prepare.py
#   after      python eval.py --out_dir=out-calculator; python sample.py config/sample_calculator.py

import os

out_dir = 'out-calculator'
wandb_project = 'lines'
wandb_run_name = 'calculator'

dataset = 'calculator'
mask_before_token = '='  # only the answers are learned
prefix_lm = True  # questions are read in both directions, and each line by itself
align_to_lines = True
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 128 sequences
gradient_accumulation_steps = _processes
batch_size = 128 // _processes
block_size = 64  # 128 * 64 = 8192 tokens per iteration; no line is longer

# 3.2M parameters
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0  # 18000 * 8192 tokens are 4.3 epochs; config/modern.py halves that

learning_rate = 5e-4
max_iters = 18000
lr_decay_iters = max_iters
min_lr = 5e-5
warmup_iters = 100
eval_interval = 2250
eval_iters = 5 * _processes  # a rough estimate; eval.py counts right answers
log_interval = 10
