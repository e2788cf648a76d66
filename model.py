"""
A GPT language model: the blocks, the forward pass, the optimizer groups. With GPTConfig's defaults
it is GPT-2, name for name: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners". Newer ideas are options, off by default; config/modern.py turns on those that pay.
support/cpu.py computes the same as some lines here, faster when training on a CPU.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from support import cpu
from support.memory import chunked_cross_entropy, recompute
from support.settings import check_network


@dataclass
class GPTConfig:
    block_size: int = 1024  # maximum context length
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # embedding width
    dropout: float = 0.0  # probability of zeroing an activation in training
    bias: bool = True  # biases in Linear and LayerNorm layers, as in GPT-2
    pos: str = 'learned'  # positions: 'learned', 'rotary', 'alibi' or 'none'
    norm: str = 'layernorm'  # or 'rmsnorm', without weights (Zhang & Sennrich 2019)
    activation: str = 'gelu'  # or 'relu2' (So et al. 2021), 'swiglu' (Shazeer 2020)
    qk_norm: bool = False  # RMSNorm on queries and keys (Henry et al. 2020)
    tie_embeddings: bool = True  # one matrix for wte and lm_head (Press & Wolf 2016)
    embed_norm: bool = False  # a norm right after the embedding
    logit_cap: float = 0.0  # bound logits to logit_cap * tanh(logits / logit_cap), 0.0: no bound
    n_kv_head: int | None = None  # heads of keys and values (Ainslie et al. 2023), None: n_head
    token_shift: bool = False  # a block reads half of the token before (Peng et al. 2023)
    prefix_lm: bool = False  # read prompts in both directions (Raffel et al. 2020)
    init: str = 'gpt2'  # or 'zero_proj': residual projections and an untied head start at zero
    lora_rank: int = 0  # train only corrections of this rank (Hu et al. 2021), 0: all weights

    def __post_init__(self):
        check_network(vars(self))


class Linear(nn.Linear):
    """nn.Linear, plus lora_b @ lora_a of rank lora_rank if that is not 0 (Hu et al. 2021)."""

    def __init__(self, in_features, out_features, bias=True, lora_rank=0):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_rank = lora_rank
        if lora_rank:
            self.lora_a = nn.Parameter(torch.randn(lora_rank, in_features) / in_features**0.5)
            self.lora_b = nn.Parameter(torch.zeros(out_features, lora_rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.lora_rank:
            y = y + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


class RMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x)


def make_norm(config):
    return RMSNorm() if config.norm == 'rmsnorm' else nn.LayerNorm(config.n_embd, bias=config.bias)


def rms_norm(x):
    """x divided by the root mean square of its last dimension (Zhang & Sennrich 2019)."""
    if cpu.in_training(x):
        return cpu.RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def relu2(x):
    """max(x, 0) squared (So et al. 2021)."""
    if cpu.in_training(x):
        return cpu.ReLU2.apply(x)
    x = F.relu(x)
    return x * x  # .square() would be float32 under CUDA's autocast


def rotary_table(at, hs):
    """cos and sin of the angles that rotate the pairs of a head (Su et al. 2021), (T, hs) each."""
    inv_freq = 10000.0 ** (-torch.arange(0, hs, 2, device=at.device) / hs)
    angles = torch.outer(at.float(), inv_freq)  # (T, hs / 2)
    return torch.cat((angles.cos(), angles.cos()), 1), torch.cat((angles.sin(), -angles.sin()), 1)


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + hs / 2) of x (B, nh, T, hs) by their positions."""
    cos, sin = cos.type_as(x), sin.type_as(x)
    if cpu.in_training(x):
        return cpu.Rotation.apply(x, cos, sin)
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def alibi(distance, n_head):
    """What ALiBi adds to the scores at this distance (T, S), Press et al. 2021; -inf below 0."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, n_head + 1, device=distance.device) / n_head)
    bias = -slopes.view(1, -1, 1, 1) * distance  # (1, nh, T, S); torch is slow with 3-d
    return bias.masked_fill(distance < 0, float('-inf'))


def prefix_bias(idx, targets):
    """
    What a prefix LM adds to the scores (B, 1, T, T), Raffel et al. 2020: 0 or -inf. A prompt, the
    tokens that are no targets, sees all of itself; an answer sees its prompt and what comes before
    in it. The next prompt begins a new example. Without targets everything is one prompt.
    """
    T = idx.size(1)
    learned = torch.zeros_like(idx, dtype=torch.bool) if targets is None else targets >= 0
    prompt = F.pad(~learned, (1, -1), value=True)  # (B, T): the first token is never a target
    example = (prompt & ~F.pad(prompt, (1, -1))).cumsum(dim=1)
    causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    seen = (causal | prompt[:, None]) & (example[:, :, None] == example[:, None])
    return torch.zeros(seen.shape, device=idx.device).masked_fill(~seen, float('-inf'))[:, None]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.qk_norm, self.dropout = config.qk_norm, config.dropout
        # queries, keys and values of all heads in one matrix
        qkv = (self.n_head + 2 * self.n_kv_head) * (config.n_embd // config.n_head)
        self.c_attn = Linear(config.n_embd, qkv, config.bias, config.lora_rank)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, config.lora_rank)

    def forward(self, x, table=None, attn_bias=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, C // self.n_head).transpose(1, 2)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if table is not None:
            qk = rotate(qk, *table)
        if self.qk_norm:
            qk = rms_norm(qk).type_as(v)  # CUDA's autocast norms in float32
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)  # (B, nh or n_kv_head, T, hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # with earlier ones (B, n_kv_head, S, hs)
        if self.n_kv_head < self.n_head:
            k, v = (z.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for z in (k, v))
        p = self.dropout if self.training else 0.0
        if cache is None and cpu.explicit_attention_is_faster(q, p):
            y = cpu.attention(q, k, v, attn_bias, p)
        else:
            # a bias includes the mask; a single new token sees everything in the cache
            is_causal = attn_bias is None and cache is None
            y = F.scaled_dot_product_attention(q, k, v, attn_bias, p, is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return cpu.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        hidden = inner = 4 * config.n_embd
        if config.activation == 'swiglu':
            hidden = 8 * config.n_embd // 3  # the same number of weights
            inner = 2 * hidden
        self.c_fc = Linear(config.n_embd, inner, config.bias, config.lora_rank)
        self.c_proj = Linear(hidden, config.n_embd, config.bias, config.lora_rank)

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation == 'gelu':
            x = F.gelu(x, approximate='tanh')  # GPT-2 was trained with the tanh form
        elif self.activation == 'relu2':
            x = relu2(x)
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return cpu.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.token_shift = layer, config.token_shift
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, table=None, attn_bias=None, cache=None):
        x = x + self.attn(self.shift(self.ln_1(x), 'attn', cache), table, attn_bias, cache)
        x = x + self.mlp(self.shift(self.ln_2(x), 'mlp', cache))
        return x

    def shift(self, x, reader, cache):
        """With token_shift: x (B, T, C), its first half taken from the token before."""
        if not self.token_shift:
            return x
        first, second = x.chunk(2, dim=-1)
        if cache is None:
            first = F.pad(first, (0, 0, 1, -1))  # zeros, then all but the last
        else:
            first = cache.shift(self.layer, reader, first[:, None])[:, 0]
        return torch.cat((first, second), dim=-1)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: recompute each block in backward
        self.loss_chunk = 0  # compute the loss in chunks of this many positions, 0: all at once
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'learned':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.transformer.ln_f = make_norm(config)
        if config.embed_norm:
            self.transformer.ln_e = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            p.requires_grad = not config.lora_rank or 'lora_' in name
            if name.endswith('c_proj.weight'):  # residual projections start small, section 2.3
                std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == 'gpt2' else 0.0
                nn.init.normal_(p, std=std)
            elif config.init == 'zero_proj' and name.endswith(('c_attn.weight', 'c_fc.weight')):
                nn.init.normal_(p, std=p.size(1) ** -0.5)  # keeps the variance of its input
        if config.init == 'zero_proj' and not config.tie_embeddings:
            nn.init.zeros_(self.lm_head.weight)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without those that are only looked up."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            count -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tie_embeddings:
            count -= self.transformer.wte.weight.numel()
        return count

    def forward(self, idx, targets=None, cache=None):
        """
        idx, targets: (B, T) int64 token ids; targets of -1 do not count, and prefix_lm takes their
            tokens for prompts
        cache: a KV cache (generate.py) of the tokens before idx, which is extended by idx

        Returns (logits, loss). With targets: the logits (B, T, vocab_size), None with loss_chunk or
        in compiled training, and the mean cross-entropy in nats. Without: (B, 1, vocab_size), None.
        """
        T, cfg = idx.size(1), self.config
        x = self.transformer.wte(idx)  # (B, T, C)
        at, table, attn_bias = torch.arange(T, device=idx.device), None, None
        if cache is not None:
            at, attn_bias = cache.advance(T, x.dtype)
        if cfg.pos == 'learned':
            assert T <= cfg.block_size, f'sequence of {T} tokens, block_size is {cfg.block_size}'
            if cache is not None:
                at = (at - cache.pad[:, None]).clamp_min(0)
            x = x + self.transformer.wpe(at)
        elif cfg.pos == 'rotary':  # left padding shifts queries and keys alike
            table = rotary_table(at, cfg.n_embd // cfg.n_head)
        elif cfg.pos == 'alibi' and cache is None:
            distance = at[:, None] - at  # (T, T), queries x keys
            attn_bias = alibi(distance, cfg.n_head).to(x.dtype)
        if cfg.prefix_lm and cache is None:
            attn_bias = prefix_bias(idx, targets).to(x.dtype)
        if cfg.embed_norm:
            x = self.transformer.ln_e(x)
        x = cpu.dropout(x, cfg.dropout, self.training)
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = recompute(block, x, table, attn_bias, preserve_rng_state=cfg.dropout > 0)
            else:
                x = block(x, table, attn_bias, cache)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x[:, -1:]), None
        if self.loss_chunk:
            return None, chunked_cross_entropy(self.head, x, targets, self.loss_chunk)
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if self.training and torch.compiler.is_compiling():
            logits = None  # compiled code would write them and read their zero gradient
        return logits, loss

    def head(self, x):
        cap, logits = self.config.logit_cap, self.lm_head(x)
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def crop_block_size(self, block_size):
        """Set the maximum context length. Learned positions can only be cut."""
        cfg = self.config
        if cfg.pos == 'learned':
            assert block_size <= cfg.block_size, f'cannot grow {cfg.block_size} to {block_size}'
            wpe = self.transformer.wpe.weight
            self.transformer.wpe.weight = nn.Parameter(wpe[:block_size], wpe.requires_grad)
        cfg.block_size = block_size

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW with weight decay for matrices (Linear and Embedding), not for biases and norms."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu', 'mps')  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self):
        """FLOPs of a forward and backward pass: 6N + 12LHQT, PaLM appendix B (arXiv:2204.02311)."""
        cfg = self.config
        return 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size

    def generate(self, idx, max_new_tokens, **options):
        """Append max_new_tokens to each row of idx (B, T). options: of stream() in generate.py."""
        from generate import stream

        new = stream(self, idx.tolist(), max_new_tokens, **options)
        return torch.cat([idx, *(token[:, None].to(idx.device) for token in new)], dim=1)
