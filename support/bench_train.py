"""bench.py --mode=train: a training step in its parts, and beside the steps of other networks."""

import importlib.util
import itertools
import os
import sys
from statistics import median

import torch
from torch.nn import functional as F

import muon
from configurator import check, fit, read_flag, read_settings
from data.loader import Loader
from data.tokenizer import dataset_dir
from support.bench import spread
from support.device import autocast, memory_gb, peak_flops
from support.errors import UserError
from support.graphs import Recorder
from support.optimizers import StepGuard


def run(bench, rivals):
    """Time a step, interleaved with those of `rivals`, the words of --compare."""
    model, batches = bench.make_model(), get_batches(bench)
    step = Trainer(bench, model, bench.make_optimizer(model, bench.optimizer))
    shape = f'{bench.batch_size} sequences of {bench.block_size} tokens'
    print(f'{bench.describe(model)}; {shape}')
    first = bench.seconds(lambda: step(*next(batches)))
    bench.report('first step', first * 1000, 'ms', 'compiles' if bench.compile else '')
    parts = time_parts(bench, step, batches)
    memory, graphs = memory_gb(bench.device), compiled_graphs()  # of this step alone

    steps = {'step': step}
    if bench.recorder.on:
        twin = bench.make_model()
        optimizer = bench.make_optimizer(twin, bench.optimizer)
        steps['step, CUDA graph'] = Trainer(bench, twin, optimizer, recorded=bench.recorder)
    for word in rivals:
        steps[word] = rival(bench, word)
    runs = {name: lambda step=step: step(*next(batches)) for name, step in steps.items()}
    taken = bench.interleave(runs, bench.steps)

    for name, seconds in parts.items():
        bench.report(name, seconds * 1000, 'ms', f'{seconds / sum(parts.values()):.1%}')
    report_speed(bench, model, taken, rivals)
    if memory:
        bench.report('memory', memory, 'GB', 'now' if bench.kind == 'mps' else 'at most')
    if bench.compile:
        bench.report('graphs compiled', graphs, '', digits=0)
    report_rivals(bench, taken, rivals)
    if bench.profile:
        write_profile(bench, lambda: step(*next(batches)))


def get_batches(bench):
    """Endless training batches (X, Y)."""
    if bench.real_data:
        path = os.path.join(dataset_dir(bench.dataset), 'train.bin')
        shape = bench.block_size, bench.batch_size, bench.vocab_size, bench.seed
        return Loader(path, *shape, device=bench.device).train_batches(itertools.count())
    shape = 2, bench.batch_size, bench.block_size
    X, Y = torch.randint(bench.vocab_size, shape, device=bench.device)
    return itertools.repeat((X, Y))


def time_parts(bench, step, batches):
    """Median seconds of the parts of a step, {name: seconds}, with a device sync between them."""
    for _ in range(bench.warmup_steps):
        step(*next(batches))
    rows = []
    for _ in range(bench.steps):
        start = bench.clock()
        batch = next(batches)
        rows.append([bench.clock() - start, *step(*batch, clock=bench.clock)])
    names = 'data', 'forward', 'backward', 'optimizer'
    return {name: median(seconds) for name, seconds in zip(names, zip(*rows))}


def compiled_graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


# -----------------------------------------------------------------------------
# a step
def own_loss(model, X, Y):
    return model(X, Y)[1]


def transformers_loss(model, X, Y):
    logits = model(X, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), Y.flatten())


class Trainer:
    """A function of a batch (X, Y) that takes a training step in the parts of train.py."""

    def __init__(self, bench, model, optimizer, loss=own_loss, recorded=Recorder(on=False)):
        """loss: loss(model, X, Y) returns the loss; recorded: a Recorder of the parts"""
        self.model, self.optimizer = model.to(bench.device).train(), optimizer
        self.loss = torch.compile(loss, dynamic=False) if bench.compile else loss
        self.autocast = autocast(bench.device, bench.dtype)
        self.scaler = torch.amp.GradScaler(enabled=bench.dtype == 'float16')
        self.guard = StepGuard(model, optimizer, self.scaler, 1.0, 0, bench.device)
        if not optimizer.defaults.get('fused'):
            del optimizer.found_inf  # not supported by torch's other AdamWs
        for group in optimizer.param_groups:
            group['capturable'] = bench.kind == 'cuda'
        self.loss_sum = torch.zeros((), device=bench.device)
        self.set_to_none = not recorded.on
        self.add_gradients = recorded(self.add_gradients)
        self.clip_gradients = recorded(self.guard.clip_gradients)
        self.update = recorded(self.update)

    def add_gradients(self, X, Y):
        with self.autocast:
            loss = self.guard.check(self.loss(self.model, X, Y))
        self.times.append(self.clock())
        self.scaler.scale(loss).backward()
        self.loss_sum.add_(loss.detach())

    def update(self):
        self.guard.step()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)

    def __call__(self, X, Y, clock=lambda: 0.0):
        """Take a step; returns seconds of [forward, backward, optimizer] by `clock`."""
        self.clock, self.times = clock, [clock()]
        muon.set_rates(self.optimizer, 1e-4, 0)
        self.loss_sum.zero_()
        self.add_gradients(X, Y)
        self.times.append(clock())
        self.clip_gradients()
        self.update()
        self.times.append(clock())
        return [end - start for start, end in itertools.pairwise(self.times)]


