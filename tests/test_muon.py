import pytest
import torch
from conftest import TINY
from test_parallel import assert_close

import muon
from model import GPT, GPTConfig
from support import checkpoint as ckpt

MUON = ['--optimizer=muon', '--pos=rotary', '--tie_embeddings=False', '--lr_schedule=trapezoid']


def tiny(**changes):
    torch.manual_seed(2)
    sizes = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**sizes, **changes))


def configure(model, weight_decay=0.1, learning_rate=1e-3, **rates):
    rates = dict(matrix_lr=None, embed_lr=None, head_lr=None) | rates
    return muon.configure(model, rates, weight_decay, learning_rate, (0.9, 0.95), 'cpu')


@pytest.mark.parametrize('steps, bounds', [(4, (0.4, 1.6)), (5, (0.5, 1.3))])
@pytest.mark.parametrize('dtype, exact', [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 8, 24), (2, 24, 8)])
def test_the_update_is_nearly_orthogonal(shape, dtype, exact, steps, bounds):
    """It has X's singular vectors, and singular values near 1."""
    torch.manual_seed(1)
    X = torch.randn(shape)
    Y = muon.orthogonalize(X, steps, dtype=dtype).float()
    U, S, V = torch.linalg.svd(X, full_matrices=False)
    mine = U.mT @ Y @ V.mT  # in the basis of X's own singular vectors
    diagonal = torch.diagonal(mine, dim1=1, dim2=2)
    assert Y.shape == X.shape
    assert bounds[0] < diagonal.min() and diagonal.max() < bounds[1]
    assert (mine - torch.diag_embed(diagonal)).abs().max() < exact


def test_a_step_equals_torchs_own_muon(monkeypatch):
    """One step of one matrix, with the quintic of torch.optim.Muon, which computes in bfloat16."""
    monkeypatch.setattr(muon, 'QUINTICS', 4 * ((3.4445, -4.7750, 2.0315),))
    model = tiny(bias=False)
    optimizer = configure(model, matrix_lr=0.1)
    muon.set_rates(optimizer, lr=1e-3, iteration=0)
    p = model.transformer.h[0].mlp.c_fc.weight
    before = p.detach().clone()
    q = torch.nn.Parameter(before.clone())
    momentum = 0.85 + 0.1 / 300  # at iteration 0 of its warmup
    theirs = torch.optim.Muon([q], lr=0.1, weight_decay=0.1, ns_steps=4, momentum=momentum)
    for x in model.parameters():
        x.grad = torch.randn_like(x)
    q.grad = p.grad.clone()
    optimizer.step()
    theirs.step()
    our_step, their_step = p.detach() - before, q.detach() - before
    our_length, their_length = our_step.norm().item(), their_step.norm().item()
    assert torch.allclose(our_step / our_length, their_step / their_length, atol=0.03)
    assert our_length == pytest.approx(their_length, rel=0.1)


def test_queries_keys_and_values_are_orthogonalized_each_by_itself():
    torch.manual_seed(3)
    p = torch.nn.Parameter(torch.zeros(24, 8))
    p.grad = torch.randn(24, 8)
    parts = p.grad.clone().view(3, 8, 8)
    group = dict(params=[p], muon=True, momentum=0.95, weight_decay=0.0)
    muon.Muon([group], lr=1.0, fused=False).step()
    want = -torch.cat([muon.orthogonalize(part[None])[0].float() for part in parts])
    torch.testing.assert_close(p.detach(), want, rtol=0.05, atol=0.05)


def test_a_bad_step_changes_no_weight_and_no_state():
    model = tiny()
    optimizer = configure(model)

    def step(gradient):
        """Returns copies of all weights and of the optimizer's state after the step."""
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        tensors = list(model.parameters())
        for state in optimizer.state.values():
            tensors += state.values()
        return [t.detach().clone() for t in tensors]

    before = step(1.0)
    optimizer.found_inf = torch.tensor(1.0)
    after = step(float('nan'))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize('tied, rate', [(True, 0.01), (False, 0.3)])
def test_learned_positions_have_the_rate_of_the_tokens_that_they_are_added_to(tied, rate):
    model = tiny(tie_embeddings=tied)
    optimizer = configure(model, learning_rate=1.0, embed_lr=0.3, head_lr=0.01)
    rates = {p: group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert rates[model.transformer.wpe.weight] == rate
    assert rates[model.transformer.wte.weight] == rate


def test_a_learning_rate_of_zero_changes_no_weight():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = configure(model, learning_rate=0.0)
    muon.set_rates(optimizer, lr=0.0, iteration=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_muon_resumes_bit_for_bit(project):
    flags = [*TINY, *MUON, '--dropout=0.2', '--gradient_accumulation_steps=2']
    project.run('train.py', *flags, '--out_dir=out-muon')
    project.run('train.py', *flags, '--out_dir=out-muon2', '--max_iters=5')
    project.run('train.py', *flags, '--out_dir=out-muon2', '--init_from=resume')
    a, b = (ckpt.load(str(project.path / name))['model'] for name in ('out-muon', 'out-muon2'))
    assert all(torch.equal(a[name], b[name]) for name in a)


# -----------------------------------------------------------------------------
# several processes
IN_FLOAT32 = """
import runpy, sys
import torch
import muon
muon.fast_dtype = lambda device: torch.float32
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.fixture(scope='module')
def train(project):
    """
    train(out_dir, *flags) trains with Muon in float32: the last bit of a sum depends on the order
    of its terms, and bfloat16 would round it up or down. The run in out-muon-one is made already.
    """
    (project.path / 'in_float32.py').write_text(IN_FLOAT32)
    flags = [*TINY, *MUON, '--gradient_accumulation_steps=2', '--n_layer=3']

    def run(out_dir, *more, processes=1):
        command = 'in_float32.py', *flags, f'--out_dir={out_dir}', *more
        project.run(*command, processes=processes)
        return project.path / out_dir

    run('out-muon-one')
    return run


def test_two_processes_equal_one(project, train):
    assert_close(project.path / 'out-muon-one', train('out-muon-two', processes=2))


def test_sharded_momentum_equals_whole_and_moves_to_one_process_and_back(project, train):
    resume = 'out-muon-sharded', '--init_from=auto'
    train(*resume, '--fsdp=True', '--max_iters=3', processes=2)
    train(*resume, '--max_iters=6')
    out = train(*resume, '--fsdp=True', processes=2)
    assert_close(project.path / 'out-muon-one', out)


SHARED = """
import torch, torch.distributed as dist
from muon import orthogonalize
from support.cpu import fast_dtype
from support.distributed import divide_work
dist.init_process_group('gloo')
for n in (1, 2, 3):  # fewer than the processes, as many, more
    X = torch.randn(n, 24, 16, generator=torch.Generator().manual_seed(n))
    together = divide_work(orthogonalize, X, fast_dtype(X.device))
    assert together.shape == X.shape, n
    if n < 3:  # each process has at most one
        assert together.equal(torch.cat([orthogonalize(x[None]) for x in X])), n
    torch.testing.assert_close(together, orthogonalize(X), rtol=0, atol=0.02)
"""


def test_matrices_divided_among_more_or_fewer_processes_are_the_same(project):
    (project.path / 'shared.py').write_text(SHARED)
    project.run('shared.py', processes=2)
