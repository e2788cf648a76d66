# An overlay: what has proved itself since GPT-2, for any recipe that trains from scratch.
#   launch     python train.py config/train_shakespeare_char.py config/modern.py
#   network    that of transformers' NanoChatForCausalLM
#   rates      muon.py's defaults; at 0.8M parameters matrix_lr=0.04 and head_lr=0.02 were better (README, figure D)

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
min_lr = 0.0
weight_decay = 0.0
