"""
Text in, text out: sample from a trained run, any checkpoint, or GPT-2.

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
$ python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5 --max_new_tokens=100
$ python sample.py --start=FILE:prompt.txt
$ python sample.py config/sample_calculator.py --start="2+4-8*10="
$ python sample.py --start=LINES:prompts.txt --output=answers.jsonl
$ python sample.py --out_dir=out-shakespeare-char --interactive=True
"""

from configurator import check, configure, writable

# -----------------------------------------------------------------------------
# weights
init_from = 'resume'  # out_dir's best.pt or ckpt.pt; or a folder, a file, a hub name: 'gpt2-xl'
out_dir = 'out'  # folder of the run to sample from
# texts; without start they begin at the end of a text or at a newline
start: str | list = ''  # prompt, FILE:name, LINES:name (a prompt per line), - (stdin), or a list
num_samples = 10  # number of texts for each prompt
max_new_tokens = 500  # number of tokens per text
interactive = False  # True: chat; read a prompt, continue the text, read the next prompt
output = ''  # write the texts to this .jsonl file, '': print them
batch_size = 64  # number of texts per batch
# sampling
temperature = 0.8  # below 1.0 less random, above 1.0 more random, 0: always the most likely token
top_k = 200  # sample from this many most likely tokens, 0: all
top_p = 1.0  # sample from the fewest tokens with this total probability
min_p = 0.0  # sample from tokens with this fraction of the highest probability
repetition_penalty = 1.0  # above 1.0: tokens that occurred before become less likely
stop_token_char: str | None = ''  # end a text before this character, which must be one token
stop: str | list = ''  # end a text before this string, or before the first of a list
seed = 1337  # the same seed and prompt give the same texts
stride = 1  # past block_size, recompute learned positions every this many tokens; 64 is much faster
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'
quantize = ''  # 'int8': 8-bit weights, for one text at a time on a CPU
compile: bool | str = False  # True: torch.compile, slow to start and faster after that
config, given = configure(
    globals(),
    recipes_of=('train.py', 'model.py:GPTConfig'),  # a training recipe sets out_dir and device
    ignore_from_recipes=('init_from', 'batch_size', 'compile', 'seed'),  # there for training
    paths=('out_dir', 'init_from', 'output'),
)

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
from support.errors import FileError, UserError
from support.files import write_whole

check(config, 'num_samples max_new_tokens batch_size stride', least=1)
check(config, 'temperature top_k', least=0)
check(config, 'top_p', above=0, most=1)
check(config, 'min_p', least=0, most=1)
check(config, 'repetition_penalty', above=0)
check(config, 'seed', most=2**63 - 1)
writable(config, 'output')
starts = [start] if isinstance(start, str) else list(start)
stops = [stop] if isinstance(stop, str) else list(stop)
if sys.stdin is None and (interactive or '-' in starts):
    raise UserError('standard input is closed; give a prompt by --start=... instead')
if interactive and given.get('start', '').startswith('--'):
    raise UserError('--start is not read with --interactive; type it at the prompt')
if interactive and output:
    raise UserError('--output is not written with --interactive; leave one of them out')
for name, texts in (('start', starts), ('stop', stops)):
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{name}={config[name]} must be a text or a list of texts')
for i, entry in enumerate(starts):
    if entry.startswith(('FILE:', 'LINES:')):
        kind, _, path = entry.partition(':')
        if not os.path.isfile(os.path.expanduser(path)):
            raise FileError(f'prompt file {path} not found')
        starts[i] = f'{kind}:{os.path.expanduser(path)}'
stops = [text for text in (stop_token_char, *stops) if text]
dtype = 'auto' if dtype == 'fast' else dtype  # for training only
device, dtype, compile = resolve(device, dtype, compile, quantize)
tune(device, lengths_vary=True)

# -----------------------------------------------------------------------------
# model and tokenizer
source = ckpt.best(out_dir) if init_from == 'resume' else init_from
model, loaded = weights.open_model(source)
model.eval().to(device, DTYPES[dtype])  # the weights too: autocast would convert them every step
compiled = torch.compile(model, dynamic=False) if compile else None
tokenizer = from_meta(weights.tokenizer_meta(loaded, source, model.config.vocab_size))
if stop_token_char:
    n = len(tokenizer.encode(stop_token_char))
    if n != 1:
        raise UserError(
            f'stop_token_char={stop_token_char!r} is {n} tokens; --stop takes any string'
        )
