# The loss of OpenAI's GPT-2 (350M) on OpenWebText, no training.
#   hardware   one GPU
#   expected   val loss 2.84 (nanoGPT's figure, over random windows)
#   launch     python train.py config/eval_gpt2_medium.py
#   before     python data/openwebtext/prepare.py

import os

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # 500 * 8 sequences of 1024 tokens
batch_size = 8
# one micro-batch per process
gradient_accumulation_steps = int(os.environ.get('WORLD_SIZE', 1))
