import pytest
import tape
import torch

import generate
from generate import KVCache, new_cache, pick, seen_in, stream
from model import GPT, GPTConfig
from support.cpu import pack
from support.graphs import Recorder

KNOBS = [
    dict(),
    dict(pos='rotary'),
    dict(pos='alibi'),
    dict(pos='none'),
    dict(n_kv_head=2),
    dict(n_kv_head=1, pos='rotary', qk_norm=True),
    dict(tie_embeddings=False, pos='alibi', n_kv_head=2),
    dict(token_shift=True),
    dict(
        token_shift=True,
        pos='rotary',
        norm='rmsnorm',
        activation='relu2',
        qk_norm=True,
        tie_embeddings=False,
        embed_norm=True,
        logit_cap=15.0,
    ),
]
SMALL = dict(block_size=16, vocab_size=29, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_model(**knobs):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **knobs})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def windows(model, prompt, n, **options):
    """
    Greedy tokens and log-probabilities, by recomputing the last block_size tokens for each new
    one, as nanoGPT does.
    """
    ids, logprobs = list(prompt), []
    for _ in range(n):
        logits = model(torch.tensor([ids[-model.config.block_size :]]))[0][0, -1]
        logprobs.append(torch.log_softmax(logits, -1))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(logprobs)


@pytest.mark.parametrize('knobs', KNOBS)
def test_log_probabilities_with_the_cache_equal_those_without(knobs):
    """For every prompt length from 1 to block_size, in one batch and alone, up to block_size."""
    model = random_model(**knobs)
    prompts = [torch.randint(29, (n,)).tolist() for n in range(1, 17)]
    for batch in (prompts, *[[prompt] for prompt in prompts[::5]]):
        T = max(map(len, batch))
        pad = torch.tensor([T - len(prompt) for prompt in batch])
        cache = KVCache(model.config, 32, pad)
        sequences = [list(prompt) for prompt in batch]
        ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in batch])
        cache.reserve(T)
        logits = model(ids, cache=cache)[0][:, -1]
        for step in range(4):
            for b, sequence in enumerate(sequences):
                if len(sequence) <= 16:
                    want = model(torch.tensor([sequence]))[0][0, -1]
                    torch.testing.assert_close(
                        torch.log_softmax(logits[b], -1),
                        torch.log_softmax(want, -1),
                        rtol=0,
                        atol=1e-5,
                    )
            token = torch.randint(29, (len(batch), 1))
            for sequence, t in zip(sequences, token.flatten().tolist()):
                sequence.append(t)
            if knobs.get('pos', 'learned') == 'learned' and max(map(len, sequences)) > 16:
                break
            cache.reserve(1)
            logits = model(token, cache=cache)[0][:, -1]


@pytest.mark.parametrize('knobs', KNOBS)
def test_greedy_tokens_are_those_without_a_cache(knobs):
    model = random_model(**knobs)
    prompts = [torch.randint(29, (n,)).tolist() for n in (1, 3, 8, 12)]
    want = [windows(model, prompt, 4)[0] for prompt in prompts]
    got = torch.stack(list(stream(model, prompts, 4, temperature=0)), dim=1).tolist()
    assert got == want
    assert [
        torch.stack(list(stream(model, [prompt], 4, temperature=0)), dim=1)[0].tolist()
        for prompt in prompts
    ] == want


@pytest.mark.parametrize('knobs', [dict(), dict(pos='rotary', token_shift=True, n_kv_head=2)])
def test_a_prefix_lm_makes_the_tokens_that_are_likely_after_its_prompt(knobs):
    """Equal to one pass in which the new tokens are the targets."""
    model = random_model(prefix_lm=True, **knobs)
    prompts = [torch.randint(29, (n,)).tolist() for n in (1, 3, 8, 12)]
    new = torch.stack(list(stream(model, prompts, 4, temperature=0)), dim=1).tolist()
    for prompt, made in zip(prompts, new):
        ids = torch.tensor([prompt + made])
        targets = torch.where(torch.arange(1, ids.size(1)) < len(prompt), -1, ids[:, 1:])
        logits = model(ids[:, :-1], targets)[0]
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == made


def test_learned_positions_beyond_block_size_equal_nanogpts_window():
    model = random_model()
    prompts = [torch.randint(29, (n,)).tolist() for n in (2, 9, 16, 40)]
    want = [windows(model, prompt, 30)[0] for prompt in prompts]
    for batch in (prompts, *[[prompt] for prompt in prompts]):
        got = torch.stack(list(stream(model, batch, 30, temperature=0)), dim=1).tolist()
        assert got == [want[prompts.index(prompt)] for prompt in batch]


