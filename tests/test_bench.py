import json
import shutil
from pathlib import Path

import pytest

from support.plot import draw

SIZES = '--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --steps=2'
SMALL = ['--device=cpu', '--compile=False', *SIZES.split()]


@pytest.fixture(scope='module', autouse=True)
def small_ceilings(project):
    """The copy of the project measures the machine with small arrays, which is quick."""
    path = project.path / 'support' / 'bench.py'
    text = path.read_text()
    for large, small in (('else 2048', 'else 128'), ('2**26', '2**20')):
        assert large in text
        text = text.replace(large, small)
    path.write_text(text)


def test_a_step_is_timed_in_its_parts_beside_the_machines_ceiling(project):
    out = project.run('bench.py', *SMALL, '--dataset=tiny').stdout
    for word in ('data', 'forward', 'backward', 'optimizer', 'tokens/s', 'share of a matmul'):
        assert word in out
    assert 'MFU' not in out  # there is no data sheet for a CPU


def test_random_data_needs_no_dataset_and_a_profile_is_written(project):
    out = project.run('bench.py', *SMALL, '--real_data=False', '--profile=True').stdout
    assert 'wrote trace.json' in out and (project.path / 'trace.json').stat().st_size > 1000


def test_the_optimizers_are_timed_beside_torchs(project):
    out = project.run('bench.py', *SMALL, '--mode=optimizer').stdout
    for row in ('AdamW, fused', "AdamW, torch's default", 'of copying', 'of a matmul'):
        assert row in out
    for row in ('Muon, matrices of the blocks', 'torch.optim.Muon, four steps as ours'):
        assert row in out


def test_a_recipe_gives_the_sizes(project):
    recipes = 'config/train_shakespeare_char.py', 'config/cpu.py'
    flags = '--dataset=tiny', '--block_size=64', '--steps=1', '--warmup_steps=0'
    assert '0.79M parameters' in project.run('bench.py', *recipes, *flags).stdout


def test_a_recipe_may_give_the_width_of_a_head(project):
    (project.path / 'config/wide.py').write_text('d_model = 256\nd_head = 64\n')
    small = '--n_layer=1', '--vocab_size=50', '--block_size=16', '--steps=1', '--warmup_steps=0'
    command = 'config/wide.py', *small, '--device=cpu', '--compile=False', '--real_data=False'
    assert '0.80M parameters' in project.run('bench.py', *command).stdout


def test_a_missing_dataset_is_one_line(project):
    line = project.error('bench.py', *SMALL, '--dataset=poems')
    assert 'python data/text/prepare.py --input=... --dataset=poems' in line


TEXT = ('--mode=generate', '--prompt_tokens=4', '--vocab_size=100')


@pytest.mark.slow
def test_generation_is_timed_beside_its_ceiling_and_transformers(project):
    flags = *SMALL, *TEXT, '--new_tokens=3', '--compare=transformers'
    out = project.run('bench.py', *flags, '--bias=True').stdout
    for row in ('ceiling of batch 1', 'flatgpt, batch 1 ', 'flatgpt, batch 16'):
        assert row in out
    for row in ('recomputing the context', 'transformers, batch 1'):
        assert row in out
    assert "not with pos='rotary'" in project.error('bench.py', *flags, '--pos=rotary')
    assert 'do not fit block_size=16' in project.error('bench.py', *SMALL, '--mode=generate')


@pytest.mark.slow
@pytest.mark.parametrize('rival', ['transformers', 'old_model.py'])
def test_a_step_is_interleaved_with_that_of_another(project, rival):
    (project.path / 'old_model.py').write_text((project.path / 'model.py').read_text())
    flags = '--real_data=False', f'--compare={rival}', '--json=figures.json'
    project.run('bench.py', *SMALL, *flags)
    found = json.loads((project.path / 'figures.json').read_text())
    assert found['device'] == 'cpu' and f'--compare={rival}' in found['command']
    ratio = found['figures'][f'{rival}: step']['value'] / found['figures']['step']['value']
    assert found['figures']['its time over ours']['value'] == pytest.approx(ratio)


def test_other_settings_are_interleaved(project):
    flags = *SMALL, '--real_data=False'
    out = project.run('bench.py', *flags, '--compare=--pos=rotary --optimizer=muon').stdout
    assert '--pos=rotary: over ours' in out and '--optimizer=muon: over ours' in out
    for words, message in (
        ('--pos=up', "'up'"),
        ('--batch_size=3', 'unknown flag --batch_size'),
        ('--optimizer=sgd', 'is none of'),
        ('--n_layer=x', 'takes int'),
    ):
        assert message in project.error('bench.py', *flags, f'--compare={words}')


def test_a_rival_that_is_not_there_is_one_line(project):
    flags = *SMALL, '--real_data=False'
    for path, message in (
        ('nowhere.py', 'neither'),
        ('README.md', 'neither'),
        ('muon.py', 'has no GPT and GPTConfig'),
    ):
        assert message in project.error('bench.py', *flags, f'--compare={path}')
    flags = *SMALL, *TEXT, '--new_tokens=3', '--compare=model.py'
    assert "compared with 'transformers'" in project.error('bench.py', *flags)


