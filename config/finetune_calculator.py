# Go on from a model that computes already, on other questions: its weights, a fresh optimizer, lower rates.
#   launch     python train.py config/finetune_calculator.py, or with --init_from=out-wordcalc to see what another task helps
#   before     python data/calculator/prepare.py --max_digits=5, or what else it is to learn; all tasks share one vocabulary

import os

init_from = 'out-calculator'
out_dir = 'out-calculator-finetuned'
wandb_project = 'lines'
wandb_run_name = 'calculator-finetuned'

dataset = 'calculator'
mask_before_token = '='  # only the answers are learned
mask_per_line = True
align_to_lines = True
gradient_accumulation_steps = int(
    os.environ.get('WORLD_SIZE', 1)
)  # one for each of torchrun's processes
batch_size = 24
block_size = (
    64  # 24 * 64 = 1536 tokens per iteration; the sizes of the network are those of the weights
)

optimizer = 'muon'
matrix_lr = 0.005  # a quarter of its default, and the others likewise
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
eval_iters = 20
log_interval = 10
dtype = 'fast'
