"""
Text in, text out: sample from a trained run, any checkpoint, or GPT-2.

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
$ python sample.py --start=FILE:prompt.txt
$ python sample.py config/sample_calculator.py --start="2+4-8*10="
$ python sample.py --start=LINES:prompts.txt --output=answers.jsonl
$ python sample.py --out_dir=out-shakespeare-char --interactive=True
"""

from configurator import check, configure, writable

# -----------------------------------------------------------------------------
# what from
init_from = 'resume'  # out_dir's best.pt, else its ckpt.pt; or other weights: a folder, a file, a hub name such as 'gpt2-xl'
out_dir = 'out'  # folder of the run to sample from
# what
start: str | list = (
    ''  # the prompt, FILE:name for a file's text, LINES:name for a prompt a line, - for standard input; a list of these in a config file; if not given, the end of a text, or a newline
)
num_samples = 10  # texts to draw for each prompt
max_new_tokens = 500  # tokens in each
interactive = False  # True: read a prompt, go on with the text, read the next, as in a chat
output = ''  # a .jsonl file that the texts are written to, '' for the terminal
batch_size = 64  # texts made at once
# how
temperature = 0.8  # below 1.0 less surprising, above it more, 0 always the most likely token
top_k = 200  # draw from so many most likely tokens only, 0 for all
top_p = 1.0  # draw from the fewest tokens that together have this probability
min_p = 0.0  # draw from tokens that have this share of the most likely one's probability
repetition_penalty = 1.0  # above 1.0 tokens that were there before become less likely
stop_token_char: str | None = ''  # end a text before this character, which must be one token
stop: str | list = ''  # end a text before this string, or the first of these
seed = 1337  # the same seed and prompt give the same texts
stride = 1  # past block_size, learned positions recompute their window every so many tokens: 64 is much faster, and sees up to 63 tokens less
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # as in train.py; or 'float32', 'bfloat16', 'float16'
quantize = ''  # 'int8': weights of 8 bits, for one text at a time on a CPU
compile: bool | str = False  # torch.compile: half a minute's wait, then faster steps
config, given = configure(
    globals(),
    recipes_of=('train.py', 'model.py:GPTConfig'),  # a training recipe tells out_dir and device
    ignore_from_recipes=('init_from', 'batch_size', 'compile', 'seed'),
    paths=('out_dir', 'init_from', 'output'),
)  # its values of these are for training

# -----------------------------------------------------------------------------
import contextlib
import importlib
import json
import os
import re
import sys
import time

import torch

from data.tokenizer import continuation, dataset_dir, from_meta
from generate import new_cache, stream
from support import checkpoint as ckpt
from support import weights
from support.cpu import pack
from support.device import DTYPES, resolve, tune
from support.files import write_whole

check(config, 'num_samples max_new_tokens batch_size stride', least=1)
check(config, 'temperature top_k', least=0)
check(config, 'top_p', above=0, most=1)
check(config, 'min_p', least=0, most=1)
check(config, 'repetition_penalty', above=0)
check(config, 'seed', most=2**63 - 1)
writable(config, 'output')
prompts = [start] if isinstance(start, str) else list(start)
stops = [stop] if isinstance(stop, str) else stop
if sys.stdin is None and (interactive or '-' in prompts):
    raise ValueError('standard input is closed; give a prompt by --start=... instead')
if interactive and given.get('start', '').startswith('--'):
    raise ValueError('--start is not read with --interactive; type it at the prompt')
for name, texts in (('start', prompts), ('stop', stops)):
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{name}={config[name]} must be a text or a list of texts')
stops = [text for text in (stop_token_char, *stops) if text]
for i, prompt in enumerate(prompts):
    if prompt.startswith(('FILE:', 'LINES:')):
        kind, _, path = prompt.partition(':')
        prompts[i] = f'{kind}:{os.path.expanduser(path)}'
        if not os.path.isfile(os.path.expanduser(path)):
            raise FileNotFoundError(f'prompt file {path} not found')
if output and interactive:
    raise ValueError('--output is not written with --interactive; leave one of them out')