def test_figures_that_could_not_be_written_are_refused_before_they_are_measured(project):
    for flag in ('--json=nowhere/figures.json', '--json=data'):
        assert 'must be a file in a folder that is there' in project.error('bench.py', *SMALL, flag)


def test_batches_are_timed_beside_the_simplest_loader(project):
    for flags in (['--real_data=False'], ['--dataset=tiny']):
        out = project.run('bench.py', *SMALL, *flags, '--mode=data').stdout
        assert 'a window at a time' in out and 'of copying' in out


# runs bench.py with what is recorded on a GPU taped on the CPU
TAPED = """
import runpy, sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, '.')
import generate, tape
from support import graphs
tape.install()
{more}
graphs.can_record = lambda *args, **kwargs: True
generate.can_record = lambda device: True
sys.argv = ['bench.py', *sys.argv[1:]]
runpy.run_path('bench.py', run_name='__main__')
"""


def taped(project, *flags, more=''):
    script = TAPED.format(tests=str(Path(__file__).parent), more=more)
    (project.path / 'taped.py').write_text(script)
    return project.run('taped.py', *SMALL, *flags, '--json=taped.json').stdout, figures(project)


def figures(project):
    """Those that --json=taped.json has written."""
    return json.loads((project.path / 'taped.json').read_text())['figures']


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_step_is_timed_as_a_graph_beside_the_plain_one(project, optimizer):
    flags = '--real_data=False', f'--optimizer={optimizer}', '--compare=model.py'
    out, told = taped(project, *flags)
    assert 'could not be recorded' not in out
    step, graph = (told[name]['value'] for name in ('step', 'step, CUDA graph'))
    assert f'{graph / step:.2f} of the step' in told['step, CUDA graph']['note']
    assert told['speed']['value'] == pytest.approx(2 * 16 / min(step, graph) * 1000)
    over = told['model.py: step']['value'] / step
    assert told['its time over ours']['value'] == pytest.approx(over)


def test_what_could_not_be_recorded_is_not_timed(project):
    fails = 'def record(*args): raise RuntimeError("no room")\ngraphs.Recorder.record = record'
    out, told = taped(project, '--real_data=False', more=fails)
    assert 'could not be recorded as a CUDA graph and runs without: no room' in out
    assert 'step' in told and 'step, CUDA graph' not in told
    assert 'Muon, CUDA graph' not in taped(project, '--mode=optimizer', more=fails)[1]


@pytest.mark.slow
def test_text_is_timed_by_graph_and_without(project):
    sizes = *TEXT, '--new_tokens=8'
    out, told = taped(project, *sizes)
    for B in (1, 16):
        assert {f'flatgpt, batch {B}', f'flatgpt, no graph, batch {B}'} <= {*told}
    assert 'of the ceiling' in told['flatgpt, batch 1']['note'] and 'could not' not in out
    assert 'flatgpt, no graph, batch 1' not in taped(project, *sizes, '--cuda_graph=False')[1]


def test_muons_step_is_timed_as_a_graph(project):
    out, told = taped(project, '--mode=optimizer')
    assert 'could not' not in out and 'of a matmul' in told['Muon, CUDA graph']['note']


def test_a_graph_is_refused_where_there_is_no_gpu(project):
    assert 'only on a CUDA device' in project.error('bench.py', *SMALL, '--cuda_graph=True')


# stands in for the processes that a report starts
PRETEND = """
import json, runpy, subprocess, sys
real = subprocess.run
def run(command, *args, **kwargs):
    if isinstance(command, str): # of machine() and git
        return real(command, *args, **kwargs)
    stdout = kwargs['stdout']
    words = ' '.join(command[2:])
    print('RAN', words)
    if 'modern' in words:
        stdout.write('Traceback\\nerror: out of memory\\n')
        stdout.flush()
        raise subprocess.CalledProcessError(1, command)
    if 'mode=data' in words:
        raise subprocess.TimeoutExpired(command, kwargs['timeout'])
    figures = {'first step': dict(value=1.0, unit='ms', note=''),
               'step': dict(value=1.5, unit='ms', note='median'),
               'speed': dict(value=12345.6, unit='tokens/s', note='')}
    path = next(word for word in command if word.startswith('--json=')).partition('=')[2]
    with open(path, 'w') as f:
        json.dump({'figures': figures}, f)
subprocess.run = run
sys.path.insert(0, '.')
sys.argv = ['bench.py', *sys.argv[1:]]
runpy.run_path('bench.py', run_name='__main__')
"""


