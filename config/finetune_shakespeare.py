# Fine-tune GPT-2 XL on Shakespeare, the works as GPT-2's BPE.
#   hardware   one GPU of 40 GB; with --init_from=gpt2 any GPU, or a patient CPU
#   launch     python train.py config/finetune_shakespeare.py
#   before     python data/shakespeare/prepare.py

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False # keep the best: it overfits soon
wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2-xl'

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 1 sequence * 1024 tokens * 32 micro-steps = 32,768 tokens per iteration;
# 301,966 tokens are 9 iterations, so 20 iterations are a little over 2 epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5 # constant, far below pretraining's
decay_lr = False
