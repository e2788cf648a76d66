# An overlay after config/modern.py: a lower loss in the same time, from a network that transformers
# does not have. So convert.py cannot export it.
#   launch     python train.py config/train_shakespeare_char.py config/cpu.py config/modern.py \
#                  config/beyond.py
#   expected   val loss about 1.48 after one to two minutes

token_shift = True
activation = 'swiglu'
weight_decay = 0.1  # of Muon's matrices; without, laptop.py's loss is 0.013 higher
