# Train a GPT that turns words into digits: twenty three plus four times seven=23+4*7.
#   hardware   one GPU; two CPU cores with config/cpu_lines.py before modern.py, two minutes
#   launch     python train.py config/train_wordcalc.py config/modern.py
#   before     python data/wordcalc/prepare.py
#   after      python eval.py --out_dir=out-wordcalc; python sample.py config/sample_wordcalc.py

import os

out_dir = 'out-wordcalc'
wandb_project = 'lines'
wandb_run_name = 'wordcalc'

dataset = 'wordcalc'
mask_before_token = '='  # only the answers are learned
align_to_lines = True
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 128 sequences
gradient_accumulation_steps = _processes
batch_size = 128 // _processes
block_size = 64  # 128 * 64 = 8192 tokens per iteration; no line is longer

# 1.6M parameters
n_layer = 2
n_head = 4
n_embd = 256
dropout = 0.0  # the data hardly repeat

learning_rate = 5e-4
max_iters = 9000
lr_decay_iters = max_iters
min_lr = 5e-5
warmup_iters = 100
eval_interval = 1500
eval_iters = 5 * _processes  # a rough estimate; eval.py counts right answers
log_interval = 10
