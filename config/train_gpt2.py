# Train GPT-2 (124M) on OpenWebText.
#   hardware   8 GPUs of 40 GB or more, one machine
#   time       about 4 days on 8 A100s (nanoGPT's figure for the same recipe)
#   expected   val loss 2.85, like GPT-2's weights after fine-tuning on OpenWebText
#   launch     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#   before     python data/openwebtext/prepare.py

out_dir = 'out-gpt2'
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

dataset = 'openwebtext'
# 12 sequences * 1024 tokens * 40 micro-batches (5 on each of 8 GPUs) = 491,520 tokens per iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 iterations * 491,520 tokens = 295 billion tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