newline = []
with contextlib.suppress(ValueError):  # not in every vocabulary
    newline = tokenizer.encode('\n')


# -----------------------------------------------------------------------------
# prompts
def read_prompts(entry):
    """The prompts that an entry of `start` stands for."""
    kind, _, path = entry.partition(':')
    if entry == '-':
        return [read_text(0, 'the prompt')]
    if kind == 'FILE':
        return [read_text(path, f'prompt file {path}')]
    if kind == 'LINES':
        return [line for line in read_text(path, f'prompt file {path}').split('\n') if line]
    if any('\ud800' <= c <= '\udfff' for c in entry):  # bytes that Python could not decode
        raise UserError('the prompt is not UTF-8 text')
    return [entry]


def read_text(path, name):
    """The text of a UTF-8 file, or of standard input (0), without the mark that Windows adds."""
    try:
        with open(path, encoding='utf-8-sig', closefd=path != 0) as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise UserError(f'{name} is not UTF-8 text: {e.reason} at byte {e.start}') from e


if interactive:
    prompts, ids = [], []
elif 'start' in given:
    prompts = [prompt for entry in starts for prompt in read_prompts(entry)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]  # all are checked before sampling
else:
    ids = [[tokenizer.eot] if tokenizer.eot is not None else newline or [0]]
    prompts = [tokenizer.decode(ids[0])]
if not interactive and not (ids and all(ids)):
    raise UserError('the prompt is empty; give at least one character: --start=...')
if device == 'cpu' and (quantize or not compile):
    rows = 1 if interactive else min(batch_size, num_samples * len(ids))
    pack(model, rows, int8=quantize == 'int8')


# -----------------------------------------------------------------------------
# answers of tasks on lines
def find_answer():
    """The function `answer` in the prepare.py of the weights' dataset, None if there is none."""
    name = str(loaded.get('config', {}).get('dataset'))
    path = os.path.join(dataset_dir(name), 'prepare.py')
    # the name came with the weights: it may not lead to another folder
    if not re.fullmatch(r'\w+', name) or not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as f:
        if 'def answer(' not in f.read():
            return None
    return importlib.import_module(f'data.{name}.prepare').answer


answer, mark = find_answer(), loaded.get('config', {}).get('mask_before_token')
rights = []  # for each answer, whether it is right


def judged(prompt, text):
    """A tick, or a cross and the right answer, to print after a text; '' if it is unknown."""
    line = prompt.rpartition('\n')[2] + text.partition('\n')[0]
    question, found, reply = line.partition(mark or '\n')
    right = answer(question) if answer and found else None
    if right is None:
        return ''
    rights.append(reply == right)
    return ' \u2713' if reply == right else f' \u2717 ({right})'


# -----------------------------------------------------------------------------
# texts
def so_far(prompt, new, ended):
    """
    The text of the tokens `new` after those of `prompt`, up to a stop. Unless it has ended,
    without a part of a character at its end and without what may become a stop.
    """
    text = continuation(tokenizer, prompt, new)
    ends = [text.find(s) for s in stops if s in text]
    if ends or ended:
        return text[: min(ends, default=None)]
    text = text.rstrip('\ufffd')
    begun = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(begun, default=0)]


def show(text):
    """Print a piece of text at once, unless the texts are written into a file."""
    if not output:
        print(text, end='', flush=True)


