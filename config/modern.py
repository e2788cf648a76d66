# An overlay with what has improved on GPT-2 since, for any recipe that trains from scratch.
# It comes after the recipe and its size.
#   launch     python train.py config/train_shakespeare_char.py config/modern.py
#   network    the one of transformers' NanoChatForCausalLM
#   rates      the defaults of muon.py, unless the recipe sets them

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
decay_share = 1.0  # linear decay from the first iteration (Bergsma et al. 2025)
warmup_iters = 0
min_lr = 0.0
weight_decay = 0.0

max_iters //= 2  # half the recipe's, and the loss is still lower
lr_decay_iters = max_iters
