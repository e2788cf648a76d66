"""bench.py --mode=generate: text by random weights, by our ways to make it and transformers'."""

import itertools
from functools import partial
from statistics import median

import torch

import generate
from support.bench import spread
from support.cpu import pack
from support.errors import UserError


def run(bench, compare):
    """A token reads all weights once, so the ceiling is the speed of a matrix times a vector."""
    asked = f'prompt_tokens={bench.prompt_tokens} and new_tokens={bench.new_tokens}'
    if bench.prompt_tokens + bench.new_tokens > bench.block_size:
        raise UserError(f'{asked} do not fit block_size={bench.block_size}')
    if compare not in ('', 'transformers'):
        raise UserError(f"compare={compare!r}: generation is compared with 'transformers'")
    model = new_model(bench)
    prompt = torch.randint(bench.vocab_size, (1, bench.prompt_tokens), device=bench.device)
    runs = our_runs(bench, model, prompt)
    runs['recomputing the context, batch 1'] = lambda: recompute(model, prompt, bench.new_tokens)
    if compare:
        runs['transformers, batch 1'] = transformers_run(bench, prompt)

    bandwidths = []  # interleaved too, since the speed of a machine changes
    measure = {'ceiling': lambda: bandwidths.append(bench.matvec_ceiling())}
    taken = bench.interleave({**measure, **runs}, bench.steps)
    lengths = f'{bench.prompt_tokens} tokens of prompt, {bench.new_tokens} new ones'
    print(f'{bench.describe(model)}; {lengths}')
    by_torch, fastest = (median(speeds) for speeds in zip(*bandwidths[1:]))
    weights = model.get_num_params() * bench.float_type.itemsize  # bytes
    note = f'a matrix times a vector: {fastest / 1e9:.1f} GB/s; '
    note += f'by torch.mv {by_torch / 1e9:.1f} GB/s, {by_torch / weights:.1f} tokens/s'
    bench.report('ceiling of batch 1', fastest / weights, 'tokens/s', note, 1)
    for name in runs:
        batch = int(name.split()[-1])
        speeds = [batch * bench.new_tokens / seconds for seconds in taken[name]]
        note = spread(speeds, 1, 1)
        if batch == 1 and 'int8' not in name:
            note += f', {median(speeds) * weights / fastest:.0%} of the ceiling'
        bench.report(name, median(speeds), 'tokens/s', note, 1)


def new_model(bench):
    return bench.make_model().to(bench.device, bench.float_type).eval()


def our_runs(bench, model, prompt):
    """{name: function} of the ways in which sample.py makes text, in batches of 1 and 16."""

    def text(model, batch, **options):
        numbers, ids = range(batch), prompt.tolist()
        list(generate.stream(model, ids, bench.new_tokens, numbers, temperature=0, **options))

    ways = {'': False}  # name: is the step recorded?
    if bench.cuda_graph is not False and generate.can_record(torch.device(bench.device)):
        ways = {'': True, 'no graph, ': False}
    models = {batch: new_model(bench) for batch in (1, 16)}
    runs = {}
    for (name, graph), batch in itertools.product(ways.items(), models):
        run = partial(text, models[batch], batch, cuda_graph=graph, kept={})
        runs[f'flatgpt, {name}batch {batch}'] = run
        if bench.compile:
            compiled = torch.compile(model, dynamic=False)
            run = partial(text, model, batch, cuda_graph=graph, compiled=compiled, kept={})
            runs[f'flatgpt, compiled, {name}batch {batch}'] = run
    if bench.device == 'cpu':  # as sample.py does
        for batch, packed in models.items():
            pack(packed, batch)
        int8 = bench.make_model().bfloat16().eval()
        pack(int8, int8=True)
        runs['flatgpt, int8, batch 1'] = partial(text, int8, 1)
    return runs


@torch.inference_mode()
def recompute(model, ids, new_tokens):
    """Make text without a cache."""
    for _ in range(new_tokens):
        token = model(ids)[0][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)


def transformers_run(bench, prompt):
    model = bench.transformers_gpt2().to(bench.device, bench.float_type).eval()
    options = dict(max_new_tokens=bench.new_tokens, do_sample=False, pad_token_id=0)
    return lambda: model.generate(prompt, **options)