def test_a_report_is_one_table_and_what_fails_is_one_line(project):
    (project.path / 'pretend.py').write_text(PRETEND)
    (project.path / 'old_model.py').write_text((project.path / 'model.py').read_text())
    flags = '--mode=report', '--device=cpu', '--json=taped.json', '--n_embd=48'
    out = project.run('pretend.py', *flags, '--compare=old_model.py transformers').stdout
    lines = out.splitlines()
    assert [line for line in lines if 'CalledProcessError' in line] == [
        '  10.65M modern short: CalledProcessError, error: out of memory'
    ]
    assert sum('TimeoutExpired' in line for line in lines) == 1
    ran = [line for line in lines if line.startswith('RAN')]
    assert len(ran) == 4 and all('--n_embd=48' in line and '--steps=3' in line for line in ran)
    compared = [line.partition('--compare=')[2].partition(' --json')[0] for line in ran]
    assert compared == ['old_model.py transformers', '', 'transformers', '']
    table = [line for line in lines if line.startswith('|')]
    assert table[0] == '| what | figure | unit | note | command |'
    assert len(table) == 2 + 2 * 2 and all(line.count('|') == 6 for line in table)
    assert table[2].startswith('| 10.65M: step | 1.50 | ms | median | `python bench.py config/')
    assert table[3] == '| 10.65M: speed | 12,346 | tokens/s |  |  |'
    heading = lines[lines.index(table[0]) - 2]
    assert 'threads, torch ' in heading and ', commit' in heading
    told = figures(project)
    assert '--mode=generate' in told['text by 124M: first step']['command']


@pytest.mark.slow
def test_a_command_of_a_report_is_a_process_of_its_own(project):
    small = '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=32', '--vocab_size=50'
    report = '--mode=report', '--device=cpu', '--json=taped.json'
    flags = *report, *small, '--batch_size=2', '--prompt_tokens=4', '--steps=1'
    out = project.run('bench.py', *flags).stdout
    assert 'Error' not in out and 'ceiling of batch 1' in out
    told = figures(project)
    for name in ('10.65M: step', '10.65M modern short: step', 'batches: flatgpt'):
        assert '--n_embd=8' in told[name]['command']
    assert '--n_embd=8' in told['text by 124M: flatgpt, batch 16']['command']


# -----------------------------------------------------------------------------
# --mode=plot
@pytest.fixture
def two_runs(project, trained):
    shutil.copytree(trained[0], project.path / 'out-again', dirs_exist_ok=True)
    return '--mode=plot', f'--runs={trained[0]},out-again'


def test_several_runs_are_drawn_into_one_picture(project, two_runs, tmp_path):
    named, labelled = tmp_path / 'named.png', tmp_path / 'labelled.png'
    assert f'wrote {named}' in project.run('bench.py', *two_runs, f'--png={named}').stdout
    words = '--labels=first run,second run', '--title=Two runs'
    project.run('bench.py', *two_runs, f'--png={labelled}', *words)
    assert named.stat().st_size > 10000 and named.read_bytes() != labelled.read_bytes()


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--runs='], 'write the folders of the runs to draw: --runs=out-a,out-b'),
        (['--runs=out-again,config'], 'no log.csv in config'),
        (['--labels=one'], '2 runs need 2 different labels, not one'),
        (['--labels=one,one'], '2 runs need 2 different labels, not one,one'),
        (['--png=both.xyz'], 'both.xyz: Format'),
        (['--png=nowhere/both.png'], 'must be a file in a folder that is there'),
    ],
    ids=' '.join,
)
def test_what_cannot_be_drawn_is_one_line(project, two_runs, flags, message):
    assert message in project.error('bench.py', *two_runs, *flags)


def test_a_missing_matplotlib_is_one_line(project, two_runs):
    (project.path / 'without.py').write_text(
        'import runpy, sys\nsys.modules["matplotlib"] = None\n'
        'sys.argv = ["bench.py", *sys.argv[1:]]\n'
        'runpy.run_path("bench.py", run_name="__main__")\n'
    )
    assert 'pip install matplotlib' in project.error('without.py', *two_runs)


def test_the_picture_names_its_axes_and_runs(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    rows = [
        {'iter': 0, 'seconds': 1.0, 'train_loss': 3.0, 'val_loss': 3.5},
        {'iter': 0, 'seconds': 2.0, 'loss': 2.5},
        {'iter': 5, 'seconds': 9.0, 'train_loss': 2.0, 'val_loss': 2.5},
    ]
    draw({'first': rows, 'second': rows[:2]}, str(tmp_path / 'both.png'), title='Two runs')
    (figure,) = drawn
    left, right = figure.axes
    assert left.get_xlabel() == 'seconds of training' and right.get_xlabel() == 'iterations'
    assert left.get_ylabel() == 'loss (nats per token)' and figure.get_suptitle() == 'Two runs'
    words = [text.get_text() for text in right.get_legend().get_texts()]
    assert words[:2] == ['first: training', 'first: validation'] and len(words) == 4
    batches, training, validation = left.lines[:3]
    assert list(validation.get_xdata()) == [1.0, 9.0] and list(validation.get_ydata()) == [3.5, 2.5]
    assert training.get_linestyle() == '--'
    assert validation.get_linestyle() == '-' and validation.get_marker() == '.'
    assert batches.get_alpha() < 0.5 and list(batches.get_xdata()) == [2.0]
