import sys

import pytest
import torch
from conftest import TINY
from test_model import MODERN

from model import GPT, GPTConfig
from support.weights import open_model, with_lora


@pytest.mark.parametrize('knobs', [dict(), MODERN])
def test_new_corrections_change_nothing_and_merged_ones_keep_what_was_learned(knobs):
    torch.manual_seed(2)
    plain = GPT(
        GPTConfig(
            block_size=16,
            vocab_size=29,
            n_layer=2,
            n_head=2,
            n_embd=16,
            **{k: v for k, v in knobs.items() if k != 'init'},
        )
    ).eval()
    idx = torch.randint(29, (2, 16))
    model = with_lora(plain, 3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx, idx)[0], plain(idx, idx)[0])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 4 * 2 and all('lora_' in name for name in names)
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(30):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        learned = model(idx, idx)
        assert learned[1] < plain(idx, idx)[1] - 0.01
        merged = with_lora(model, 0).eval()
        torch.testing.assert_close(merged(idx, idx)[0], learned[0], rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_fine_tuning_by_lora_resumes_exactly_and_is_sampled_merged(project, trained, optimizer):
    flags = [
        *TINY[:3],
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--eval_iters=2',
        '--eval_interval=4',
        '--lr_decay_iters=20',
        '--warmup_iters=0',
        '--learning_rate=1e-2',
        '--init_from=out-trained',
        '--lora_rank=2',
        f'--optimizer={optimizer}',
    ]
    whole = project.run(
        'train.py', *flags, '--max_iters=8', f'--out_dir=out-lora-{optimizer}'
    ).stdout
    assert '0.00M of them trained' in whole
    project.run('train.py', *flags, '--max_iters=4', f'--out_dir=out-lora2-{optimizer}')
    resume = [
        flag for flag in flags if not flag.startswith('--lora_rank')
    ]  # the checkpoint knows it
    project.run(
        'train.py',
        *resume,
        '--init_from=resume',
        '--max_iters=8',
        f'--out_dir=out-lora2-{optimizer}',
    )
    a, b = (
        torch.load(project.path / f'{name}-{optimizer}' / 'ckpt.pt', weights_only=True)['model']
        for name in ('out-lora', 'out-lora2')
    )
    base = torch.load(project.path / 'out-trained' / 'ckpt.pt', weights_only=True)['model']
    for name in a:
        assert a[name].equal(b[name])
        assert 'lora_' in name or a[name].equal(base[name])  # what is not trained stays
    assert any(a[name].any() for name in a if 'lora_b' in name)
    model, _ = open_model(str(project.path / f'out-lora-{optimizer}'))
    assert model.config.lora_rank == 0
    assert project.run(
        'sample.py',
        f'--out_dir=out-lora-{optimizer}',
        '--device=cpu',
        '--num_samples=1',
        '--max_new_tokens=5',
    ).stdout


def test_corrections_to_nothing_are_refused(project):
    assert 'fine-tunes weights that are there' in project.error('train.py', *TINY, '--lora_rank=2')
    assert 'must not be negative' in project.error(
        'train.py', *TINY, '--lora_rank=-2', '--init_from=scratch'
    )


def test_shares_of_thin_matrices_under_fsdp_are_put_together(project, trained):
    """With a rank below the number of processes some hold nothing of lora_a."""
    flags = [
        *TINY[:3],
        '--batch_size=4',
        '--gradient_accumulation_steps=2',
        '--eval_iters=2',
        '--max_iters=3',
        '--lr_decay_iters=20',
        '--warmup_iters=0',
        '--learning_rate=1e-2',
        '--init_from=out-trained',
        '--lora_rank=1',
    ]
    project.run('train.py', *flags, '--out_dir=out-one')
    project.run(
        'train.py',
        *flags,
        '--out_dir=out-shared',
        '--fsdp=True',
        launcher=[
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
        ],
    )
    one, shared = (
        torch.load(project.path / name / 'ckpt.pt', weights_only=True)['model']
        for name in ('out-one', 'out-shared')
    )
    assert one.keys() == shared.keys()
    for name in one:
        torch.testing.assert_close(one[name], shared[name], rtol=1e-3, atol=1e-5)
