# An overlay for config/train_shakespeare_char.py and config/modern.py.
# It trains the 10.65M parameters for four epochs, before they overfit.
#   launch     python train.py config/train_shakespeare_char.py config/modern.py config/short.py
#   hardware   one GPU; two CPU cores with --device=cpu --dtype=fast, about half an hour
#   expected   val loss about 1.39 over the whole split (docs/figures.md, D)

batch_size = max(1, batch_size // 4)  # 16 * 256 = 4096 characters per iteration
max_iters = 1000
lr_decay_iters = 1000  # = max_iters
token_shift = True  # without, the loss is 0.03 higher, but convert.py can export the weights
dropout = 0.05
weight_decay = 0.2  # of Muon's matrices, at their rate of 0.02; without, the loss is 0.01 higher

eval_interval = 250
eval_iters = 448 // batch_size  # windows of 256: all of the validation split
