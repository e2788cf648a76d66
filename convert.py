"""
Weights to the formats of other projects and back.

$ python convert.py --init_from=out-shakespeare-char --output=shakespeare-hf  # for transformers
$ python convert.py --init_from=gpt2-xl --output=out-xl --to=flatgpt  # for train.py and sample.py

Reads our checkpoints and nanoGPT's (a file, or a folder with one), and GPT2LMHeadModel and
NanoChatForCausalLM in the format of transformers (a folder, or a name of the Hugging Face hub).
"""

from configurator import check, configure

# -----------------------------------------------------------------------------
init_from = 'out'  # a run's folder, a checkpoint, a folder of transformers, or a name of the hub
output = ''  # the folder to write, which must be new
to = 'transformers'  # or 'flatgpt'
configure(globals(), paths=('init_from', 'output'))

# -----------------------------------------------------------------------------
import os

from support.checkpoint import write
from support.errors import UserError
from support.files import new_folder
from support.hf import to_transformers
from support.weights import open_model, tokenizer_meta

FIGURES = 'dataset optimizer learning_rate batch_size gradient_accumulation_steps block_size seed'

check(globals(), 'to', choices=('transformers', 'flatgpt'))
if not output or os.path.lexists(output):
    raise UserError(f'output={output!r} must be a new folder: --output=...')
parent = os.path.dirname(os.path.abspath(output))
if not os.path.isdir(parent):
    raise UserError(f'output={output!r}: {parent} is not there')

model, loaded = open_model(init_from)
config, meta = loaded.get('config', {}), loaded.get('meta')
if not meta and 'dataset' in config:  # nanoGPT leaves the meta with the dataset
    try:
        meta = tokenizer_meta(loaded, init_from, model.config.vocab_size)
    except ValueError:
        pass  # the dataset is not here
iter_num, best_val_loss = loaded.get('iter_num', 0), float(loaded.get('best_val_loss', 'inf'))

if to == 'transformers':
    figures = {}  # for the model card
    if config:
        figures['iterations'] = f'{iter_num:,}'
        figures['validation loss (nats per token)'] = f'{best_val_loss:.4f}'
        figures.update((name, config[name]) for name in FIGURES.split() if name in config)
    to_transformers(model, meta, output, figures)
else:
    checkpoint = dict(model=model.state_dict(), model_args=vars(model.config), meta=meta)
    checkpoint.update(config=config, iter_num=iter_num, best_val_loss=best_val_loss)
    with new_folder(output) as folder:
        write(os.path.join(folder, 'ckpt.pt'), checkpoint)
without = '' if meta else ', without a tokenizer, because none came with them'
print(f'{output}: {model.get_num_params() / 1e6:.2f}M parameters{without}')
