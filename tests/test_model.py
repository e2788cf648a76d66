import math

import pytest
import torch
from torch.nn import functional as F

import model as model_module
from model import GPT, GPTConfig
from support import cpu
from support.cpu import dropout
from support.hf import from_pretrained
from support.weights import resolve_sizes

SIZES = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
MODERN = dict(bias=False, pos='rotary', norm='rmsnorm', activation='relu2', qk_norm=True)
MODERN |= dict(tie_embeddings=False, embed_norm=True, logit_cap=15.0, init='zero_proj')


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **changes}))


def randomized(model, std=0.3):
    """Add noise to all weights, biases and norms, so that a parity test misses none of them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
    return model


def scrambled(**knobs):
    """(tiny GPT with random weights everywhere, tokens), even where weights start at zero."""
    model = tiny(**{'vocab_size': 13, 'n_head': 4, 'n_embd': 32, **knobs}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, torch.randint(13, (2, 16))


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def backward(model, idx, targets):
    """([loss, gradients ...], sizes of the tensors that were kept for backward)"""
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(idx, targets)[1]
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())], sizes


# -----------------------------------------------------------------------------
# GPT-2
def gpt2_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    return randomized(GPT2LMHeadModel(config), 0.1).eval()


def test_logits_equal_those_of_transformers_gpt2(tmp_path):
    theirs = gpt2_of_transformers()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(str(tmp_path))[0].eval()
    idx = torch.randint(101, (4, 32))
    with torch.no_grad():
        logits = theirs(idx).logits
        assert (ours(idx, idx)[0] - logits).abs().max() < 1e-4
        assert (ours(idx)[0] - logits[:, -1:]).abs().max() < 1e-4


def test_pretrained_weights_keep_their_sizes_and_take_a_dropout(tmp_path):
    gpt2_of_transformers().save_pretrained(tmp_path)
    config = from_pretrained(str(tmp_path), dropout=0.1)[0].config
    sizes = dict(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)
    assert config == GPTConfig(**sizes, bias=True, dropout=0.1)


@pytest.mark.parametrize(
    'name, message',
    [
        ('gpt3', "'gpt3' is neither"),
        ('gpt2-xxl', 'is neither'),
        ('gpt2', 'cannot load gpt2: '),
        ('nobody/nothing', 'no such file or folder is here, and from the hub: '),
    ],
)
def test_weights_that_cannot_be_loaded_are_a_one_line_error(name, message, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    try:
        from_pretrained(name)
    except ValueError as error:
        assert message in str(error) and '\n' not in str(error)
        return
    assert name == 'gpt2'
    pytest.skip('gpt2 is in the cache of this machine')


def test_parameter_names_shapes_and_their_order_are_nanogpts():
    layers = {'ln_1': (16,), 'attn.c_attn': (48, 16), 'attn.c_proj': (16, 16)}
    layers |= {'ln_2': (16,), 'mlp.c_fc': (64, 16), 'mlp.c_proj': (16, 64)}
    want = {'transformer.wte.weight': (64, 16), 'transformer.wpe.weight': (16, 16)}
    for i in range(2):
        for name, shape in layers.items():
            want[f'transformer.h.{i}.{name}.weight'] = shape
            want[f'transformer.h.{i}.{name}.bias'] = shape[:1]
    want |= {'transformer.ln_f.weight': (16,), 'transformer.ln_f.bias': (16,)}
    model = tiny()
    assert [(name, p.shape) for name, p in model.named_parameters()] == [*want.items()]
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    assert shapes == {**want, 'lm_head.weight': (64, 16)}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any('bias' in name for name in tiny(bias=False).state_dict())


def test_the_shakespeare_recipe_has_10_65_million_parameters():
    with torch.device('meta'):
        model = tiny(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
    assert round(model.get_num_params() / 1e6, 2) == 10.65


def test_a_new_model_starts_at_the_loss_of_uniform_guessing():
    idx, targets = torch.randint(64, (2, 64, 16))
    assert abs(tiny()(idx, targets)[1].item() - math.log(64)) < 0.1
    mlp = tiny(n_layer=8, n_embd=128).transformer.h[0].mlp
    assert abs(mlp.c_fc.weight.std().item() - 0.02) < 1e-3
    assert abs(mlp.c_proj.weight.std().item() - 0.005) < 5e-4


@pytest.mark.parametrize('p', [0.0, 0.5])
def test_the_future_is_not_seen_with_or_without_dropout(p):
    m = tiny(dropout=p).train(p > 0)
    idx = torch.randint(64, (2, 16))
    other = idx.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 64
    torch.manual_seed(3)
    a = m(idx, idx)[0]
    torch.manual_seed(3)
    b = m(other, other)[0]
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_targets_of_minus_one_do_not_count():
    idx, targets = torch.randint(64, (2, 2, 16))
    targets[:, :10] = -1
    logits, loss = tiny()(idx, targets)
    want = F.cross_entropy(logits[:, 10:].flatten(0, 1), targets[:, 10:].flatten())
    assert torch.allclose(loss, want)


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 333, requires_grad=True)
    y = dropout(x, p, training=True)
    zeros = (y == 0).float()
    assert abs(zeros.mean() - p) < 0.005
    assert abs(y.mean() - 1) < 0.01
    assert abs(zeros[:, 0].mean() - p) < 0.05
    both = (zeros[:, 1:] * zeros[:, :-1]).mean()
    assert abs(both - p * p) < 0.005  # neighbours are independent
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    assert dropout(x, p, training=False) is x


def test_attention_with_dropout_is_attention_on_average():
    attn = randomized(tiny(dropout=0.2, n_embd=32)).transformer.h[0].attn
    x = torch.randn(1, 16, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = attn.train()(x.expand(20000, 16, 32)).mean(0)
        want = attn.eval()(x)[0]
    assert (mean - want).abs().max() < 0.05 * want.abs().max()


def test_cropping_keeps_the_first_positions():
    m = tiny().eval()
    idx = torch.randint(64, (2, 8))
    before = m(idx)[0]
    m.crop_block_size(8)
    assert torch.equal(m(idx)[0], before)
    assert m.config.block_size == 8
    with pytest.raises(AssertionError):
        m(torch.randint(64, (2, 9)))


def test_decay_is_for_matrices_only_and_adamw_is_fused():
    model = tiny()
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert decay['fused']
    assert decay['weight_decay'] == 0.1 and all(p.dim() == 2 for p in decay['params'])
    assert rest['weight_decay'] == 0.0 and all(p.dim() == 1 for p in rest['params'])
    params = decay['params'] + rest['params']
    assert sum(p.numel() for p in params) == count_parameters(model)


def test_a_token_takes_six_flops_a_parameter_plus_attention():
    m = tiny()
    assert m.flops_per_token() == 6 * m.get_num_params() + 12 * 2 * 16 * 16


def test_greedy_generation_follows_the_most_likely_token_past_the_block():
    m = randomized(tiny()).eval()
    idx = torch.randint(64, (3, 5))
    want = idx
    for _ in range(20):
        logits = m(want[:, -16:])[0]  # of the last position
        want = torch.cat([want, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(m.generate(idx, 20, temperature=0), want)
    assert torch.equal(m.generate(idx, 20, top_k=1), want)


def test_sampling_follows_the_models_probabilities():
    m = randomized(tiny()).eval()
    idx = torch.randint(64, (1, 5))
    torch.manual_seed(0)
    drawn = m.generate(idx.expand(20000, 5), 1, temperature=0.7)[:, -1]
    shares = torch.bincount(drawn, minlength=64) / 20000
    want = torch.softmax(m(idx)[0][0, -1] / 0.7, -1)
    assert (shares - want).abs().max() < 0.015


@pytest.mark.parametrize(
    'options', [dict(temperature=0), dict(temperature=5.0), dict(top_k=200, temperature=5.0)]
)
def test_padding_of_the_vocabulary_is_never_sampled(options):
    start = torch.zeros(50, 1, dtype=torch.long)
    assert tiny().eval().generate(start, 10, vocab_size=10, **options).max() < 10


# -----------------------------------------------------------------------------
# sizes
@pytest.mark.parametrize(
    'given, want',
    [
        (dict(), (12, 768)),
        (dict(n_head=6, n_embd=384), (6, 384)),
        (dict(d_head=64, d_model=256), (4, 256)),
        (dict(n_head=4, d_head=64), (4, 256)),
        (dict(n_head=4, d_model=256, d_head=64), (4, 256)),
        (dict(n_embd=256, d_model=256), (12, 256)),
        (dict(d_head=32), (24, 768)),
        (dict(n_head=6), (6, 768)),
    ],
)
def test_two_of_n_head_n_embd_and_d_head_give_the_third(given, want):
    assert resolve_sizes(given) == want


@pytest.mark.parametrize(
    'given, arithmetic',
    [
        (dict(n_head=4, d_head=64, d_model=512), 'n_head=4 x d_head=64 = 256, but n_embd=512'),
        (dict(n_embd=128, d_model=256), 'n_embd=128 and d_model=256'),
        (dict(d_head=48, d_model=100), '100 / 48 = 2.08'),
    ],
)
def test_a_contradiction_shows_its_arithmetic(given, arithmetic):
    with pytest.raises(ValueError, match=arithmetic):
        resolve_sizes(given)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(n_embd=100, n_head=6), 'n_embd=100 must be divisible by n_head=6: 100 / 6 = 16.67'),
        (dict(n_layer=0), 'n_layer=0 must be at least 1'),
        (dict(dropout=1.0), 'dropout=1.0'),
    ],
)
def test_sizes_that_fit_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


@pytest.mark.parametrize(
    'module, needs',
    [
        (model_module, {'math', 'dataclasses', 'torch', 'support'}),
        (cpu, {'math', 'numpy', 'torch'}),
    ],
)
def test_the_network_imports_no_files_devices_or_hubs(module, needs):
    with open(module.__file__, encoding='utf-8') as f:
        lines = [line for line in f if line.startswith(('import ', 'from '))]
    assert {line.split()[1].split('.')[0] for line in lines} == needs


# -----------------------------------------------------------------------------
# less memory
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(dropout):
    idx = torch.randint(11, (4, 32))
    runs = []
    for on in (False, True):
        model = tiny(block_size=32, vocab_size=11, n_layer=4, n_embd=32, dropout=dropout)
        model.gradient_checkpointing = on
        torch.manual_seed(2)
        runs.append(backward(model, idx, idx))
    (want, all_kept), (got, kept) = runs
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert sum(kept) < sum(all_kept) / 2


@pytest.mark.parametrize('cap', [0.0, 15.0])
def test_the_loss_in_chunks_is_the_same_and_never_holds_all_logits(cap):
    idx = torch.randint(500, (4, 32))
    targets = torch.where(torch.rand(4, 32) < 0.3, -1, idx)
    runs = []
    for chunk in (0, 10):
        model = tiny(block_size=32, vocab_size=500, n_layer=1, logit_cap=cap)
        model.loss_chunk = chunk
        runs.append(backward(model, idx, targets))
    (want, all_kept), (got, kept) = runs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert max(all_kept) >= 4 * 32 * 500
    assert max(kept) <= 4 * 32 * 64  # the widest activation


# -----------------------------------------------------------------------------
# knobs of newer architectures
@pytest.mark.parametrize('n_kv_head', [None, 2, 1])
def test_the_modern_network_is_nanochats(n_kv_head):
    from transformers import NanoChatConfig, NanoChatForCausalLM

    ours, idx = scrambled(**MODERN, n_kv_head=n_kv_head)
    sizes = dict(vocab_size=13, hidden_size=32, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=n_kv_head)
    more = dict(max_position_embeddings=16, final_logit_softcapping=15.0)
    config = NanoChatConfig(**sizes, **heads, **more)
    theirs = NanoChatForCausalLM(config).eval()
    weights = ours.state_dict()
    mapped = {'model.embed_tokens.weight': weights['transformer.wte.weight']}
    mapped['lm_head.weight'] = weights['lm_head.weight']
    kv = 8 * (n_kv_head or 4)
    for i in range(2):
        block, layer = f'transformer.h.{i}.', f'model.layers.{i}.'
        q, k, v = weights[block + 'attn.c_attn.weight'].split((32, kv, kv))
        mapped[layer + 'self_attn.q_proj.weight'] = q
        mapped[layer + 'self_attn.k_proj.weight'] = k
        mapped[layer + 'self_attn.v_proj.weight'] = v
        mapped[layer + 'self_attn.o_proj.weight'] = weights[block + 'attn.c_proj.weight']
        mapped[layer + 'mlp.fc1.weight'] = weights[block + 'mlp.c_fc.weight']
        mapped[layer + 'mlp.fc2.weight'] = weights[block + 'mlp.c_proj.weight']
    theirs.load_state_dict(mapped)
    with torch.no_grad():
        assert torch.allclose(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4)


def test_rotary_scores_depend_on_distance_alone_and_equal_complex_rotation():
    cos, sin = model_module.rotary_table(torch.arange(12), 8)
    q, k = torch.randn(2, 8)

    def at(t, x):
        rows = slice(t, t + 1)
        return model_module.rotate(x.view(1, 1, 1, 8), cos[rows], sin[rows]).flatten()

    assert torch.allclose(at(7, q) @ at(4, k), at(3, q) @ at(0, k), atol=1e-5)
    # independently: pairs (i, i + 4) as complex numbers, rotated by -t * 10000^(-i / 4)
    angles = -7 * 10000.0 ** (-torch.arange(4) / 4)
    z = torch.complex(q[:4], q[4:]) * torch.polar(torch.ones(4), angles)
    assert torch.allclose(at(7, q), torch.cat((z.real, z.imag)), atol=1e-5)


def test_alibi_is_a_penalty_by_distance_with_a_slope_per_head():
    at = torch.arange(5)
    bias = model_module.alibi(at[:, None] - at, 4)
    # 2^(-8 h / 4), Press et al. 2021, section 3
    for h, slope in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):
        for i in range(5):
            seen = [-slope * (i - j) for j in range(i + 1)]
            assert bias[0, h, i].tolist() == seen + [float('-inf')] * (4 - i)


@pytest.mark.parametrize(
    'knobs',
    [
        dict(pos='rotary'),
        dict(pos='alibi'),
        dict(pos='none'),
        dict(norm='rmsnorm'),
        dict(activation='relu2'),
        dict(activation='swiglu'),
        dict(qk_norm=True),
        dict(tie_embeddings=False),
        dict(embed_norm=True),
        dict(logit_cap=5.0),
        dict(n_kv_head=2),
        dict(token_shift=True),
        dict(dropout=0.1, pos='alibi'),
        MODERN,
    ],
)
def test_every_knob_trains_is_causal_and_does_something(knobs):
    model, idx = scrambled(**knobs)
    base, _ = scrambled()
    logits = model(idx, idx)[0]
    assert logits.shape == (2, 16, 13)
    assert not torch.allclose(logits, base(idx, idx)[0], atol=1e-3)
    if knobs.get('logit_cap'):
        assert logits.abs().max() <= knobs['logit_cap']
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 13
    assert torch.allclose(logits[:, :10], model(changed, idx)[0][:, :10], atol=1e-5)
    model.train()
    model(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_token_shift_reads_half_of_the_previous_token():
    block = scrambled(token_shift=True)[0].transformer.h[0]
    x = torch.randn(2, 5, 32)
    want = x.clone()
    want[:, 0, :16] = 0.0
    want[:, 1:, :16] = x[:, :-1, :16]
    assert torch.equal(block.shift(x, 'mlp', cache=None), want)
    read = []
    for part in (block.attn, block.mlp):
        part.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    block(x)
    assert torch.equal(read[0][:, 1:, :16], block.ln_1(x)[:, :-1, :16])
    assert torch.equal(read[0][:, :, 16:], block.ln_1(x)[:, :, 16:])
    after = x + block.attn(read[0])
    assert torch.equal(read[1], block.shift(block.ln_2(after), 'mlp', cache=None))


def test_a_prefix_lm_sees_all_of_a_prompt_and_earlier_tokens_of_its_answer():
    model, idx = scrambled(prefix_lm=True, pos='rotary')
    targets = F.pad(idx[:, 1:], (0, 1))
    targets[:, :5] = -1  # tokens 0 to 5 are the prompt
    logits = model(idx, targets)[0]

    def reached(token):
        """Positions whose logits depend on this token."""
        changed = idx.clone()
        changed[:, token] = (changed[:, token] + 1) % 13
        difference = (model(changed, targets)[0] - logits).abs().amax(dim=(0, 2))
        return difference.gt(1e-3).nonzero().flatten().tolist()

    assert reached(0) == reached(5) == list(range(16))
    assert reached(6) == list(range(6, 16))
    assert reached(15) == [15]
    prompt_alone = model(idx[:, :6])[0][:, 0]  # no targets, so all of it is a prompt
    torch.testing.assert_close(prompt_alone, logits[:, 5], rtol=0, atol=1e-5)


def test_examples_in_a_row_of_a_prefix_lm_do_not_see_each_other():
    model, idx = scrambled(prefix_lm=True, pos='rotary')
    targets = F.pad(idx[:, 1:], (0, 1))
    targets[:, :3] = targets[:, 6:10] = -1  # prompt 0-3, answer 4-6, prompt 7-10, answer 11-
    logits = model(idx, targets)[0]
    for one in (slice(0, 7), slice(7, None)):
        alone = model(idx[:, one], targets[:, one])[0]
        torch.testing.assert_close(logits[:, one], alone, rtol=0, atol=1e-5)


def test_a_prefix_lm_without_prompts_is_causal():
    model, idx = scrambled(prefix_lm=True)
    causal = scrambled()[0]
    causal.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(idx, idx)[0], causal(idx, idx)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('pos', ['rotary', 'alibi', 'none'])
def test_positions_that_are_not_learned_go_beyond_the_trained_length(pos):
    model, _ = scrambled(pos=pos)
    idx = torch.randint(13, (1, 40))
    logits = model(idx, idx)[0]
    assert logits.shape == (1, 40, 13)
    short = idx[:, :16]
    assert torch.allclose(logits[:, :16], model(short, short)[0], atol=1e-5)
    assert model.generate(idx, 3).shape == (1, 43)


def test_zero_proj_starts_exactly_at_the_loss_of_uniform_guessing():
    idx = torch.randint(64, (2, 16))
    assert tiny(**MODERN)(idx, idx)[1].item() == pytest.approx(math.log(64), abs=1e-6)


def test_swiglu_has_as_many_weights_as_gelu():
    swiglu, gelu = (tiny(n_embd=96, bias=False, activation=name) for name in ('swiglu', 'gelu'))
    assert count_parameters(swiglu) == count_parameters(gelu)


# -----------------------------------------------------------------------------
# support/cpu.py computes the same as torch
def torchs_rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def torchs_relu2(x):
    return torch.relu(x).square()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    'ours, theirs', [(model_module.rms_norm, torchs_rms_norm), (model_module.relu2, torchs_relu2)]
)
def test_functions_with_a_backward_for_cpus_equal_torchs(ours, theirs, dtype, tolerance):
    x = torch.randn(2, 3, 5, 64).to(dtype).transpose(1, 2)
    grad = torch.randn(x.shape).to(dtype)
    results = []
    for f in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        y = f(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_attention_in_bfloat16_equals_torchs():
    attention = tiny(n_embd=32, block_size=24).bfloat16().transformer.h[0].attn
    x = torch.randn(3, 24, 32).bfloat16()
    q, k, v = attention.c_attn(x).view(3, 24, 6, 16).transpose(1, 2).split(2, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = attention.c_proj(y.transpose(1, 2).reshape(3, 24, 32))
    torch.testing.assert_close(attention(x), want, rtol=2e-2, atol=2e-2)
