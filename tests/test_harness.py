"""Benchmarks of lm_eval on local files. Skipped without lm_eval (pip install '.[eval]')."""

import json
from contextlib import nullcontext

import pytest
import torch
from test_model import MODERN

from data.make_tokenizer import make_meta
from data.tokenizer import from_meta
from model import GPT, GPTConfig
from support.hf import to_transformers

lm_eval = pytest.importorskip('lm_eval')

TEXTS = [
    'To be, or not to be, that is the question',
    'Now is the winter of our discontent',
    'Friends, Romans, countrymen',
    'Once more unto the breach',
]
TASKS = {
    'choose': dict(
        output_type='multiple_choice',
        doc_to_text='{{q}}',
        doc_to_choice='{{choices}}',
        doc_to_target='{{gold}}',
        metric_list=[dict(metric='acc'), dict(metric='acc_norm')],
    ),
    'fit': dict(
        output_type='loglikelihood_rolling',
        doc_to_text='',
        doc_to_target='{{long}}',
        metric_list=[dict(metric='bits_per_byte'), dict(metric='byte_perplexity')],
    ),
    'say': dict(
        output_type='generate_until',
        doc_to_text='{{q}}',
        doc_to_target='{{a}}',
        generation_kwargs=dict(until=['e', '\n'], max_gen_toks=12),
        metric_list=[dict(metric='exact_match')],
        num_fewshot=1,
        fewshot_split='test',
        target_delimiter='',
    ),
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with three tasks over a local file."""
    rows = [
        dict(
            q=text[:-6],
            a=text[-6:],
            choices=[text[-6:], ' thing', 'zz'],
            gold=i % 3,
            long=' '.join(TEXTS * (i + 1)),
        )
        for i, text in enumerate(TEXTS * 3)
    ]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        (tmp_path / f'{name}.yaml').write_text(
            json.dumps(
                dict(
                    task=name,
                    dataset_path='json',
                    dataset_kwargs=dict(data_files=dict(test=str(tmp_path / 'rows.jsonl'))),
                    test_split='test',
                    **task,
                )
            )
        )
    return tmp_path


@pytest.mark.parametrize('knobs', [dict(), MODERN])
def test_answers_equal_those_of_the_harness_own_backend(tasks, knobs, monkeypatch):
    hf = pytest.importorskip('lm_eval.models.huggingface', exc_type=ImportError)
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tasks / 'cache'))
    from support.harness import Harness

    torch.manual_seed(5)
    meta = make_meta('train', 300, TEXTS * 10)
    sizes = dict(block_size=64, n_layer=2, n_head=4, n_embd=32)
    sizes['vocab_size'] = meta['vocab_size']  # without padding, which an export leaves out
    model = GPT(GPTConfig(**{**sizes, **knobs})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    to_transformers(model, meta, str(tasks / 'hf'))
    ours = Harness(model, from_meta(meta), nullcontext(), batch_size=3)
    theirs = hf.HFLM(pretrained=str(tasks / 'hf'), device='cpu', batch_size=3, dtype='float32')
    seen = []
    for lm in (ours, theirs):
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(TASKS),
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
            bootstrap_iters=0,
        )
        seen.append(results)
    for name in TASKS:
        mine, reference = (
            {doc['doc_id']: doc['filtered_resps'] for doc in results['samples'][name]}
            for results in seen
        )
        for i in reference:
            if name == 'say':
                assert mine[i] == reference[i]
            elif name == 'choose':
                assert [greedy for _, greedy in mine[i]] == [greedy for _, greedy in reference[i]]
                assert [p for p, _ in mine[i]] == pytest.approx(
                    [p for p, _ in reference[i]], abs=1e-3
                )
            else:
                assert mine[i] == pytest.approx(reference[i], rel=1e-5)


def test_a_run_is_scored_by_one_command_with_a_table_and_a_file(
    project, trained, tasks, monkeypatch
):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tasks / 'cache'))
    rows = [
        dict(q='to be or not to b', choices=['e,', 'o '], gold=0, a='e', long='to be or not to be')
        for _ in range(5)
    ]
    (tasks / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    done = project.run(
        'eval.py',
        '--out_dir=out-trained',
        '--device=cpu',
        '--tasks=choose,fit',
        f'--include_path={tasks}',
        '--limit=4',
        f'--output={tasks}/o.json',
    )
    assert '|choose|' in done.stdout and 'bits_per_byte' in done.stdout
    results = json.loads((tasks / 'o.json').read_text())
    assert (
        results['n-samples']['choose'] == {'original': 5, 'effective': 4}
        and 0 <= results['results']['choose']['acc,none'] <= 1
    )


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--tasks=no_such_task'], 'tasks=no_such_task: '),
        (['--tasks=choose', '--output=no/where.json'], 'must be a file in a folder'),
    ],
)
def test_bad_input_is_one_line(project, trained, flags, message):
    done = project.run('eval.py', '--out_dir=out-trained', '--device=cpu', *flags, check=False)
    assert (
        done.returncode == 2
        and message in done.stderr.splitlines()[-1]
        and 'Traceback' not in done.stderr
    )
