"""
Weights to other people's formats and back.

$ python convert.py --init_from=out-shakespeare-char --output=shakespeare-hf    # for transformers, and all that reads its folders
$ python convert.py --init_from=gpt2-xl --output=out-xl --to=flatgpt            # a checkpoint for train.py and sample.py

In come our checkpoints and nanoGPT's (a file, or a folder with one), and GPT2LMHeadModel and NanoChatForCausalLM in the
format of transformers (a folder, or a name of the Hugging Face hub).
"""

from configurator import check, configure

# -----------------------------------------------------------------------------
init_from = 'out'  # what to convert: a run's folder, a checkpoint, a folder in the format of transformers, or a name of the hub
output = ''  # the folder to write, which must be new
to = 'transformers'  # or 'flatgpt'
configure(globals(), paths=('init_from', 'output'))

# -----------------------------------------------------------------------------
import os

from support.checkpoint import write
from support.hf import new_folder, to_transformers
from support.weights import open_model, tokenizer_meta

check(globals(), 'to', choices=('transformers', 'flatgpt'))
if not output or os.path.lexists(output):
    raise ValueError(f'output={output!r} must be a new folder: --output=...')
if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
    raise ValueError(f'output={output!r}: {os.path.dirname(os.path.abspath(output))} is not there')
model, loaded = open_model(init_from)
config, meta = loaded.get('config', {}), loaded.get('meta')
if not meta and 'dataset' in config:  # nanoGPT leaves it with the dataset
    try:
        meta = tokenizer_meta(loaded, init_from, model.config.vocab_size)
    except ValueError:  # which is not here
        pass
best_val_loss = float(loaded.get('best_val_loss', 'inf'))
if to == 'flatgpt':
    with new_folder(output) as folder:
        write(
            os.path.join(folder, 'ckpt.pt'),
            dict(
                model=model.state_dict(),
                model_args=vars(model.config),
                meta=meta,
                config=config,
                iter_num=loaded.get('iter_num', 0),
                best_val_loss=best_val_loss,
            ),
        )
else:
    told = (
        'dataset',
        'optimizer',
        'learning_rate',
        'batch_size',
        'gradient_accumulation_steps',
        'block_size',
        'seed',
    )
    figures = {name: config[name] for name in told if name in config}
    if config:
        figures = {
            'iterations': f'{loaded["iter_num"]:,}',
            'validation loss (nats per token)': f'{best_val_loss:.4f}',
            **figures,
        }
    to_transformers(model, meta, output, figures)
print(
    f'{output}: {model.get_num_params() / 1e6:.2f}M parameters'
    + ('' if meta else ', without a tokenizer, since none came with them')
)
