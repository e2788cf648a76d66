# An overlay: any recipe, dialled down until two CPU cores train it in about a minute and a half.
#   launch     python train.py config/train_shakespeare_char.py config/cpu.py
# It says how, not what: dataset, out_dir and the rest stay the recipe's own.

device = 'cpu'
compile = False # compiling would take longer than it saves here

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64 # 12 * 64 = 768 tokens per iteration
n_layer = 4
n_head = 4
n_embd = 128 # 0.8M parameters, plus the vocabulary's
dropout = 0.0 # so small a network cannot overfit in so short a time

max_iters = 1800 # 1.4 million tokens
lr_decay_iters = 1800
warmup_iters = 100
learning_rate = 3e-3 # on tiny Shakespeare after 2000 iterations: 1e-3 1.894, 3e-3 1.769, 5e-3 1.778 (seed 1337)
min_lr = 1e-4
beta2 = 0.99
eval_interval = 300
eval_iters = 20
log_interval = 10
