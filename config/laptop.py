# An overlay beside cpu.py, twice its parameters: nanoGPT's figure for a GPU on two CPU cores.
#   launch     python train.py config/train_shakespeare_char.py config/laptop.py config/modern.py
#   expected   val loss about 1.47 after 4 to 5 minutes

device = 'cpu'
dtype = 'fast' # bfloat16 where this CPU multiplies it faster
compile = False

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128 # 16 * 128 = 2048 tokens per iteration
n_layer = 4
n_head = 3
n_embd = 192 # 1.8M parameters
dropout = 0.0

max_iters = 3300 # config/modern.py makes it half of that
lr_decay_iters = 3300
warmup_iters = 100
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99
eval_interval = 550
eval_iters = 20
log_interval = 10
