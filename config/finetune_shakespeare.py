# Fine-tune GPT-2 XL on Shakespeare in GPT-2's BPE.
#   hardware   one GPU of 40 GB; with --init_from=gpt2 --learning_rate=3e-4 any GPU, or a slow CPU
#   launch     python train.py config/finetune_shakespeare.py
#   before     python data/shakespeare/prepare.py
# Tuned on a small network (docs/figures.md, H): many small steps, a high rate that decays to zero.

import os

out_dir = 'out-shakespeare'
eval_interval = 20
eval_iters = 40
always_save_checkpoint = False  # keep the best: the model overfits soon
wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2-xl'

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 1 sequence * 1024 tokens * 4 micro-batches = 4096 tokens per iteration;
# 301,966 tokens are 74 iterations, so 160 iterations are a little over 2 epochs
batch_size = 1
_processes = int(os.environ.get('WORLD_SIZE', 1))
gradient_accumulation_steps = _processes * max(1, 4 // _processes)  # the processes share them
max_iters = 160

# half the rate for pretraining a network of this size (Brown et al. 2020, table 2.1)
learning_rate = 1e-4
lr_schedule = 'trapezoid'
decay_share = 1.0  # linear decay from the start
warmup_iters = 10
lr_decay_iters = 160  # = max_iters
min_lr = 0.0
