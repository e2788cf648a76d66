# An overlay for config/train_gpt2.py and config/modern.py: GPT-2's size to val loss 3.28, FineWeb.
#   hardware   8 GPUs of 80 GB, or one
#   expected   val loss 3.28 after about 4,600 iterations, 2.4 billion tokens
#              (a projection, see docs/training.md; not yet measured)
#   launch     python train.py config/train_gpt2.py config/modern.py config/fineweb.py
#              on 8 GPUs: torchrun --standalone --nproc_per_node=8 instead of python
#   before     python data/fineweb/prepare.py --hub_name=HuggingFaceFW/fineweb
#              (3.28 refers to this text; without the flag it is FineWeb-Edu)

out_dir = 'out-fineweb'
wandb_project = 'fineweb'
wandb_run_name = 'gpt2-124M-modern'

dataset = 'fineweb'
# 32 sequences * 1024 tokens * 16 micro-batches = 524,288 tokens per iteration;
# 8 GPUs take 2 micro-batches each, one GPU takes 16
batch_size = 32  # on 40 GB: 16, and twice the micro-batches
gradient_accumulation_steps = 16
n_head = 6  # heads of 128

max_iters = 4800  # 2.5 billion tokens
lr_decay_iters = 4800
eval_interval = 200
eval_iters = 320  # 320 * 32 sequences of 1024 tokens: 10.5 million
save_interval = 400
log_interval = 10
