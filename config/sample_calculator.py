# Sample the values of expressions.
#   launch     python sample.py config/sample_calculator.py
#   before     python train.py config/train_calculator.py config/modern.py

out_dir = 'out-calculator'
start = ['2+4-8*10=', '12.5+7.25=', '100-250=', '9*8=', '3/4=']
num_samples = 1
temperature = 0.0  # there is one right answer
max_new_tokens = 64
stop_token_char = '\n'