@pytest.mark.parametrize('pos', ['rotary', 'alibi', 'none'])
def test_other_positions_slide_beyond_block_size(pos):
    """Equal to one pass over all tokens in which each sees the last block_size columns."""
    model = random_model(pos=pos)
    prompt = torch.randint(29, (5,)).tolist()
    got = torch.stack(list(stream(model, [prompt], 40, temperature=0)), dim=1)[0].tolist()
    ids = torch.tensor([prompt + got])
    T = ids.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    band = torch.zeros(T, T).masked_fill((distance < 0) | (distance >= 16), float('-inf'))

    class Everything(KVCache):
        def advance(self, T, dtype):
            at, bias = super().advance(T, dtype)
            return at, bias + band

    cache = Everything(model.config, T, torch.tensor([0]))
    cache.reserve(T)
    logits = model(ids, ids, cache=cache)[0][0]
    assert logits[4:-1].argmax(-1).tolist() == got


@pytest.mark.parametrize('pos', ['rotary', 'alibi', 'learned'])
def test_a_text_that_goes_on_keeps_its_cache_and_is_the_same_as_made_at_once(pos):
    """Turns of a few tokens, past block_size if positions slide; nothing is computed twice."""
    model, text = random_model(pos=pos), []
    cache = KVCache(model.config, 16, torch.tensor([0]))
    for said in ([3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5], [8] * 9):
        if pos == 'learned' and len(text + said) + 3 > 16:
            break
        text += said
        text += [int(token) for token in stream(model, [text], 3, temperature=0, cache=cache)]
        assert cache.length == len(text) - 1
    alone = KVCache(model.config, 16, torch.tensor([0]))
    for i, token in enumerate(text):  # each token by itself
        alone.reserve(1)
        logits = model(torch.tensor([[token]]), cache=alone)[0][0, -1]
        turn = i + 1 in (3, 8, 17, 29)
        if turn and i + 1 < len(text):
            assert logits.argmax() == text[i + 1]


def test_samples_do_not_depend_on_what_else_is_in_the_batch():
    model = random_model(pos='rotary')
    prompts = [torch.randint(29, (n,)).tolist() for n in (4, 7, 2)]
    run = lambda prompts, samples, **options: torch.stack(
        list(stream(model, prompts, 12, samples=range(samples), **options)), 1
    ).tolist()
    together = run(prompts, 5, seed=3)
    for i, prompt in enumerate(prompts):
        assert run([prompt], 5, seed=3) == together[5 * i : 5 * i + 5]
        assert run([prompt], 2, seed=3) == together[5 * i : 5 * i + 2]
    assert run(prompts, 5, seed=3) == together != run(prompts, 5, seed=4)
    assert len({tuple(row) for row in together[:5]}) == 5
    assert (
        run(prompts[:1] * 2, 2, seed=3) == together[:2] * 2
    )  # the same prompt again, the same texts


def test_each_sequence_stops_by_itself():
    model = random_model(pos='alibi')
    prompts = [torch.randint(29, (n,)).tolist() for n in (4, 7)]
    free = torch.stack(list(stream(model, prompts, 12, seed=1)), 1)
    seen = {0: [], 1: []}

    def stop(b, new):
        seen[b] = list(new)
        return len(new) == (3, 6)[b]

    got = torch.stack(list(stream(model, prompts, 12, seed=1, stop=stop)), 1)
    assert (
        got.shape == (2, 6)
        and got[0].tolist() == free[0, :3].tolist() + [-1] * 3
        and torch.equal(got[1], free[1, :6])
    )
    assert seen == {0: free[0, :3].tolist(), 1: free[1, :6].tolist()}


def by_hand(logits, temperature, top_k, top_p, min_p):
    """The probabilities that are left, one token after the other."""
    probs = torch.softmax(logits / temperature, -1)
    order = probs.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    left = [
        t
        for n, t in enumerate(order)
        if (top_k is None or n < top_k) and probs[t] >= min_p * probs[order[0]]
    ]
    whole = sum(probs[t].item() for t in left)
    for t in left:
        if mass < top_p * whole:
            kept.append(t)
        mass += probs[t].item()
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(top_k=9, top_p=0.8, min_p=0.05, temperature=1.4),
    ],
)
def test_draws_follow_the_probabilities_that_are_left(options):
    torch.manual_seed(2)
    logits = torch.randn(1, 29) * 2
    options = {**dict(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0), **options}
    draws = (torch.arange(20000) + 0.5) / 20000  # every quantile once
    tokens = pick(logits.expand(20000, -1), draws, repetition_penalty=1.0, **options)
    want = by_hand(logits[0], **options)
    assert (torch.bincount(tokens, minlength=29) / 20000 - want).abs().max() < 2e-4


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([[float('-inf'), 0.0, float('-inf'), 0.0, float('-inf')]])
    for draw, want in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-24, 3)):
        assert pick(logits, torch.tensor([draw]), 1.0, None, 1.0, 0.0, 1.0).item() == want


