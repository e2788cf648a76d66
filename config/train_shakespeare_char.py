# A character-level GPT on the works of Shakespeare, the smallest run that reads like something.
#   hardware   one GPU, minutes; on a laptop without one add config/cpu.py config/modern.py, about two minutes
#   expected   val loss 1.47 on tiny Shakespeare (full size), after that it overfits
#   launch     python train.py config/train_shakespeare_char.py
#   before     python data/shakespeare_char/prepare.py

import os

out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, since it will overfit
log_interval = 10
always_save_checkpoint = False  # keep the best, not the last

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
_processes = int(
    os.environ.get('WORLD_SIZE', 1)
)  # under torchrun they share the batch of 64 sequences
gradient_accumulation_steps = _processes
batch_size = 64 // _processes
eval_iters = 200 * _processes  # 12,800 sequences at most, of all processes together
block_size = 256  # 64 * 256 = 16,384 characters per iteration, so 5000 iterations are 82 epochs of tiny Shakespeare

# 10.65M parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks bear higher rates
max_iters = 5000
lr_decay_iters = 5000  # = max_iters
min_lr = 1e-4  # = learning_rate / 10
beta2 = 0.99  # few tokens per iteration, so average over more of them
warmup_iters = 100
