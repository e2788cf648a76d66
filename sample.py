"""
Text in, text out: sample from a trained run, any checkpoint, or GPT-2.

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
$ python sample.py --start=FILE:prompt.txt
$ python sample.py config/sample_calculator.py --start="2+4-8*10="
"""

from configurator import configure

# -----------------------------------------------------------------------------
# what from
init_from = 'resume' # 'resume' (out_dir/best.pt, else ckpt.pt), a GPT-2 name, or a path to a checkpoint
out_dir = 'out' # folder of the run to sample from
# what
start: str | list = '\n' # the prompt, or FILE:name to read it from a file, or several of these
num_samples = 10 # texts to draw for each prompt
max_new_tokens = 500 # tokens in each
stop_token_char = '' # end a text before this character, which must be one token
stop: str | list = '' # end a text before this string, or the first of these
temperature = 0.8 # below 1.0 less surprising, above it more, 0 always the most likely token
top_k = 200 # draw from so many most likely tokens only, 0 for all
seed = 1337 # the same seed gives the same texts
# system
device = 'auto' # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto' # 'float32', 'bfloat16', 'float16'
compile: bool | str = False # torch.compile: pays only for very long texts
config, given = configure(globals(), also=('train.py', 'model.py:GPTConfig')) # a training recipe tells out_dir and device

# -----------------------------------------------------------------------------
import os
import sys

import torch

import checkpoint as ckpt
from data.tokenizer import GPT2, check_meta, from_meta, load_meta
from device import autocast, resolve, tune

for name in ('num_samples', 'max_new_tokens'):
    if config[name] < 1:
        raise ValueError(f'{name}={config[name]} must be at least 1')
if temperature < 0 or top_k < 0:
    raise ValueError(f'temperature={temperature} and top_k={top_k} must not be negative')
prompts = [start] if isinstance(start, str) else start
stops = [stop] if isinstance(stop, str) else stop
for name, texts in (('start', prompts), ('stop', stops)):
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{name}={config[name]} must be a text or a list of texts')
stops = [text for text in (stop_token_char, *stops) if text]
for prompt in prompts:
    if prompt.startswith('FILE:') and not os.path.isfile(prompt[5:]):
        raise FileNotFoundError(f'prompt file {prompt[5:]} not found')
device, dtype, compile = resolve(device, 'auto' if dtype == 'fast' else dtype, compile) # to convert all weights for each token is not
tune(device)
torch.manual_seed(seed)
sys.stdout.reconfigure(errors='replace') # a Windows console cannot show every character

# -----------------------------------------------------------------------------
# model, and the tokenizer that came with it
source = ckpt.best(out_dir) if init_from == 'resume' else init_from
model, loaded = ckpt.open_model(source)
meta = loaded.get('meta')
if meta is None: # nanoGPT's checkpoints leave the tokenizer with the dataset
    meta_path = os.path.join('data', str(loaded.get('config', {}).get('dataset')), 'meta.pkl')
    meta = load_meta(meta_path) if os.path.exists(meta_path) else GPT2
if check_meta(meta, source)['vocab_size'] > model.config.vocab_size:
    raise ValueError(f'{source} has {model.config.vocab_size} token ids and comes without its tokenizer; prepare its dataset first')
model.eval().to(device)
if compile:
    model.forward = torch.compile(model.forward, dynamic=True)
tokenizer = from_meta(meta)

# -----------------------------------------------------------------------------
# text in
def encode_prompt(text):
    """Token ids of a prompt, or of the file that it names."""
    if text.startswith('FILE:'):
        path = text[5:]
        try:
            with open(path, encoding='utf-8') as f:
                text = f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f'prompt file {path} is not UTF-8 text: {e.reason} at byte {e.start}') from e
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError('the prompt is empty; give at least one character: --start=...')
    return ids

if stop_token_char and len(tokenizer.encode(stop_token_char)) != 1:
    raise ValueError(f'stop_token_char={stop_token_char!r} is {len(tokenizer.encode(stop_token_char))} tokens; --stop takes any string')
prompts = [encode_prompt(prompt) for prompt in prompts] # all of them before the first is sampled

# text out
def stopped(new):
    """Whether each of the continuations (B, n) holds a stop."""
    return all(any(s in tokenizer.decode(row) for s in stops) for row in new.tolist())

for ids in prompts:
    idx = torch.tensor([ids] * num_samples, device=device) # all samples of a prompt in one batch
    with autocast(device, dtype):
        samples = model.generate(idx, max_new_tokens, temperature, top_k or None, tokenizer.vocab_size, stopped if stops else None)
    for sample in samples[:, len(ids):].tolist():
        text = tokenizer.decode(sample)
        print(tokenizer.decode(ids) + text[:min([text.find(s) for s in stops if s in text], default=None)])
        print('---------------')