device, dtype, compile = resolve(
    device, 'auto' if dtype == 'fast' else dtype, compile, quantize
)  # small networks are not faster
tune(device, lengths_vary=True)

# -----------------------------------------------------------------------------
# model, and the tokenizer that came with it
source = ckpt.best(out_dir) if init_from == 'resume' else init_from
model, loaded = weights.open_model(source)
model.eval().to(
    device, DTYPES[dtype]
)  # weights too, so that none is converted again for each token
compiled = torch.compile(model, dynamic=False) if compile else None
tokenizer = from_meta(weights.tokenizer_meta(loaded, source, model.config.vocab_size))


# -----------------------------------------------------------------------------
# text in
def read_prompts(text):
    """The prompts that an entry of `start` stands for."""
    kind, _, path = text.partition(':') if text != '-' else ('FILE', '', 0)
    if kind not in ('FILE', 'LINES'):
        if not text.isascii() and any(
            '\ud800' <= c <= '\udfff' for c in text
        ):  # bytes that Python could not read
            raise ValueError('the prompt is not UTF-8 text')
        return [text]
    try:
        with open(
            path, encoding='utf-8-sig', closefd=path != 0
        ) as f:  # with Windows' mark at its start or without
            return (
                [line for line in f.read().split('\n') if line] if kind == 'LINES' else [f.read()]
            )
    except UnicodeDecodeError as e:
        raise ValueError(
            f'{path and f"prompt file {path}" or "the prompt"} is not UTF-8 text: {e.reason} at byte {e.start}'
        ) from e


if stop_token_char and len(tokenizer.encode(stop_token_char)) != 1:
    raise ValueError(
        f'stop_token_char={stop_token_char!r} is {len(tokenizer.encode(stop_token_char))} tokens; --stop takes any string'
    )
newline = []
with contextlib.suppress(ValueError):  # some vocabularies have none
    newline = tokenizer.encode('\n')
if interactive:
    prompts, ids = [], []
elif 'start' in given:
    prompts = [text for prompt in prompts for text in read_prompts(prompt)]
    ids = [
        tokenizer.encode(prompt) for prompt in prompts
    ]  # all of them before the first is sampled
else:
    ids = [[tokenizer.eot] if tokenizer.eot is not None else newline or [0]]
    prompts = [tokenizer.decode(ids[0])]
if not all(ids) or not (ids or interactive):
    raise ValueError('the prompt is empty; give at least one character: --start=...')
if device == 'cpu' and (quantize or not compile):
    pack(
        model,
        1 if interactive else min(batch_size, num_samples * len(ids)),
        int8=quantize == 'int8',
    )
options = dict(
    compiled=compiled,
    kept={},
    temperature=temperature,
    top_k=top_k or None,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
    seed=seed,
    stride=stride,
    vocab_size=tokenizer.vocab_size,
)


# -----------------------------------------------------------------------------
# text out
def find_answer():
    """The function `answer` in the prepare.py of the weights' dataset, or one that knows none."""
    name = str(loaded.get('config', {}).get('dataset'))
    path = os.path.join(dataset_dir(name), 'prepare.py')
    ours = re.fullmatch(r'\w+', name)  # the name came with the weights; it leads to no other folder
    if ours and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            if 'def answer(' in f.read():
                return importlib.import_module(f'data.{name}.prepare').answer
    return lambda question: None


answer, mark, rights = find_answer(), loaded.get('config', {}).get('mask_before_token'), []


def so_far(prompt, new, ended):
    """The text of new tokens after those of a prompt as far as it may be shown: no stop, nothing that may become one, no part of a character."""
    text = continuation(tokenizer, prompt, new)
    ends = [text.find(s) for s in stops if s in text]
    if ends or ended:
        return text[: min(ends, default=None)]
    text = text.rstrip('\ufffd')
    begun = max([n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])], default=0)
    return text[: len(text) - begun]


