"""
Score a trained run, any checkpoint, or GPT-2: loss, perplexity, bits per byte and, for tasks on
lines, the share of right answers; or the benchmarks of the lm-evaluation-harness.

$ python eval.py --out_dir=out-shakespeare-char
$ python eval.py --out_dir=out-calculator --num_lines=1000
$ python eval.py --init_from=gpt2 --tasks=lambada_openai,hellaswag,piqa --output=gpt2.json
$ torchrun --standalone --nproc_per_node=8 eval.py --init_from=gpt2-xl --dataset=openwebtext
"""

from configurator import check, configure, writable

# -----------------------------------------------------------------------------
# what to score
init_from = 'resume'  # out_dir's best.pt or ckpt.pt; or a folder, a file, a hub name: 'gpt2-xl'
out_dir = 'out'  # folder of the run to score
dataset = ''  # a prepared folder of data/, '': the one that the run was trained on
# how much
eval_iters = 200  # batches per split for the loss, at most the whole split
batch_size = 16  # sequences per batch and process
block_size: int | None = None  # tokens per sequence, None: the model's block_size
num_lines = 10000  # for tasks on lines: number of lines of the validation split to answer, 0: none
show_wrong = 10  # number of wrong answers to print
# benchmarks (package lm_eval)
tasks = ''  # names of its tasks, separated by commas; they replace the losses
include_path = ''  # folder with tasks of your own, as YAML
num_fewshot: int | None = None  # examples before each question, None: the default of the task
limit: float | None = None  # number of questions per task, below 1 a fraction of them, None: all
output = ''  # write the results to this .json file
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'
quantize = ''  # 'int8': 8-bit weights, as sample.py can use them on a CPU
config, given = configure(
    globals(),
    recipes_of=('train.py', 'model.py:GPTConfig'),  # a training recipe sets out_dir and device
    ignore_from_recipes=('init_from', 'eval_iters', 'batch_size', 'block_size'),  # for training
    paths=('out_dir', 'init_from', 'include_path', 'output'),
)

# -----------------------------------------------------------------------------
import importlib.util
import json
import math
import os

import torch

from data.lines import LONGEST, read_lines, read_questions
from data.loader import Loader, must_exist, must_hold
from data.tokenizer import byte_counts, dataset_dir, dataset_meta, from_meta
from generate import stream
from support import checkpoint as ckpt
from support import distributed as parallel
from support import weights
from support.cpu import pack
from support.device import DTYPES, autocast, resolve, tune
from support.distributed import print0
from support.errors import UserError
from support.files import write_whole
from support.runlog import perplexity

LOGITS = 2**27  # maximum number in a batch of questions: half a GB in float32

check(config, 'eval_iters batch_size block_size', least=1)
check(config, 'num_lines show_wrong num_fewshot', least=0)
check(config, 'limit', above=0)
writable(config, 'output')
for name in ('output', 'include_path', 'num_fewshot', 'limit'):
    if name in given and not tasks:
        raise UserError(f'{name} is for benchmarks; add --tasks=hellaswag or another')
dtype = 'auto' if dtype == 'fast' else dtype  # for training only
device, dtype, _ = resolve(device, dtype, False, quantize)
tune(device, lengths_vary=True)
rank, world_size = parallel.start('auto', device, 600, int(os.environ.get('WORLD_SIZE', 1)))
ctx = autocast(device, dtype)

# -----------------------------------------------------------------------------
# model
source = ckpt.best(out_dir) if init_from == 'resume' else init_from
model, loaded = weights.open_model(source)
model.eval().to(device)
longest = model.config.block_size
block_size = longest if block_size is None else block_size
if block_size > longest:
    raise UserError(f'block_size={block_size} is more than the {longest} of {source}')
num_params = model.get_num_params()
if quantize:
    pack(model.to(DTYPES[dtype]), int8=True)
trained = loaded.get('config', {})  # the settings of its training


