"""
Score a trained run, any checkpoint, or GPT-2: loss, perplexity and bits per byte, for tasks on lines how many of them
are answered right, or the benchmarks of the lm-evaluation-harness.

$ python eval.py --out_dir=out-shakespeare-char
$ python eval.py --out_dir=out-calculator --num_lines=1000
$ python eval.py --init_from=gpt2 --tasks=lambada_openai,hellaswag,arc_easy,piqa --output=gpt2.json
$ torchrun --standalone --nproc_per_node=8 eval.py --init_from=gpt2-xl --dataset=openwebtext
"""

from configurator import check, configure, writable

# -----------------------------------------------------------------------------
# what
init_from = 'resume'  # out_dir's best.pt, else its ckpt.pt; or other weights: a folder, a file, a hub name such as 'gpt2-xl'
out_dir = 'out'  # folder of the run to score
dataset = ''  # a folder of data/ that was prepared, '': the one that the run was trained on
# how much
eval_iters = 200  # batches for the loss of each split; the whole split when it has fewer
batch_size = 16  # sequences per batch and process
block_size: int | None = None  # tokens of a sequence, None: as many as the model sees
num_lines = 10000  # for tasks on lines: how many lines of the validation split to answer, 0: none
show_wrong = 10  # how many wrong answers to show
# benchmarks, of the package lm_eval
tasks = ''  # its names for them with commas between; they take the place of the losses
include_path = ''  # a folder with tasks of your own, as YAML
num_fewshot: int | None = None  # examples before each question, None: as the task has it
limit: float | None = None  # questions of each task, or below 1 the share of them, None: all
output = ''  # a .json file for the results
# system
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # as in train.py; or 'float32', 'bfloat16', 'float16'
quantize = ''  # 'int8': weights of 8 bits, as sample.py can use them on a CPU
config, given = configure(
    globals(),
    recipes_of=('train.py', 'model.py:GPTConfig'),
    ignore_from_recipes=('init_from', 'eval_iters', 'batch_size', 'block_size'),
    paths=('out_dir', 'init_from', 'include_path', 'output'),
)  # a training recipe tells out_dir and device

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
from support.files import write_whole
from support.runlog import perplexity

check(config, 'eval_iters batch_size block_size', least=1)
check(config, 'num_lines show_wrong num_fewshot', least=0)
check(config, 'limit', above=0)
writable(config, 'output')
for name in ('output', 'include_path', 'num_fewshot', 'limit'):
    if name in given and not tasks:
        raise ValueError(f'{name} is for benchmarks; add --tasks=hellaswag or another')
device, dtype, _ = resolve(device, 'auto' if dtype == 'fast' else dtype, False, quantize)
tune(device, lengths_vary=True)
rank, world_size = parallel.start('auto', device, 600, int(os.environ.get('WORLD_SIZE', 1)))
ctx = autocast(device, dtype)

# -----------------------------------------------------------------------------
# model
source = ckpt.best(out_dir) if init_from == 'resume' else init_from
model, loaded = weights.open_model(source)
model.eval().to(device)
block_size = model.config.block_size if block_size is None else block_size
if block_size > model.config.block_size:
    raise ValueError(
        f'block_size={block_size} is more than the {model.config.block_size} of {source}'
    )
num_params = model.get_num_params()
if quantize:
    pack(model.to(DTYPES[dtype]), int8=True)
trained = loaded.get('config', {})

# -----------------------------------------------------------------------------
# benchmarks
if tasks:
    if world_size > 1:
        raise ValueError('benchmarks run in one process; leave torchrun away')
    try:
        import lm_eval

        from support.harness import Harness
    except ImportError as e:
        raise ValueError(f"--tasks needs the package lm_eval: pip install '.[eval]' ({e})") from e
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
    except (
        Exception
    ) as e:  # tasks that are unknown, and data that cannot be reached, have many kinds
        raise ValueError(
            f'tasks={tasks}: {(str(e).strip() or type(e).__name__).splitlines()[0]}'
        ) from e
    print0(lm_eval.utils.make_table(results))
    if output:
        told = {name: results[name] for name in ('results', 'n-shot', 'n-samples', 'versions')}
        write_whole(output, lambda f: f.write(json.dumps(told, indent=1, default=str).encode()))
    raise SystemExit

# -----------------------------------------------------------------------------
# dataset and tokenizer
dataset = dataset or trained.get('dataset', '')
if not dataset:
    raise ValueError(f'{source} was not trained on a dataset of ours; name one: --dataset=...')
data_dir = dataset_dir(dataset)
meta = loaded.get('meta') or dataset_meta(data_dir)
weights.check_tokenizer(loaded, source, data_dir)
tokenizer = from_meta(meta)
mark = trained.get('mask_before_token', '')
lines = read_lines(
    meta,
    model.config.vocab_size,
    mark,
    trained.get('mask_per_line', True),
    trained.get('align_to_lines', False),
)
print0(
    f'{source}: {num_params / 1e6:.2f}M parameters on {device}, {quantize or dtype}'
    + (f', after {loaded["iter_num"]:,} iterations' if 'iter_num' in loaded else '')
)


# -----------------------------------------------------------------------------
# loss
def evaluate(X, Y):
    with ctx:
        return model(X, Y)[1]


