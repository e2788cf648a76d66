# Your own text, as data/text/prepare.py wrote it.
#   hardware   one GPU; on a laptop without one add config/cpu.py config/modern.py
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
_processes = int(
    os.environ.get('WORLD_SIZE', 1)
)  # under torchrun they share the batch of 64 sequences
gradient_accumulation_steps = _processes
batch_size = 64 // _processes
eval_iters = 200 * _processes  # 12,800 sequences at most, of all processes together
block_size = 256  # 16,384 tokens per iteration, so 2000 iterations are 33 million tokens

# 10.6M parameters and those of the vocabulary
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1  # more for a text of one book, 0.0 for more than 50 million tokens

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