class Texts:
    """The texts of one batch while they grow, shown piece by piece and in order."""

    def __init__(self, prompts, chat):
        self.prompts, self.chat = prompts, chat  # the token ids of each text's prompt
        self.prompt_texts = ['' if chat else tokenizer.decode(prompt) for prompt in prompts]
        self.new = [[] for _ in prompts]  # new tokens of each text
        self.ended = set()  # numbers of the texts that have ended
        self.current = self.shown = 0  # the text to show, how many characters are shown

    def ends(self, b, tokens):
        """Whether text number b ends with these new tokens, since they contain a stop."""
        n = 4 * max(map(len, stops))  # a character has at most 4 bytes, each may be a token
        tail = continuation(tokenizer, self.prompts[b] + tokens[:-n], tokens[-n:])
        if any(s in tail for s in stops):
            self.ended.add(b)
        return b in self.ended

    def add(self, tokens):
        """Add a token to each text, unless it is -1, and show what is new."""
        for new, token in zip(self.new, tokens):
            if token >= 0:
                new.append(token)
        self.show_more()

    def end(self):
        self.ended.update(range(len(self.new)))
        self.show_more()

    def show_more(self):
        """Show the current text, and if it has ended also the next ones."""
        while self.current < len(self.new):
            b = self.current
            text = so_far(self.prompts[b], self.new[b], b in self.ended)
            whole = self.prompt_texts[b] + text
            show(whole[self.shown :])
            self.shown = len(whole)
            if b not in self.ended:
                return
            verdict = '' if self.chat else judged(self.prompt_texts[b], text) + '\n---------------'
            show(f'{verdict}\n')
            self.current, self.shown = b + 1, 0


options = dict(temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p)
options.update(repetition_penalty=repetition_penalty, seed=seed, stride=stride)
options.update(vocab_size=tokenizer.vocab_size, compiled=compiled, kept={})


def sample(prompts, samples, cache=None):
    """The new tokens of each text; see stream() in generate.py. cache: the one of a chat"""
    texts = Texts([prompt for prompt in prompts for _ in samples], chat=cache is not None)
    texts.show_more()
    stop = texts.ends if stops else None
    steps = stream(model, prompts, max_new_tokens, samples, stop=stop, cache=cache, **options)
    for tokens in steps:
        texts.add(tokens.tolist())
    texts.end()
    return texts.new


# -----------------------------------------------------------------------------
# the two ways to sample
def chat():
    """
    Read a line, continue the text, read the next line, ... The cache keeps what was said, except
    with prefix_lm, which sees one question at a time.
    """
    with contextlib.suppress(ImportError):  # for the arrow keys; a Windows console has its own
        import readline  # noqa: F401
    if sys.stdin.isatty():
        print('type a text to continue; Ctrl-D exits', file=sys.stderr)
    context, size = [], model.config.block_size
    cache = new_cache(model, static=compile or 'cuda' in device)
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as e:
            print(f'that is not UTF-8 text: {e.reason}')
            continue
        if model.config.prefix_lm:  # a line is an example of its own
            context = []
            cache.restart(cache.pad)
        ended = not context or context[-1] == tokenizer.eot
        if newline and not ended and not tokenizer.decode(context).endswith('\n'):
            line = '\n' + line
        try:
            context += tokenizer.encode(line)
        except ValueError as e:  # a character that is not in the vocabulary
            print(e)
            continue
        if len(context) > size and model.config.pos == 'learned':  # no position is left
            context = context[-size // 2 :]
            cache.restart(cache.pad)
        if context:
            context += sample([context], range(1), cache)[0]


def sample_all():
    """Sample from all prompts: print the texts, or write them into `output`."""
    began, count, rows = time.perf_counter(), 0, []
    at_once = max(1, batch_size // num_samples)  # prompts per batch
    for first in range(0, len(ids), at_once):
        batch = ids[first : first + at_once]
        for number in range(0, num_samples, batch_size):
            samples = range(number, min(num_samples, number + batch_size))
            new = sample(batch, samples)
            for b, tokens in enumerate(new):
                i = first + b // len(samples)
                rows.append({'prompt': prompts[i], 'text': so_far(ids[i], tokens, ended=True)})
                count += len(tokens)
    seconds = time.perf_counter() - began
    report = f'{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s'
    if rights:
        report += f', {sum(rights)} of {len(rights)} answers right'
    if output:
        lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
        write_whole(output, lambda f: f.write(''.join(lines).encode()))
        report += f', written to {output}'
    print(report, file=sys.stderr)


if interactive:
    chat()
else:
    sample_all()