bytes_of = torch.tensor(byte_counts(meta), device=device)
for split in ('train', 'val'):
    path = os.path.join(data_dir, f'{split}.bin')
    must_exist(path)
    windows = max(
        1, (must_hold(path, block_size)[0] - 1) // block_size
    )  # batches are filled up to their full size
    data = Loader(path, block_size, min(batch_size, windows), model.config.vocab_size, lines=lines)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)

    def batches():
        """This rank's share of the windows; what they hold is counted on the way."""
        for X, Y in data.eval_batches(eval_iters, rank, world_size, device):
            num_bytes.add_((bytes_of[Y.clamp_min(0)] * (Y >= 0)).sum())
            yield X, Y

    loss, count = parallel.mean_losses(evaluate, device, batches())[0].tolist()
    if not count:
        raise ValueError(
            f'{data.path}: none of the targets in {eval_iters} batches count; raise --eval_iters'
        )
    bits = loss / math.log(2) * count / parallel.all_reduce(num_bytes).item()
    print0(
        f'{split:<5} loss {loss:.4f}, perplexity {perplexity(loss):.3f}, {bits:.4f} bits per byte, over {count:,.0f} tokens'
        + ' of answers' * data.masked
    )


# -----------------------------------------------------------------------------
# exact match of tasks on lines: each line a question, the mark, an answer
def answered_right(questions):
    """
    Which of these (question, answer), lists of token ids, greedy decoding would answer right (N,): it does when each
    token of the answer is the likeliest after the right ones before it, so one pass through the model tells.
    """
    ids = torch.zeros(len(questions), max(len(q) + len(a) for q, a in questions), dtype=torch.int64)
    asked = torch.ones_like(ids, dtype=torch.bool)  # or behind the answer
    for i, (q, a) in enumerate(questions):
        ids[i, : len(q) + len(a)] = torch.tensor(q + a)
        asked[i, len(q) : len(q) + len(a)] = False
    X, Y = ids[:, :-1].to(device), ids[:, 1:].to(device)
    with ctx:
        logits, _ = model(X, Y)
    likeliest = logits[:, :, : tokenizer.vocab_size].argmax(dim=-1)
    return ((likeliest == Y) | asked[:, 1:].to(device)).all(dim=1)


def find_kinds(path):
    """The function `kinds` in a dataset's prepare.py, which sorts its questions; sorted by length where there is none."""
    if os.path.basename(dataset) == dataset and os.path.exists(
        path
    ):  # a name that came with weights leads to no other folder
        with open(path, encoding='utf-8') as f:
            if 'def kinds(' in f.read():  # nobody's script is executed to find out
                spec = importlib.util.spec_from_file_location('prepare', path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module.kinds
    return lambda question: [('characters', f'{len(question):2d}')]


if mark and num_lines and lines.per_line and lines.newline.any():
    found = read_questions(os.path.join(data_dir, 'val.bin'), lines, num_lines)
    questions = [(q, a) for q, a in found if len(q) + len(a) <= model.config.block_size + 1]
    left_out = (
        f' ({len(found) - len(questions):,} longer than block_size left out)'
        if len(found) > len(questions)
        else ''
    )
    order = sorted(
        range(len(questions)), key=lambda i: sum(map(len, questions[i]))
    )  # lines of one length together
    right = torch.zeros(len(questions), dtype=torch.int64, device=device)
    with torch.no_grad():
        longest = max((len(q) + len(a) for q, a in questions), default=1)
        n = max(
            1, min(256, 2**27 // (model.config.vocab_size * longest))
        )  # as many as half a GB has room for the logits of
        for b in range(rank * n, len(order), world_size * n):
            right[order[b : b + n]] = answered_right(
                [questions[i] for i in order[b : b + n]]
            ).long()
    right = parallel.all_reduce(right).tolist()

    texts = [tokenizer.decode(q).removesuffix(mark) for q, _ in questions]
    kinds, table = find_kinds(os.path.join(data_dir, 'prepare.py')), {}
    for text, is_right in zip(texts, right):
        for column, kind in [('all', ''), *kinds(text)]:
            table.setdefault(column, {}).setdefault(kind, []).append(is_right)
    print0(f'\n{"exact match" + left_out:<56} {"lines":>8} {"right":>8}')
    for column in table:
        for kind, rights in sorted(table[column].items()):
            print0(
                f'{f"{column}: {kind}".removesuffix(": "):<56} {len(rights):>8,} {sum(rights) / len(rights):>8.2%}'
            )

    wrong = [i for i, is_right in enumerate(right) if not is_right][:show_wrong]
    if wrong and rank == 0:
        rows = [('first wrong answers', 'given', 'right')]
        for i in wrong:
            q, a = questions[i]
            with ctx:
                new = [
                    int(token)
                    for token in stream(
                        model,
                        [q],
                        LONGEST,
                        temperature=0,
                        vocab_size=tokenizer.vocab_size,
                        stop=lambda _, new: lines.newline[new[-1]],
                    )
                ]
            rows.append(
                (texts[i] + mark, tokenizer.decode(new).rstrip(), tokenizer.decode(a).rstrip())
            )
        widths = [max(map(len, column)) for column in zip(*rows)]
        print0(
            '\n'
            + '\n'.join(
                '  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
                for row in rows
            )
        )
parallel.destroy()