# -----------------------------------------------------------------------------
# other networks
def rival(bench, word):
    """The Trainer that a word of --compare names. Networks that are not ours get AdamW."""
    if word.startswith('--'):
        return with_setting(bench, word)
    if word == 'transformers':
        model = bench.transformers_gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        return Trainer(bench, model, optimizer, transformers_loss)
    if not (os.path.isfile(word) and word.endswith('.py')):
        kinds = "neither 'transformers' nor the path of a model.py nor --NAME=VALUE"
        raise UserError(f'compare={word!r} is {kinds}')
    module = import_file(word)
    if not (hasattr(module, 'GPT') and hasattr(module, 'GPTConfig')):
        raise UserError(f'compare={word!r} has no GPT and GPTConfig')
    names = getattr(module.GPTConfig, '__dataclass_fields__', {})
    sizes = {name: value for name, value in vars(bench).items() if name in names}
    model = module.GPT(module.GPTConfig(**sizes))
    return Trainer(bench, model, bench.make_optimizer(model, 'adamw'))


def with_setting(bench, flag):
    """The Trainer of our network with another value of one setting, '--NAME=VALUE'."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    settings = read_settings(os.path.join(root, 'model.py:GPTConfig'))
    own = read_settings(os.path.join(root, 'bench.py'), vars(bench))
    settings['optimizer'] = own['optimizer']
    others = {'optimizer': bench.optimizer}
    for name, (value, place) in read_flag(flag, settings).items():
        others[name] = fit(settings[name], value, place)
    check(others, 'optimizer', choices=('adamw', 'muon'))
    model = bench.make_model(**others)
    return Trainer(bench, model, bench.make_optimizer(model, others['optimizer']))


def import_file(path):
    """The module at `path`, which imports the files beside it even if we have the same names."""
    ours = [name for name in sys.modules if name.partition('.')[0] == 'support']
    hidden = {name: sys.modules.pop(name) for name in ours}
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location('model_to_compare', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    sys.path.pop(0)
    sys.modules.update(hidden)
    return module


# -----------------------------------------------------------------------------
# figures
def report_speed(bench, model, taken, rivals):
    """Our step, without and with CUDA graphs, and the speed of the faster one."""
    medians = {name: median(taken[name]) for name in taken if name not in rivals}
    for name, seconds in medians.items():
        ratio = '' if name == 'step' else f'; {seconds / medians["step"]:.2f} of the step'
        bench.report(name, seconds * 1000, 'ms', spread(taken[name]) + ratio)
    fastest = min(medians, key=medians.get)
    tokens = bench.batch_size * bench.block_size / medians[fastest]
    bench.report('speed', tokens, 'tokens/s', fastest, digits=0)
    flops, ceiling = model.flops_per_token() * tokens, bench.matmul_ceiling(bench.float_type)
    note = f'of large matrices, on this machine now: {ceiling / 1e12:.3f} TFLOP/s'
    bench.report('share of a matmul', flops / ceiling * 100, '%', note, 1)
    peak = peak_flops(bench.device, bench.dtype)
    if peak:
        bench.report('MFU', flops / peak * 100, '%', f'data sheet: {peak / 1e12:.0f} TFLOP/s', 1)


def report_rivals(bench, taken, rivals):
    medians = {name: median(seconds) for name, seconds in taken.items()}
    for word in rivals:
        bench.report(f'{word}: step', medians[word] * 1000, 'ms', spread(taken[word]))
        name = 'its time over ours' if len(rivals) == 1 else f'{word}: over ours'
        note, graph = '', medians.get('step, CUDA graph', medians['step'])
        if graph < medians['step']:
            note = f'{medians[word] / graph:.2f} over our step, CUDA graph'
        bench.report(name, medians[word] / medians['step'], 'times', note)


def write_profile(bench, step):
    with torch.profiler.profile() as trace:
        step()
    trace.export_chrome_trace('trace.json')
    order = 'self_cpu_time_total' if bench.kind == 'cpu' else 'self_device_time_total'
    print(trace.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
    print('wrote trace.json; open it in chrome://tracing or ui.perfetto.dev')