def test_repetition_is_penalised_as_in_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(3)
    logits, before = torch.randn(4, 29), torch.randint(29, (4, 6))
    want = RepetitionPenaltyLogitsProcessor(1.7)(before, logits.clone()).argmax(-1)
    greedy = lambda penalty, pad: pick(
        logits, torch.zeros(4), 0, None, 1.0, 0.0, penalty, seen_in(before, torch.tensor(pad), 29)
    )
    assert torch.equal(greedy(1.7, [0, 0, 0, 0]), want)
    assert greedy(1e9, [6, 0, 0, 0])[0] == logits[0].argmax()  # nothing came before the first


@pytest.mark.parametrize('knobs', [KNOBS[0], KNOBS[-1]])
def test_packed_weights_give_the_same_logits(knobs):
    """
    Up to rounding in float32, where the tied matrix still looks tokens up, and within the
    precision of int8.
    """
    sizes = dict(vocab_size=1024, n_embd=256, n_head=4)
    plain, packed, packed_many, int8 = models = [
        random_model(**{**knobs, **sizes}) for _ in range(4)
    ]
    for model in models:
        for p in model.parameters():
            p.mul_(0.1)
    pack(packed)
    pack(packed_many, rows=6)
    pack(int8.bfloat16(), int8=True)
    assert (
        int8.lm_head.packed.dtype == torch.int8
        and packed.lm_head.weight.numel() == int8.lm_head.weight.numel() == 0
    )
    for shape in ((1, 1), (2, 5), (3, 16)):  # few rows and many
        ids = torch.randint(1024, shape)
        want = plain(ids, targets=ids)[0]
        for model in (packed, packed_many):
            torch.testing.assert_close(model(ids, targets=ids)[0], want, rtol=1e-4, atol=1e-4)
        assert (int8(ids, targets=ids)[0] - want).std() < 0.03 * want.std()
    assert packed.generate(ids, 20, temperature=0).equal(plain.generate(ids, 20, temperature=0))


def test_a_stride_recomputes_the_window_less_often():
    """Learned positions cut the context to block_size - stride + 1 tokens, then it grows."""
    model, prompt, stride = random_model(), torch.randint(29, (9,)).tolist(), 5
    made = model.generate(torch.tensor([prompt]), 30, temperature=0, stride=stride)[0].tolist()
    ids, start = list(prompt), 0
    for _ in range(30):
        if len(ids) - start > 16:
            start = len(ids) - (16 - stride + 1)
        ids.append(int(model(torch.tensor([ids[start:]]))[0].argmax()))
    assert made == ids
    with pytest.raises(ValueError, match='stride=16 must be less than block_size=16'):
        model.generate(torch.tensor([prompt]), 30, temperature=0, stride=16)