# -----------------------------------------------------------------------------
# benchmarks
def run_benchmarks():
    """Print the harness's table for `tasks` and write the results into `output`."""
    if world_size > 1:
        raise UserError('benchmarks run in one process; leave torchrun away')
    try:
        import lm_eval

        from support.harness import Harness
    except ImportError as e:
        raise UserError(f"--tasks needs the package lm_eval: pip install '.[eval]' ({e})") from e
    tokenizer = from_meta(weights.tokenizer_meta(loaded, source, model.config.vocab_size))
    try:
        results = lm_eval.simple_evaluate(
            Harness(model, tokenizer, ctx, batch_size),
            tasks=tasks.split(','),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=lm_eval.tasks.TaskManager(include_path=include_path or None),
        )
    except Exception as e:  # many types, for unknown tasks and for data that cannot be reached
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f'tasks={tasks}: {reason}') from e
    print0(lm_eval.utils.make_table(results))
    if output:
        kept = {name: results[name] for name in ('results', 'n-shot', 'n-samples', 'versions')}
        write_whole(output, lambda f: f.write(json.dumps(kept, indent=1, default=str).encode()))


if tasks:
    run_benchmarks()
    raise SystemExit

# -----------------------------------------------------------------------------
# dataset and tokenizer
dataset = dataset or trained.get('dataset', '')
if not dataset:
    raise UserError(f'{source} was not trained on a dataset of ours; name one: --dataset=...')
data_dir = dataset_dir(dataset)
meta = loaded.get('meta') or dataset_meta(data_dir)
weights.check_tokenizer(loaded, source, data_dir)
tokenizer = from_meta(meta)
mark = trained.get('mask_before_token', '')
mask_per_line = trained.get('mask_per_line', True)
align_to_lines = trained.get('align_to_lines', False)
lines = read_lines(meta, model.config.vocab_size, mark, mask_per_line, align_to_lines)
about = f'{source}: {num_params / 1e6:.2f}M parameters on {device}, {quantize or dtype}'
if 'iter_num' in loaded:
    about += f', after {loaded["iter_num"]:,} iterations'
print0(about)


# -----------------------------------------------------------------------------
# loss
def evaluate(X, Y):
    with ctx:
        return model(X, Y)[1]


