SMALL = ['--device=cpu', '--compile=False', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--steps=2']


def test_a_step_is_timed_in_its_parts_beside_the_machines_ceiling(project):
    out = project.run('bench.py', *SMALL, '--dataset=tiny').stdout
    for word in ('data', 'forward', 'backward', 'optimizer', 'tokens/s', 'matmul on this machine'):
        assert word in out
    assert 'MFU' not in out # there is no data sheet for a CPU


def test_random_data_needs_no_dataset_and_a_profile_is_written(project):
    out = project.run('bench.py', *SMALL, '--real_data=False', '--profile=True').stdout
    assert 'wrote trace.json' in out and (project.path / 'trace.json').stat().st_size > 1000


def test_the_step_of_muon_is_timed_beside_torchs(project):
    assert 'torch.optim.Muon on the same 4 matrices' in project.run('bench.py', *SMALL, '--real_data=False', '--optimizer=muon').stdout


def test_a_recipe_tells_the_sizes(project):
    out = project.run('bench.py', 'config/train_shakespeare_char.py', 'config/cpu.py', '--dataset=tiny', '--block_size=64', '--steps=1', '--warmup_steps=0').stdout
    assert '0.79M parameters' in out


def test_a_missing_dataset_is_one_line(project):
    assert 'python data/poems/prepare.py' in project.error('bench.py', *SMALL, '--dataset=poems')


def test_generation_is_timed_beside_its_ceiling_and_transformers(project):
    out = project.run('bench.py', *SMALL, '--mode=generate', '--new_tokens=3', '--prompt_tokens=4', '--vocab_size=100', '--bias=True').stdout
    for row in ('ceiling of batch 1', 'flatgpt, batch 1 ', 'flatgpt, batch 16', 'recomputing the context', 'transformers, batch 1'):
        assert row in out
    assert 'transformers' not in project.run('bench.py', *SMALL, '--mode=generate', '--new_tokens=3', '--prompt_tokens=4', '--pos=rotary').stdout
    assert 'do not fit block_size=16' in project.error('bench.py', *SMALL, '--mode=generate')
