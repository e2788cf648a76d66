import json

import pytest

SMALL = ['--device=cpu', '--compile=False', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--steps=2']


def test_a_step_is_timed_in_its_parts_beside_the_machines_ceiling(project):
    out = project.run('bench.py', *SMALL, '--dataset=tiny').stdout
    for word in ('data', 'forward', 'backward', 'optimizer', 'tokens/s', 'share of a matmul'):
        assert word in out
    assert 'MFU' not in out # there is no data sheet for a CPU


def test_random_data_needs_no_dataset_and_a_profile_is_written(project):
    out = project.run('bench.py', *SMALL, '--real_data=False', '--profile=True').stdout
    assert 'wrote trace.json' in out and (project.path / 'trace.json').stat().st_size > 1000


def test_the_optimizers_are_timed_beside_torchs(project):
    out = project.run('bench.py', *SMALL, '--mode=optimizer').stdout
    for row in ('AdamW, fused', "AdamW, torch's default", 'Muon, matrices of the blocks', 'torch.optim.Muon, four steps as ours', 'of copying', 'of a matmul'):
        assert row in out


def test_a_recipe_tells_the_sizes(project):
    out = project.run('bench.py', 'config/train_shakespeare_char.py', 'config/cpu.py', '--dataset=tiny', '--block_size=64', '--steps=1', '--warmup_steps=0').stdout
    assert '0.79M parameters' in out


def test_a_recipe_may_give_the_width_of_a_head(project):
    (project.path / 'config/wide.py').write_text('d_model = 256\nd_head = 64\n')
    assert '22.6M parameters' in project.run('bench.py', 'config/wide.py', '--mode=project').stdout


def test_muons_matrices_travel_too(project):
    share = lambda *flags: [float(line.split()[6].rstrip('%')) for line in project.run('bench.py', '--mode=project', *flags).stdout.splitlines()
                            if ' min ' in line]
    assert all(a < b < 2 * a for a, b in zip(share(), share('--optimizer=muon'))) # 170 MB beside 500 MB of gradients


def test_a_missing_dataset_is_one_line(project):
    assert 'python data/text/prepare.py --input=... --dataset=poems' in project.error('bench.py', *SMALL, '--dataset=poems')


def test_generation_is_timed_beside_its_ceiling_and_transformers(project):
    sizes = '--mode=generate', '--new_tokens=3', '--prompt_tokens=4', '--vocab_size=100', '--compare=transformers'
    out = project.run('bench.py', *SMALL, *sizes, '--bias=True').stdout
    for row in ('ceiling of batch 1', 'flatgpt, batch 1 ', 'flatgpt, batch 16', 'recomputing the context', 'transformers, batch 1'):
        assert row in out
    assert "not with pos='rotary'" in project.error('bench.py', *SMALL, *sizes, '--pos=rotary')
    assert 'do not fit block_size=16' in project.error('bench.py', *SMALL, '--mode=generate')


@pytest.mark.parametrize('rival', ['transformers', 'old_model.py'])
def test_a_step_is_timed_in_turn_with_that_of_another(project, rival):
    (project.path / 'old_model.py').write_text((project.path / 'model.py').read_text())
    project.run('bench.py', *SMALL, '--real_data=False', f'--compare={rival}', '--json=figures.json')
    told = json.loads((project.path / 'figures.json').read_text())
    assert told['device'] == 'cpu' and f'--compare={rival}' in told['command']
    ratio = told['figures'][f'{rival}: step']['value'] / told['figures']['step']['value']
    assert told['figures']['its time over ours']['value'] == pytest.approx(ratio)


def test_other_knobs_are_timed_in_turn(project):
    out = project.run('bench.py', *SMALL, '--real_data=False', '--compare=--pos=rotary --optimizer=muon').stdout
    assert '--pos=rotary: over ours' in out and '--optimizer=muon: over ours' in out
    for words, message in (('--pos=up', "'up'"), ('--batch_size=3', 'unknown flag --batch_size'), ('--optimizer=sgd', 'is none of'), ('--n_layer=x', 'takes int')):
        assert message in project.error('bench.py', *SMALL, '--real_data=False', f'--compare={words}')


def test_a_rival_that_is_not_there_is_one_line(project):
    for path, message in (('nowhere.py', 'neither'), ('README.md', 'neither'), ('muon.py', 'has no GPT and GPTConfig')):
        assert message in project.error('bench.py', *SMALL, '--real_data=False', f'--compare={path}')
    assert "compared with 'transformers'" in project.error('bench.py', *SMALL, '--mode=generate', '--new_tokens=3', '--prompt_tokens=4', '--compare=model.py')


def test_figures_that_could_not_be_written_are_refused_before_they_are_measured(project):
    for flag in ('--json=nowhere/figures.json', '--json=data', '--png=nowhere/growth.png'):
        assert 'must be a file in a folder that is there' in project.error('bench.py', *SMALL, flag)


def test_batches_are_timed_beside_the_simplest_loader(project):
    for flags in (['--real_data=False'], ['--dataset=tiny']):
        out = project.run('bench.py', *SMALL, *flags, '--mode=data').stdout
        assert 'a window at a time' in out and 'of copying' in out


def test_growth_is_told_by_data_and_by_context_and_drawn(project):
    out = project.run('bench.py', *SMALL, '--mode=growth', '--vocab_size=50', '--steps=1', '--n_embd=4', '--png=growth.png').stdout
    assert '1,000M tokens' in out and 'T = 4096' in out and (project.path / 'growth.png').stat().st_size > 10_000


def test_a_projection_is_its_own_arithmetic(project):
    project.run('bench.py', '--mode=project', '--tokens=2.4e9', '--gpus=[8]', '--json=p.json')
    hours = json.loads((project.path / 'p.json').read_text())['figures']['8 GPUs']['value']
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768 # without positions
    flops = 6 * params + 12 * 12 * 768 * 1024
    assert hours == pytest.approx(flops * 2.4e9 / (8 * 0.4 * 989e12) / 3600)
    many = project.run('bench.py', '--mode=project', '--gpus=[8, 1024]').stdout
    assert ' 1,024 ' in many
    assert 'gpus=[0] must be' in project.error('bench.py', '--mode=project', '--gpus=[0]')
    assert 'mfu=0.0 must be more than 0' in project.error('bench.py', '--mode=project', '--mfu=0')