def judged(prompt, text):
    """What follows a line of a task: a tick, or a cross and the answer; '' where none is known."""
    line = prompt.rpartition('\n')[2] + text.partition('\n')[0]
    question, there, given = line.partition(mark or '\n')
    right = answer(question) if there else None
    if right is None:
        return ''
    rights.append(given == right)
    return ' \u2713' if given == right else f' \u2717 ({right})'


def sample(ids, samples=range(1), cache=None, show=lambda text: None):
    """
    The texts number `samples` that continue each of `ids`, lists of token ids: lists of new token ids, made in one batch.
    show() gets them piece by piece as they grow, one after the other, with what stands before and between them.
    """
    new, ended, current, shown = [[] for _ in range(len(ids) * len(samples))], set(), 0, None

    def ends(b, tokens):
        n = 4 * max(map(len, stops))  # 4 bytes a character at most
        if any(
            s in continuation(tokenizer, ids[b // len(samples)] + tokens[:-n], tokens[-n:])
            for s in stops
        ):
            ended.add(b)
        return b in ended

    def show_on():
        nonlocal current, shown
        while current < len(new):
            if shown is None:
                show('' if cache else tokenizer.decode(ids[current // len(samples)]))
            text, shown = (
                so_far(ids[current // len(samples)], new[current], current in ended),
                shown or 0,
            )
            show(text[shown:])
            shown = len(text)
            if current not in ended:
                return
            prompt = tokenizer.decode(ids[current // len(samples)])
            show('\n' if cache else f'{judged(prompt, text)}\n---------------\n')
            current, shown = current + 1, None

    show_on()
    for tokens in stream(
        model, ids, max_new_tokens, samples, stop=ends if stops else None, cache=cache, **options
    ):
        for sequence, token in zip(new, tokens.tolist()):
            sequence += [token] if token >= 0 else []
        show_on()
    ended.update(range(len(new)))
    show_on()
    return new


def terminal(text):
    """Show text at once, whether or not the line is complete."""
    print(text, end='', flush=True)


began, made = time.perf_counter(), 0
if interactive:  # a text that goes on and on; what was said is not computed again
    with contextlib.suppress(ImportError):  # the arrow keys; Windows' console has its own
        import readline  # noqa: F401
    if sys.stdin.isatty():
        print('what you write is continued; Ctrl-D ends', file=sys.stderr)
    context, size = [], model.config.block_size
    cache = new_cache(model, static=compile or 'cuda' in device)
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            break
        except UnicodeDecodeError as e:
            print(f'that is not UTF-8 text: {e.reason}')
            continue
        within = (
            context
            and context[-1] != tokenizer.eot
            and not tokenizer.decode(context).endswith('\n')
        )  # a line that has not ended
        try:
            line = tokenizer.encode('\n' + line if within and newline else line)
        except ValueError as e:  # a character that the vocabulary lacks
            print(e)
            continue
        context += line
        if (
            len(context) > size and model.config.pos == 'learned'
        ):  # they have an end: what is far back is forgotten
            context = context[-size // 2 :]
            cache.restart(torch.zeros_like(cache.pad))
        if context:
            context += sample([context], cache=cache, show=terminal)[0]
else:
    rows = []
    here = max(1, batch_size // num_samples)  # prompts at once
    for first in range(0, len(ids), here):
        for number in range(0, num_samples, batch_size):
            samples = range(number, min(num_samples, number + batch_size))
            new = sample(
                ids[first : first + here], samples, show=(lambda text: None) if output else terminal
            )
            made += sum(map(len, new))
            rows += [
                dict(
                    prompt=prompts[first + b // len(samples)],
                    text=so_far(ids[first + b // len(samples)], tokens, True),
                )
                for b, tokens in enumerate(new)
            ]
    if output:
        write_whole(
            output,
            lambda f: f.write(
                ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()
            ),
        )
    seconds = time.perf_counter() - began
    written = f', written to {output}' if output else ''
    right = f', {sum(rights)} of {len(rights)} answers right' if rights else ''
    speed = f'{made:,} tokens in {seconds:.1f} s, {made / seconds:,.0f} tokens/s'
    print(f'{speed}{right}{written}', file=sys.stderr)
