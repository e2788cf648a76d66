# An overlay, after the recipe and its size: what has proved itself since GPT-2, for any recipe that trains from scratch.
#   launch     python train.py config/train_shakespeare_char.py config/modern.py
#   network    that of transformers' NanoChatForCausalLM
#   rates      muon.py's defaults; for runs of some hundred iterations twice as high (README.md, figure E)

pos = 'rotary'
norm = 'rmsnorm'
activation = 'relu2'
qk_norm = True
tie_embeddings = False
embed_norm = True
logit_cap = 15.0
init = 'zero_proj'

optimizer = 'muon'
lr_schedule = 'trapezoid'
decay_share = 1.0  # straight down from the first iteration (Bergsma et al. 2025)
warmup_iters = 0
min_lr = 0.0
weight_decay = 0.0

max_iters //= 2  # of the recipe's: it still ends lower
lr_decay_iters = max_iters
