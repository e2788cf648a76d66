# Train on your own text, prepared by data/text/prepare.py.
#   hardware   one GPU; without one add config/cpu.py config/modern.py
#   launch     python train.py config/train_text.py --dataset=text
#   before     python data/text/prepare.py --input=FILE

import os

out_dir = 'out-text'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # keep the best, not the last

wandb_project = 'text'
wandb_run_name = 'mini-gpt'

dataset = 'text'
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 64 sequences
gradient_accumulation_steps = _processes
batch_size = 64 // _processes
eval_iters = 200 * _processes  # at most 12,800 sequences, of all processes together
block_size = 256  # 16,384 tokens per iteration, so 2000 iterations are 33 million tokens

# 10.6M parameters, and those of the vocabulary
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1  # more for a single book, 0.0 for more than 50 million tokens

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
