# Sample three scenes in Shakespeare's style.
#   launch     python sample.py config/sample_shakespeare.py
#   before     python train.py config/train_shakespeare_char.py
#              (without a GPU add config/cpu.py config/modern.py)

out_dir = 'out-shakespeare-char'
start = ['ROMEO:\n', 'First Citizen:\n', 'KING RICHARD III:\n']
num_samples = 1
max_new_tokens = 500
temperature = 0.8
top_k = 200
