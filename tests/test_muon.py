import pytest
import torch
from conftest import TINY

import muon
from model import GPT, GPTConfig
from support import checkpoint as ckpt

RATES = dict(matrix_lr=None, embed_lr=None, head_lr=None)
MUON = ['--optimizer=muon', '--pos=rotary', '--tie_embeddings=False', '--lr_schedule=trapezoid']


@pytest.mark.parametrize('steps, least, most', [(4, 0.4, 1.6), (5, 0.5, 1.3)])
@pytest.mark.parametrize('dtype, exact', [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 8, 24), (2, 24, 8)])
def test_the_update_is_nearly_orthogonal_and_turns_no_direction(
    shape, dtype, exact, steps, least, most
):
    torch.manual_seed(1)
    X = torch.randn(shape)
    Y = muon.orthogonalize(X, steps, dtype=dtype).float()
    U, S, V = torch.linalg.svd(X, full_matrices=False)
    mine = U.mT @ Y @ V.mT  # in the basis of X's own singular vectors
    diagonal = torch.diagonal(mine, dim1=1, dim2=2)
    assert Y.shape == X.shape and (diagonal > least).all() and (diagonal < most).all()
    assert (mine - torch.diag_embed(diagonal)).abs().max() < exact


def test_a_step_equals_torchs_own_muon(monkeypatch):
    """One matrix, one step from the same momentum, against torch.optim.Muon (which iterates in bfloat16), with its quintic."""
    monkeypatch.setattr(muon, 'QUINTICS', 4 * ((3.4445, -4.7750, 2.0315),))
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=16, bias=False))
    optimizer = muon.configure(model, dict(RATES, matrix_lr=0.1), 0.1, 1e-3, (0.9, 0.95), 'cpu')
    for group in optimizer.param_groups:
        group['lr'] = 1e-3 * group['lr_scale']
    p = model.transformer.h[0].mlp.c_fc.weight
    q = torch.nn.Parameter(p.detach().clone())
    theirs = torch.optim.Muon(
        [q], lr=0.1, weight_decay=0.1, ns_steps=4, momentum=0.85 + 0.1 / 300
    )  # momentum warmed up for one step
    for x in model.parameters():
        x.grad = torch.randn_like(x)
    q.grad = p.grad.clone()
    before = p.detach().clone()
    optimizer.step()
    theirs.step()
    step = lambda after: (after.detach() - before) / (after.detach() - before).norm()
    assert torch.allclose(step(p), step(q), atol=0.03) and (
        p.detach() - before
    ).norm().item() == pytest.approx((q.detach() - before).norm().item(), rel=0.1)


def test_queries_keys_and_values_are_made_orthogonal_each_by_itself():
    torch.manual_seed(3)
    p = torch.nn.Parameter(torch.zeros(24, 8))
    p.grad = torch.randn(24, 8)
    grad = p.grad.clone()
    muon.Muon(
        [dict(params=[p], muon=True, momentum=0.95, steps=0, weight_decay=0.0)], lr=1.0, fused=False
    ).step()
    want = -torch.cat([muon.orthogonalize(part[None])[0].float() for part in grad.split(8)])
    torch.testing.assert_close(p.detach(), want, rtol=0.05, atol=0.05)


def test_a_bad_step_is_skipped():
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=16))
    optimizer = muon.configure(model, RATES, 0.1, 1e-3, (0.9, 0.95), 'cpu')
    grads = lambda value: [
        setattr(p, 'grad', torch.full_like(p, value)) for p in model.parameters()
    ]
    grads(1.0)
    optimizer.step()
    before = (
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for s in optimizer.state.values() for b in s.values()],
    )
    grads(float('nan'))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = list(model.parameters()), [b for s in optimizer.state.values() for b in s.values()]
    assert all(torch.equal(a, b) for old, new in zip(before, after) for a, b in zip(old, new))


@pytest.mark.parametrize('tied', [True, False])
def test_learned_positions_are_learned_as_fast_as_the_tokens_they_are_added_to(tied):
    model = GPT(
        GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11, tie_embeddings=tied)
    )
    optimizer = muon.configure(
        model, dict(matrix_lr=None, embed_lr=0.3, head_lr=0.01), 0.0, 1.0, (0.9, 0.95), 'cpu'
    )
    rates = {p: group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert (
        rates[model.transformer.wpe.weight]
        == rates[model.transformer.wte.weight]
        == (0.01 if tied else 0.3)
    )


def test_a_learning_rate_of_zero_stands_still(project):
    project.run(
        'train.py',
        *TINY,
        *MUON,
        '--learning_rate=0',
        '--min_lr=0',
        '--max_iters=2',
        '--out_dir=out-still',
    )


def test_muon_resumes_bit_for_bit(project):
    flags = [*TINY, *MUON, '--dropout=0.2', '--gradient_accumulation_steps=2']
    project.run('train.py', *flags, '--out_dir=out-muon')
    project.run('train.py', *flags, '--out_dir=out-muon2', '--max_iters=5')
    project.run('train.py', *flags, '--out_dir=out-muon2', '--init_from=resume')
    a, b = (ckpt.load(str(project.path / name))['model'] for name in ('out-muon', 'out-muon2'))
    assert all(torch.equal(a[name], b[name]) for name in a)


IN_FLOAT32 = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
import muon
import torch
muon.fast_dtype = lambda device: torch.float32
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.parametrize('fsdp', [False, True])
def test_muon_shared_between_processes_equals_one(project, fsdp):
    """In float32: bfloat16 rounds up or down on the last bit of a sum, which depends on the order of its terms."""
    from test_parallel import BOTH, assert_close

    (project.path / 'in_float32.py').write_text(IN_FLOAT32)
    flags = [*TINY, *MUON, '--gradient_accumulation_steps=2', '--n_layer=3']
    if not (project.path / 'out-muon-one').exists():
        project.run('in_float32.py', 'train.py', *flags, '--out_dir=out-muon-one')
    project.run(
        'in_float32.py',
        'train.py',
        *flags,
        f'--out_dir=out-muon-{fsdp}',
        f'--fsdp={fsdp}',
        launcher=BOTH,
    )
    assert_close(project.path / 'out-muon-one', project.path / f'out-muon-{fsdp}')
    if fsdp:  # momentum is shared too, and goes to one process and back
        resumed = [*flags, '--out_dir=out-muon-resumed']
        project.run(
            'in_float32.py', 'train.py', *resumed, '--max_iters=3', '--fsdp=True', launcher=BOTH
        )
        project.run('in_float32.py', 'train.py', *resumed, '--max_iters=6', '--init_from=resume')
        project.run(
            'in_float32.py',
            'train.py',
            *resumed,
            '--fsdp=True',
            '--init_from=resume',
            launcher=BOTH,
        )
        assert_close(project.path / 'out-muon-one', project.path / 'out-muon-resumed')


SHARED = """
import torch, torch.distributed as dist
from muon import orthogonalize, orthogonalize_together
dist.init_process_group('gloo')
for n in (1, 2, 3):
    X = torch.randn(n, 24, 16, generator=torch.Generator().manual_seed(n))
    alone = torch.cat([orthogonalize(x[None]) for x in X]) if n < 3 else None # as many at once as there
    together = orthogonalize_together(X)
    assert together.shape == X.shape and (alone is None or together.equal(alone)), n
    torch.testing.assert_close(together, orthogonalize(X), rtol=0, atol=0.02)
"""


def test_matrices_shared_between_more_or_fewer_processes_are_the_same(project):
    from test_parallel import BOTH

    (project.path / 'shared.py').write_text(SHARED)
    project.run('shared.py', launcher=BOTH)
