"""bench.py --mode=optimizer: steps of AdamW and Muon, ours and torch's."""

from statistics import median

import torch

import muon
from support.bench import spread
from support.cpu import fast_dtype
from support.graphs import Recorder


def run(bench):
    """AdamW reads four numbers of each parameter and writes three; Muon multiplies matrices."""
    model = bench.make_model().to(bench.device)
    params = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if '.h.' in name and p.dim() == 2]
    for p in params:
        p.grad = torch.randn_like(p)
    torchs = torch.optim.Muon
    runs = {
        'AdamW, fused': bench.make_optimizer(model, 'adamw').step,
        "AdamW, torch's default": torch.optim.AdamW(params).step,
        'Muon, matrices of the blocks': muon_step(bench, matrices, Recorder(on=False)),
        'torch.optim.Muon': torchs(matrices).step,
        'torch.optim.Muon, four steps as ours': torchs(matrices, ns_steps=4).step,
    }
    if bench.recorder.on:
        runs['Muon, CUDA graph'] = muon_step(bench, matrices, bench.recorder)
    taken = bench.interleave(runs, bench.steps)
    in_blocks = sum(p.numel() for p in matrices) / 1e6
    print(f'{bench.describe(model)}, {in_blocks:.2f}M of them in matrices of the blocks')
    report(bench, taken, sum(p.numel() for p in params), muon_flops(matrices))


def muon_step(bench, matrices, recorder):
    """Muon's step as train.py takes it."""
    optimizer = muon.Muon([dict(params=matrices, muon=True, momentum=0.95)], fused=False)
    optimizer.param_groups[0]['capturable'] = bench.kind == 'cuda'
    optimizer.found_inf = torch.zeros((), device=bench.device)
    recorded = recorder(optimizer.step)

    def step():
        muon.set_rates(optimizer, 0.02, 0)
        recorded()

    return step


def muon_flops(matrices, steps=4):
    """FLOPs of Newton-Schulz; queries, keys and values are three matrices in one."""
    flops = 0
    for p in matrices:
        n = 3 if p.size(0) == 3 * p.size(1) else 1
        small, large = sorted((p.size(0) // n, p.size(1)))
        flops += steps * n * (4 * small * small * large + 2 * small**3)
    return flops


def report(bench, taken, parameters, flops):
    memory = bench.copy_ceiling(bench.device)
    matmul = bench.matmul_ceiling(fast_dtype(bench.device))
    for name, seconds in taken.items():
        if name.startswith('AdamW'):
            share = 28 * parameters / median(seconds) / memory  # seven float32 of each
            note = f'{share:.0%} of copying, {memory / 1e9:.1f} GB/s'
        elif name.startswith('Muon'):
            share = flops / median(seconds) / matmul
            note = f'{share:.0%} of a matmul, {matmul / 1e12:.3f} TFLOP/s'
        else:
            note = 'queries, keys and values as one matrix'
        bench.report(name, median(seconds) * 1000, 'ms', f'{spread(seconds)}; {note}')
