"""
A GPT language model: blocks, forward pass, optimizer groups; what they are made of is in ops.py. With GPTConfig's defaults
it is GPT-2, down to the parameter names: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". What
has proved itself since is a knob each, off by default; config/modern.py turns on those that pay.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.cpu import Linear, alibi_bias, dropout, relu2, rms_norm, rotary_table, rotate


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest context
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64: faster matmuls
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = (
        True  # True: biases in Linears and LayerNorms, like GPT-2; False: a bit better and faster
    )
    pos: str = (
        'learned'  # 'learned' (wpe), 'rotary' (Su et al. 2021), 'alibi' (Press et al. 2021), 'none'
    )
    norm: str = 'layernorm'  # or 'rmsnorm', without weights (Zhang & Sennrich 2019)
    activation: str = 'gelu'  # or 'relu2' (So et al. 2021), 'swiglu' (Shazeer 2020)
    qk_norm: bool = False  # RMSNorm on queries and keys (Henry et al. 2020)
    tie_embeddings: bool = True  # one matrix for wte and lm_head (Press & Wolf 2016)
    embed_norm: bool = False  # a norm right after the embedding
    logit_cap: float = 0.0  # bound logits by logit_cap * tanh(logits / logit_cap), 0.0: no bound
    n_kv_head: int | None = (
        None  # heads of keys and values, shared by groups of queries (Ainslie et al. 2023); None: n_head
    )
    init: str = 'gpt2'  # or 'zero_proj': what adds to the residual stream, and an untied head, start at zero, other matrices at 1 / sqrt(inputs)
    attn_dropout: float | None = None  # dropout on attention weights, None: as dropout
    lora_rank: int = 0  # learn nothing but corrections of this rank to the blocks' matrices (Hu et al. 2021); 0: everything is learned

    def __post_init__(self):
        choices = {
            'pos': ('learned', 'rotary', 'alibi', 'none'),
            'norm': ('layernorm', 'rmsnorm'),
            'activation': ('gelu', 'relu2', 'swiglu'),
            'init': ('gpt2', 'zero_proj'),
        }
        for name, words in choices.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} is none of {", ".join(map(repr, words))}'
                )
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
            most = 10_000 if name == 'n_layer' else 2**31 - 1
            if getattr(self, name) > most:
                raise ValueError(f'{name}={getattr(self, name)} must be at most {most}')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} must be divisible by n_head={self.n_head}: '
                f'{self.n_embd} / {self.n_head} = {self.n_embd / self.n_head:.2f}'
            )
        if self.lora_rank < 0:
            raise ValueError(f'lora_rank={self.lora_rank} must not be negative')
        if self.lora_rank > self.n_embd:
            raise ValueError(f'lora_rank={self.lora_rank} must be at most n_embd={self.n_embd}')
        if not 0.0 <= self.logit_cap < math.inf:
            raise ValueError(f'logit_cap={self.logit_cap} must be a finite number of at least 0')
        for name in ('dropout', 'attn_dropout'):
            if getattr(self, name) is not None and not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 0 and less than 1')
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(
                f'n_head={self.n_head} must be divisible by n_kv_head={self.n_kv_head}'
            )
        if self.pos == 'rotary' and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"pos='rotary' turns pairs, so n_embd / n_head = {self.n_embd // self.n_head} must be even"
            )


class RMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x)


def make_norm(config):
    return RMSNorm() if config.norm == 'rmsnorm' else nn.LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        qkv = (self.n_head + 2 * self.n_kv_head) * (
            config.n_embd // config.n_head
        )  # query, key, value of all heads in one
        self.c_attn = Linear(config.n_embd, qkv, bias=config.bias, lora_rank=config.lora_rank)
        self.c_proj = Linear(
            config.n_embd, config.n_embd, bias=config.bias, lora_rank=config.lora_rank
        )
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.attn_dropout = config.dropout if config.attn_dropout is None else config.attn_dropout

    def forward(self, x, table=None, attn_bias=None, extend=None):
        B, T, C = x.shape
        qkv = (
            self.c_attn(x)
            .view(B, T, self.n_head + 2 * self.n_kv_head, C // self.n_head)
            .transpose(1, 2)
        )
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if table is not None:
            qk = rotate(qk, *table)
        if self.qk_norm:
            qk = rms_norm(qk).type_as(v)  # CUDA's autocast norms in float32
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)  # each (B, nh or n_kv_head, T, hs)
        if extend is not None:
            k, v = extend(k, v)  # with those of the tokens before (B, n_kv_head, S, hs)
        if self.n_kv_head < self.n_head:
            k, v = (z.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for z in (k, v))
        p = self.attn_dropout if self.training else 0.0
        if (
            extend is None
            and x.device.type == 'cpu'
            and (p > 0.0 or (q.dtype == torch.bfloat16 and T <= 512))
        ):
            # spelled out it is faster than torch's fallback for dropout, and than its flash kernel in bfloat16
            mask = torch.full((T, T), float('-inf')).triu(1) if attn_bias is None else attn_bias
            att = torch.softmax(
                (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1)) + mask, dim=-1
            )  # (B, nh, T, T)
            y = dropout(att, p, self.training).type_as(v) @ v
        else:
            causal = (
                attn_bias is None and extend is None
            )  # a bias holds the mask; a single new token sees all that the cache holds
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_bias, dropout_p=p, is_causal=causal
            )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        gated = config.activation == 'swiglu'
        hidden = (
            8 * config.n_embd // 3 if gated else 4 * config.n_embd
        )  # as many weights either way
        self.c_fc = Linear(
            config.n_embd,
            2 * hidden if gated else hidden,
            bias=config.bias,
            lora_rank=config.lora_rank,
        )
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias, lora_rank=config.lora_rank)
        self.activation, self.dropout = config.activation, config.dropout

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation == 'gelu':
            x = F.gelu(
                x, approximate='tanh'
            )  # the tanh form is the one GPT-2's weights were trained with
        elif self.activation == 'relu2':
            x = relu2(x)
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, table=None, attn_bias=None, extend=None):
        x = x + self.attn(self.ln_1(x), table, attn_bias, extend)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = (
            False  # True: backward recomputes each block, less memory for a third more work
        )
        self.loss_chunk = 0  # positions whose logits exist at a time, 0: all
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                **(
                    dict(wpe=nn.Embedding(config.block_size, config.n_embd))
                    if config.pos == 'learned'
                    else {}
                ),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=make_norm(config),
            )
        )
        if config.embed_norm:
            self.transformer.ln_e = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.transformer.wte.weight = (
                self.lm_head.weight
            )  # one matrix, Press & Wolf 2016 (arXiv:1608.05859)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            p.requires_grad = not config.lora_rank or 'lora_' in name
            if name.endswith(
                'c_proj.weight'
            ):  # what adds to the residual stream starts smaller, GPT-2 section 2.3
                nn.init.normal_(
                    p,
                    mean=0.0,
                    std=0.02 / math.sqrt(2 * config.n_layer) if config.init == 'gpt2' else 0.0,
                )
            elif (
                config.init == 'zero_proj'
                and '.h.' in name
                and p.dim() == 2
                and 'lora_' not in name
            ):
                nn.init.normal_(
                    p, mean=0.0, std=p.size(1) ** -0.5
                )  # keeps the variance of its input
        if config.init == 'zero_proj' and not config.tie_embeddings:
            nn.init.zeros_(self.lm_head.weight)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without those that are only looked up: wpe, and a wte that is not also the head."""
        looked_up = [p for name, p in self.named_parameters() if name.endswith('wpe.weight')]
        looked_up += [] if self.config.tie_embeddings else [self.transformer.wte.weight]
        return sum(p.numel() for p in self.parameters()) - non_embedding * sum(
            p.numel() for p in looked_up
        )

    def forward(self, idx, targets=None, cache=None):
        """
        idx, targets: (B, T) int64 token ids; targets of -1 do not count. T <= block_size with learned positions.
        cache: a KVCache (generate.py) that holds what came before idx, and idx too from now on

        Returns (logits, loss): with targets the logits of every position (B, T, vocab_size) and the
        mean cross-entropy in nats (None for the logits with loss_chunk, and in compiled training); without, those of the
        last position only (B, 1, vocab_size) and None.
        """
        B, T = idx.shape
        cfg, table, attn_bias = self.config, None, None
        x = self.transformer.wte(idx)  # (B, T, C)
        at = torch.arange(T, device=idx.device)
        if cache is not None:
            at, attn_bias = cache.begin(T, x.dtype)
        if cfg.pos == 'learned':
            assert T <= cfg.block_size, f'sequence of {T} tokens, block_size is {cfg.block_size}'
            x = x + self.transformer.wpe(
                at if cache is None else (at - cache.pad[:, None]).clamp_min(0)
            )
        elif cfg.pos == 'rotary':
            table = rotary_table(
                at, cfg.n_embd // cfg.n_head
            )  # left padding shifts queries and keys alike, which changes no score
        elif cfg.pos == 'alibi' and cache is None:
            attn_bias = alibi_bias(T, cfg.n_head, idx.device).to(x.dtype)[
                None
            ]  # of four dimensions, else torch takes its slow kernel
        if cfg.embed_norm:
            x = self.transformer.ln_e(x)
        x = dropout(x, cfg.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(
                    block,
                    x,
                    table,
                    attn_bias,
                    use_reentrant=False,
                    preserve_rng_state=self.redraws(),
                )
            else:
                x = block(
                    x, table, attn_bias, partial(cache.extend, i) if cache is not None else None
                )
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x[:, -1:]), None
        if self.loss_chunk:  # logits in pieces that backward recomputes: less memory for one more product with the head
            pieces = zip(
                x.flatten(0, 1).split(self.loss_chunk), targets.flatten().split(self.loss_chunk)
            )
            sums = [
                checkpoint(self.loss_sum, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
            return None, sum(sums) / (targets >= 0).sum()
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if self.training and torch.compiler.is_compiling():
            logits = None  # compiled code would write them, and read a gradient of zeros as large
        return logits, loss

    def redraws(self):
        """Does backward draw dropout masks again?"""
        return self.gradient_checkpointing and bool(self.config.dropout or self.config.attn_dropout)

    def head(self, x):
        cap, logits = self.config.logit_cap, self.lm_head(x)
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def loss_sum(self, x, targets):
        return F.cross_entropy(self.head(x), targets, ignore_index=-1, reduction='sum')

    def crop_block_size(self, block_size):
        """Change the longest context the model takes, for instance of a pretrained GPT-2; learned positions can only be cut."""
        cfg = self.config
        assert cfg.pos != 'learned' or block_size <= cfg.block_size, (
            f'cannot grow block_size from {cfg.block_size} to {block_size}'
        )
        cfg.block_size = block_size
        if cfg.pos == 'learned':
            wpe = self.transformer.wpe.weight
            self.transformer.wpe.weight = nn.Parameter(
                wpe[:block_size], requires_grad=wpe.requires_grad
            )

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices (Linear and Embedding weights) and leaves biases and norms alone."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in (
            'cuda',
            'cpu',
            'mps',
        )  # one kernel for all parameters, wherever torch has it
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self):
        """Of a forward and a backward pass: 6N + 12LHQT, PaLM appendix B (arXiv:2204.02311)."""
        cfg = self.config
        return 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size

    def generate(self, idx, max_new_tokens, **options):
        """Continue each row of idx (B, T) by max_new_tokens tokens: (B, T + max_new_tokens). Options: those of stream() in generate.py."""
        from generate import stream

        new = stream(self, idx.tolist(), max_new_tokens, **options)
        return torch.cat([idx, *(token[:, None].to(idx.device) for token in new)], dim=1)