@pytest.mark.parametrize('knobs', [dict(), dict(pos='alibi', n_kv_head=2), KNOBS[-1]])
def test_compiled_steps_are_compiled_once_and_give_the_same_tokens(knobs):
    """Over prompts of unequal length, and on beyond block_size."""
    torch.compiler.reset()
    model = random_model(**knobs)
    prompts, compiled = (
        [torch.randint(29, (n,)).tolist() for n in (2, 9, 13)],
        torch.compile(model, backend='eager', fullgraph=True, dynamic=False),
    )
    want = torch.stack(list(stream(model, prompts, 24, temperature=0, stride=4)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = torch.stack(
            list(stream(model, prompts, 24, temperature=0, stride=4, compiled=compiled))
        )
    assert got.equal(want)


@pytest.mark.parametrize('knobs', [dict(pos='alibi', n_kv_head=2), KNOBS[-1]])
def test_a_compiled_chat_is_compiled_once(knobs):
    """In pieces of any length, and token by token where they no longer fit."""
    torch.compiler.reset()
    model = random_model(**knobs)
    compiled, text = torch.compile(model, backend='eager', fullgraph=True, dynamic=False), [3]
    caches = [new_cache(model, static) for static in (False, True)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (1, 2, 9, 7, 1, 5):
            text += torch.randint(29, (n,)).tolist()
            plain, ours = (
                torch.cat(list(stream(model, [text], 3, temperature=0, cache=cache, compiled=run)))
                for cache, run in zip(caches, (None, compiled))
            )
            assert ours.equal(plain)
            text += plain.tolist()


@pytest.fixture
def taped(monkeypatch):
    """Record and replay steps on this CPU as CUDA graphs are (tape.py); returns the counts."""
    counts = {'record': 0, 'replay': 0}

    def record(self, function, inputs):
        replay, outputs = tape.record(self, function, inputs)
        counts['record'] += 1

        def count():
            counts['replay'] += 1
            replay()

        return count, outputs

    tape.install(monkeypatch.setattr)
    monkeypatch.setattr(Recorder, 'record', record)
    monkeypatch.setattr(generate, 'can_record', lambda device: True)
    return counts


OPTIONS = [
    dict(temperature=0),
    dict(seed=3),
    dict(seed=3, top_k=5, top_p=0.8),
    dict(seed=1, min_p=0.1, temperature=1.3),
    dict(seed=2, repetition_penalty=1.5),
    dict(temperature=0, repetition_penalty=2.0),
]


def texts(model, prompts, n, **options):
    return torch.stack(list(stream(model, prompts, n, **options)), dim=1).tolist()


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('knobs', [KNOBS[0], KNOBS[2], KNOBS[-1]])
def test_replayed_steps_make_the_same_texts(taped, knobs, options):
    """For prompts of unequal length, three samples each, on beyond block_size."""
    model = random_model(**knobs)
    prompts, options = (
        [torch.randint(29, (n,)).tolist() for n in (2, 9, 13)],
        dict(options, samples=range(3), stride=8),
    )
    want = texts(model, prompts, 40, cuda_graph=False, **options)
    assert taped['record'] == 0 and texts(model, prompts, 40, **options) == want
    assert taped['record'] == 1 and taped['replay'] > 20  # block_size is less than a span


@pytest.mark.parametrize('pos', ['learned', 'rotary'])
def test_attention_reads_no_more_than_a_span_and_each_is_recorded_once(taped, pos):
    model = random_model(pos=pos, block_size=512)
    want = texts(model, [[1, 2], [3]], 300, seed=1, cuda_graph=False)
    assert texts(model, [[1, 2], [3]], 300, seed=1) == want
    assert taped['record'] == 2  # for 256 and for 512 columns


def test_recordings_are_kept_from_call_to_call(taped):
    model, kept = random_model(pos='rotary'), {}
    for n, seed in ((3, 1), (7, 2), (5, 3)):
        prompt = torch.randint(29, (n,)).tolist()
        want = texts(model, [prompt], 30, seed=seed, samples=range(4), cuda_graph=False)
        assert texts(model, [prompt], 30, seed=seed, samples=range(4), kept=kept) == want
    assert taped['record'] == 1
    assert texts(model, [prompt], 30, kept=kept, temperature=0) == texts(
        model, [prompt], 30, temperature=0, cuda_graph=False
    )  # others: anew


def test_tokens_beyond_a_stop_are_thrown_away(taped):
    model = random_model(pos='rotary')
    prompts = [torch.randint(29, (n,)).tolist() for n in (4, 7)]
    stop = lambda b, new: len(new) == (3, 18)[b]
    want = texts(model, prompts, 40, seed=1, cuda_graph=False, stop=stop)
    assert texts(model, prompts, 40, seed=1, stop=stop) == want and len(want[0]) == 18
    assert taped['replay'] < 40


@pytest.mark.parametrize('pos', ['learned', 'rotary'])
def test_a_chat_is_recorded_once(taped, pos):
    """Over turns of any length, and where the cache begins anew."""
    model, text = random_model(pos=pos, block_size=64), []
    plain, ours = new_cache(model, static=False), new_cache(model, static=True)
    for n in (3, 1, 9, 7, 20, 1, 5):
        text += torch.randint(29, (n,)).tolist()
        if len(text) > 64 and pos == 'learned':  # as sample.py does
            text = text[-32:]
            plain.restart(torch.zeros_like(plain.pad))
            ours.restart(torch.zeros_like(ours.pad))
        want = torch.cat(list(stream(model, [text], 8, seed=n, cache=plain, cuda_graph=False)))
        assert torch.cat(list(stream(model, [text], 8, seed=n, cache=ours))).equal(want)
        text += want.tolist()
    assert taped['record'] == 1


@pytest.mark.parametrize('temperature', [1e-10, 1e-38, 1e-42, 1e-300])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature):
    model = random_model()
    greedy = texts(model, [[1, 2, 3]], 12, temperature=0)
    assert texts(model, [[1, 2, 3]], 12, temperature=temperature, top_k=5) == greedy
    assert texts(model, [[1, 2, 3]], 12, temperature=temperature) == greedy


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_are_an_error(value):
    model = random_model()
    model.lm_head.weight[3, 3] = value
    with pytest.raises(FloatingPointError, match='the logits are not finite'):
        texts(model, [[1, 2, 3]], 12, seed=1)


def test_nothing_to_generate_is_nothing_generated():
    assert random_model().generate(torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]
