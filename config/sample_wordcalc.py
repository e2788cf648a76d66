# Sample expressions in digits from expressions in words.
#   launch     python sample.py config/sample_wordcalc.py
#   before     python train.py config/train_wordcalc.py config/modern.py

out_dir = 'out-wordcalc'
start = [
    'twenty three plus four times seven=',
    'nine thousand one divided by minus eighty=',
    'two point five minus six=',
]
num_samples = 1
temperature = 0.0  # there is one right answer
max_new_tokens = 64
stop_token_char = '\n'
