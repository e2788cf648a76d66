# Train a character-level GPT on the works of Shakespeare: the smallest run with readable samples.
#   hardware   one GPU, minutes; without one add config/cpu.py config/modern.py, two minutes
#   expected   val loss 1.47 on tiny Shakespeare (full size); then it overfits
#   launch     python train.py config/train_shakespeare_char.py
#   before     python data/shakespeare_char/prepare.py

import os

out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because the model overfits
log_interval = 10
always_save_checkpoint = False  # keep the best, not the last

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
_processes = int(os.environ.get('WORLD_SIZE', 1))  # they share the 64 sequences
gradient_accumulation_steps = _processes
batch_size = 64 // _processes
eval_iters = 200 * _processes  # at most 12,800 sequences, of all processes together
# 64 * 256 = 16,384 characters per iteration; 5000 iterations are 82 epochs of tiny Shakespeare
block_size = 256

# 10.65M parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks tolerate higher rates
max_iters = 5000
lr_decay_iters = 5000  # = max_iters
min_lr = 1e-4  # = learning_rate / 10
beta2 = 0.99  # few tokens per iteration, so average over more iterations
warmup_iters = 100
