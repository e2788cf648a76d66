import pytest
import torch
from conftest import TINY
from test_model import MODERN

from model import GPT, GPTConfig
from support.weights import open_model, with_lora

LORA = [
    '--device=cpu',
    '--compile=False',
    '--dataset=tiny',
    '--batch_size=4',
    '--eval_iters=2',
    '--lr_decay_iters=20',
    '--warmup_iters=0',
    '--learning_rate=1e-2',
    '--init_from=out-trained',
]


def read_weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['model']


@pytest.mark.parametrize('knobs', [dict(), MODERN])
def test_new_lora_matrices_change_nothing_and_merging_keeps_what_was_learned(knobs):
    torch.manual_seed(2)
    sizes = dict(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16)
    plain = GPT(GPTConfig(**{**sizes, **knobs, 'init': 'gpt2'})).eval()
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
    flags = [*LORA, '--gradient_accumulation_steps=1', '--eval_interval=4']
    flags += [f'--optimizer={optimizer}']
    whole, halves = f'out-lora-{optimizer}', f'out-lora2-{optimizer}'
    done = project.run('train.py', *flags, '--lora_rank=2', '--max_iters=8', f'--out_dir={whole}')
    assert '0.00M of them trained' in done.stdout
    flags += [f'--out_dir={halves}']
    project.run('train.py', *flags, '--lora_rank=2', '--max_iters=4')
    # resumed without --lora_rank: the checkpoint knows it
    project.run('train.py', *flags, '--init_from=resume', '--max_iters=8')
    a, b, base = (read_weights(project.path / name) for name in (whole, halves, 'out-trained'))
    for name in a:
        assert a[name].equal(b[name])
        assert 'lora_' in name or a[name].equal(base[name])  # what is not trained stays
    assert any(a[name].any() for name in a if 'lora_b' in name)
    model, _ = open_model(str(project.path / whole))
    assert model.config.lora_rank == 0
    sample = ['--device=cpu', '--num_samples=1', '--max_new_tokens=5']
    assert project.run('sample.py', f'--out_dir={whole}', *sample).stdout


def test_lora_without_weights_is_refused(project):
    assert 'fine-tunes weights that are there' in project.error('train.py', *TINY, '--lora_rank=2')
    negative = project.error('train.py', *TINY, '--lora_rank=-2', '--init_from=scratch')
    assert 'must not be negative' in negative


def test_fsdp_gathers_matrices_that_some_processes_hold_nothing_of(project, trained):
    """With a rank below the number of processes some hold no row of lora_a."""
    flags = [*LORA, '--gradient_accumulation_steps=2', '--max_iters=3', '--lora_rank=1']
    project.run('train.py', *flags, '--out_dir=out-one')
    project.run('train.py', *flags, '--out_dir=out-shared', '--fsdp=True', processes=2)
    one, shared = (read_weights(project.path / name) for name in ('out-one', 'out-shared'))
    assert one.keys() == shared.keys()
    for name in one:
        torch.testing.assert_close(one[name], shared[name], rtol=1e-3, atol=1e-5)
