"""
A GPT language model, all of it in this file. With default settings it is GPT-2, down to the
parameter names: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304 # GPT-2's 50257, rounded up to a multiple of 64: faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # True: biases in Linears and LayerNorms, like GPT-2; False: a bit better and faster

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be divisible by n_head={self.n_head}: '
                             f'{self.n_embd} / {self.n_head} = {self.n_embd / self.n_head:.2f}')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')


def resolve_sizes(n_head=None, n_embd=None, d_head=None, d_model=None, default=(12, 768)):
    """
    (n_head, n_embd) from any sufficient subset of n_head, d_head and n_embd, None for what is not
    given; d_model is another word for n_embd. A ValueError shows the arithmetic of a contradiction.
    `default` fills in for what the subset leaves open.
    """
    if n_embd is not None and d_model is not None and n_embd != d_model:
        raise ValueError(f'n_embd={n_embd} and d_model={d_model} are two words for one size; give one of them')
    n_embd = n_embd if n_embd is not None else d_model
    if d_head is not None:
        if n_embd is None:
            n_embd = n_head * d_head if n_head is not None else default[1]
        if d_head < 1 or n_embd % d_head:
            raise ValueError(f'n_embd={n_embd} must be divisible by d_head={d_head}: {n_embd} / {d_head} = {n_embd / (d_head or 1):.2f}')
        if n_head is not None and n_head * d_head != n_embd:
            raise ValueError(f'n_head={n_head} x d_head={d_head} = {n_head * d_head}, but n_embd={n_embd}')
        n_head = n_embd // d_head
    return (n_head if n_head is not None else default[0]), (n_embd if n_embd is not None else default[1])


def dropout(x, p, training):
    """
    Zero each element with probability p and scale up the rest, in training only.

    On CPU the mask is cut from raw 64-bit random numbers, four elements from each, since torch draws
    its Bernoulli numbers seven times slower (27 against 185 ms for 25 million, measured on two cores).
    """
    if not training or p == 0.0:
        return x
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    cut = round(p * 65536) # p in steps of 1/65536
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    keep = torch.empty(x.shape, dtype=torch.bool)
    torch.ge(bits.view(torch.int16)[:x.numel()].view(x.shape), cut - 32768, out=keep)
    return x * keep * (65536 / (65536 - cut))


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias) # query, key, value of all heads in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4) # each (B, nh, T, hs)
        p = self.dropout if self.training else 0.0
        if p > 0.0 and x.device.type == 'cpu':
            # torch has no flash kernel with dropout on CPU; spelled out with our own mask it is faster than its fallback
            future = torch.full((T, T), float('-inf'), dtype=x.dtype).triu(1)
            att = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + future, dim=-1) # (B, nh, T, T)
            y = dropout(att, p, self.training) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True) # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C) # heads side by side
        return dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_fc(x)
        x = F.gelu(x, approximate='tanh') # the tanh form is the one GPT-2's weights were trained with
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False # True: backward recomputes each block, less memory for a third more work
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight # one matrix, Press & Wolf 2016 (arXiv:1608.05859)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'): # what adds to the residual stream starts smaller, GPT-2 section 2.3
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, without the position embeddings by default; wte stays in, it is also the head."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.transformer.wpe.weight.numel()

    def forward(self, idx, targets=None):
        """
        idx, targets: (B, T) int64 token ids, T <= block_size; targets of -1 do not count.

        Returns (logits, loss): with targets the logits of every position (B, T, vocab_size) and the
        mean cross-entropy in nats; without, those of the last position only (B, 1, vocab_size) and None.
        """
        B, T = idx.shape
        assert T <= self.config.block_size, f'sequence of {T} tokens, block_size is {self.config.block_size}'
        pos = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos) # (B, T, C)
        x = dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing and self.training else block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def crop_block_size(self, block_size):
        """Shorten the longest context the model takes, for instance of a pretrained GPT-2."""
        assert block_size <= self.config.block_size, f'cannot grow block_size from {self.config.block_size} to {block_size}'
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """
        GPT-2 with OpenAI's weights, through transformers.

        name: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a local folder with a GPT2LMHeadModel
        override_args: {'dropout': p} at most; everything else is as it was trained
        Raises ValueError when the name is none of these or the hub cannot be reached.
        """
        names = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
        if name not in names and not os.path.isdir(name):
            raise ValueError(f'{name!r} is neither a local folder nor one of {", ".join(names)}')
        assert set(override_args or {}) <= {'dropout'}, f'cannot override {override_args} of pretrained weights'
        from transformers import GPT2LMHeadModel
        try:
            source = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32)
        except Exception as e: # the hub's client and safetensors raise many kinds
            raise ValueError(f'cannot load {name}: {str(e).strip().splitlines()[0]}') from e
        hf = source.config
        model = cls(GPTConfig(block_size=hf.n_positions, vocab_size=hf.vocab_size, n_layer=hf.n_layer, n_head=hf.n_head,
                              n_embd=hf.n_embd, bias=True, **(override_args or {})))
        theirs = source.state_dict()
        conv1d = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight') # kept (in, out) there
        with torch.no_grad():
            for name, ours in model.state_dict().items():
                ours.copy_(theirs[name].t() if name.endswith(conv1d) else theirs[name])
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices (Linear and Embedding weights) and leaves biases and norms alone."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu', 'mps') # one kernel for all parameters, wherever torch has it
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """
        Model FLOPs utilization: the share of `peak_flops` (FLOP/s) that fwdbwd_per_iter sequences of
        block_size tokens in dt seconds come to. 6N + 12LHQT per token, PaLM appendix B (arXiv:2204.02311).
        """
        cfg = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None):
        """
        Continue idx (B, T) by max_new_tokens sampled tokens: (B, T + max_new_tokens).

        temperature: 0 takes the most likely token; top_k: sample from so many most likely ones, None for all
        vocab_size: ids from here on are padding of the embedding and never sampled
        Contexts longer than block_size see their last block_size tokens.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            logits = logits[:, -1, :vocab_size].float() # (B, V)
            if temperature == 0:
                idx_next = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float('-inf'))
                idx_next = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx
