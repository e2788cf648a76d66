# Sample reversed strings.
#   launch     python sample.py config/sample_reverser.py
#   before     python train.py config/train_reverser.py config/modern.py

out_dir = 'out-reverser'
start = ['hello world=', 'flatgpt=', 'Madam Im Adam=', 'r2d2 and c3po=']
num_samples = 1
temperature = 0.0  # there is one right answer
max_new_tokens = 64
stop_token_char = '\n'