def score_split(split):
    """Print loss, perplexity and bits per byte of a split, over fixed windows, on all ranks."""
    path = os.path.join(data_dir, f'{split}.bin')
    must_exist(path)
    num_tokens, _ = must_hold(path, block_size)
    # batches are filled to their full size, so it is at most the number of windows
    size = min(batch_size, max(1, (num_tokens - 1) // block_size))
    mine = {'rank': rank, 'world_size': world_size, 'device': device}
    data = Loader(path, block_size, size, model.config.vocab_size, lines=lines, **mine)
    bytes_of = torch.tensor(byte_counts(meta), device=device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)

    def batches():
        """This rank's batches; their bytes are counted on the way."""
        for X, Y in data.eval_batches(eval_iters):
            num_bytes.add_((bytes_of[Y.clamp_min(0)] * (Y >= 0)).sum())
            yield X, Y

    loss, count = parallel.mean_losses(evaluate, device, batches())[0].tolist()
    if not count:
        raise UserError(
            f'{path}: none of the targets in {eval_iters} batches count; raise --eval_iters'
        )
    bits = loss / math.log(2) * count / parallel.all_reduce(num_bytes).item()
    kind = 'tokens of answers' if data.masked else 'tokens'
    print0(
        f'{split:<5} loss {loss:.4f}, perplexity {perplexity(loss):.3f}, '
        f'{bits:.4f} bits per byte, over {count:,.0f} {kind}'
    )


# -----------------------------------------------------------------------------
# exact match for tasks on lines; each line is a question, the mark, an answer
def score_lines():
    """Answer lines of the validation split on all ranks; print a table and wrong answers."""
    found = read_questions(os.path.join(data_dir, 'val.bin'), lines, num_lines)
    questions = [(q, a) for q, a in found if len(q) + len(a) <= longest + 1]
    right = answer_all(questions)
    texts = [tokenizer.decode(q).removesuffix(mark) for q, _ in questions]
    title = 'exact match'
    if len(found) > len(questions):
        title += f' ({len(found) - len(questions):,} longer than block_size left out)'
    print_table(title, texts, right)
    wrong = [i for i in range(len(right)) if not right[i]][:show_wrong]
    if wrong and rank == 0:
        print_answers(questions, texts, wrong)


@torch.no_grad()
def answer_all(questions):
    """1 for each (question, answer), lists of token ids, that is answered right, otherwise 0."""
    lengths = [len(q) + len(a) for q, a in questions]
    order = sorted(range(len(questions)), key=lambda i: lengths[i])  # similar lengths together
    most = LOGITS // (model.config.vocab_size * max(lengths, default=1))
    n = max(1, min(256, most))
    right = torch.zeros(len(questions), dtype=torch.int64, device=device)
    for first in range(rank * n, len(order), world_size * n):
        batch = order[first : first + n]
        right[batch] = answered_right([questions[i] for i in batch]).long()
    return parallel.all_reduce(right).tolist()


def answered_right(questions):
    """
    Whether greedy decoding answers each of these (question, answer) right (N,). It does if each
    token of the answer is the most likely after the right ones, so one forward pass is enough.
    """
    ids = torch.zeros(len(questions), max(len(q) + len(a) for q, a in questions), dtype=torch.int64)
    targets = torch.full_like(ids, -1)
    for b, (q, a) in enumerate(questions):
        ids[b, : len(q) + len(a)] = torch.tensor(q + a)
        targets[b, len(q) : len(q) + len(a)] = torch.tensor(a)
    X, Y = ids[:, :-1].to(device), targets[:, 1:].to(device)
    with ctx:
        logits, _ = model(X, Y)
    most_likely = logits[:, :, : tokenizer.vocab_size].argmax(dim=-1)
    return ((most_likely == Y) | (Y < 0)).all(dim=1)


def print_table(title, texts, right):
    """Print the share of right answers for each kind of question."""
    kinds, table = find_kinds(), {}  # table: {column: {kind: [0 or 1 for each answer]}}
    for text, is_right in zip(texts, right):
        for column, kind in [('all', ''), *kinds(text)]:
            table.setdefault(column, {}).setdefault(kind, []).append(is_right)
    print0(f'\n{title:<56} {"lines":>8} {"right":>8}')
    for column, rows in table.items():
        for kind, rights in sorted(rows.items()):
            label = f'{column}: {kind}' if kind else column
            print0(f'{label:<56} {len(rights):>8,} {sum(rights) / len(rights):>8.2%}')


def find_kinds():
    """The function `kinds` in the dataset's prepare.py, by default one that sorts by length."""
    path = os.path.join(data_dir, 'prepare.py')
    # a name that came with weights may not lead to another folder
    if os.path.basename(dataset) == dataset and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            has_kinds = 'def kinds(' in f.read()  # do not execute other scripts
        if has_kinds:
            spec = importlib.util.spec_from_file_location('prepare', path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.kinds
    return lambda question: [('characters', f'{len(question):2d}')]


def print_answers(questions, texts, wrong):
    """Print the model's and the right answers to the questions with the numbers `wrong`."""
    rows = [('first wrong answers', 'given', 'right')]
    for i in wrong:
        question, answer = questions[i]
        reply = tokenizer.decode(greedy(question)).rstrip()
        rows.append((texts[i] + mark, reply, tokenizer.decode(answer).rstrip()))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print0('')
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        print0('  '.join(cells).rstrip())


def greedy(question):
    """The tokens of the model's most likely answer, up to a newline."""
    ends = lambda b, new: lines.newline[new[-1]]
    size = tokenizer.vocab_size
    with ctx:
        steps = stream(model, [question], LONGEST, temperature=0, vocab_size=size, stop=ends)
        return [int(token) for token in steps]


for split in ('train', 'val'):
    score_split(split)
if mark and num_lines and lines.per_line and lines.newline.any():
    score_lines()
parallel.destroy()
