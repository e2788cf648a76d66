# Fine-tune a model that computes already on other questions, at lower rates.
#   launch     python train.py config/finetune_calculator.py
#              --init_from=out-wordcalc starts from another task; all share one vocabulary
#   before     python data/calculator/prepare.py --max_digits=5

import os

init_from = 'out-calculator'
out_dir = 'out-calculator-finetuned'
wandb_project = 'lines'
wandb_run_name = 'calculator-finetuned'

dataset = 'calculator'
mask_before_token = '='  # only the answers are learned
prefix_lm = True  # questions are read in both directions, and each line by itself
align_to_lines = True
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 24 sequences
gradient_accumulation_steps = _processes
batch_size = max(1, 24 // _processes)
block_size = 64  # 24 * 64 = 1536 tokens per iteration; the weights set the network's sizes

optimizer = 'muon'
matrix_lr = 0.005  # about a quarter of its default, like the two below
embed_lr = 0.1
head_lr = 0.002
learning_rate = 5e-4
weight_decay = 0.0
lr_schedule = 'trapezoid'
decay_share = 1.0
warmup_iters = 50
max_iters = 2000
lr_decay_iters = max_iters
min_lr = 0.0
eval_interval = 500
eval_iters = 20 * _processes
log_interval = 10
dtype = 'fast'
