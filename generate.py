"""
Generation: keys and values that are kept, the loop around model.py's forward, and how a token is picked from the logits.
"""

import torch

from ops import alibi_slopes


class KVCache:
    """
    The keys and values of B sequences' last `size` tokens, so that each is computed once. Memory is taken once; a token
    beyond it overwrites the oldest. Sequences of unequal length stand flush right: the first pad[b] columns of sequence b are empty.
    """

    def __init__(self, config, size, pad):
        self.config, self.size, self.pad, self.ragged = config, size, pad, bool(pad.any())
        self.length, self.k, self.v = 0, None, None # columns so far

    def begin(self, T, dtype):
        """
        Room for T more columns: their numbers (T,), and what is to be added to their attention scores, (B or 1, nh or 1, T, S)
        in this dtype, or None. Columns that overwrite others come one at a time.
        """
        assert T == 1 or self.length + T <= self.size, f'{T} columns at once after {self.length} do not fit {self.size}'
        at = torch.arange(self.length, self.length + T, device=self.pad.device)
        self.slots = slice(self.length % self.size, (self.length + T - 1) % self.size + 1)
        self.length += T
        if T == 1 and not self.ragged and self.config.pos != 'alibi':
            return at, None # all that is held is seen
        S = min(self.size, self.length)
        return at, self.bias(at, self.length - 1 - (self.length - 1 - torch.arange(S, device=at.device)) % self.size, dtype)

    def bias(self, at, held, dtype):
        """What is added to the attention scores of columns `at` (T,) for the columns `held` in the slots (S,)."""
        distance = at[:, None] - held # (T, S)
        # an empty column sees itself: a row of -inf alone would give nan
        seen = (distance >= 0) & (held >= self.pad[:, None, None]) | (distance == 0) # (B, T, S)
        bias = torch.zeros(seen.shape, device=at.device).masked_fill(~seen, float('-inf'))[:, None]
        if self.config.pos == 'alibi':
            bias = bias - alibi_slopes(self.config.n_head, at.device)[:, None, None] * distance
        return bias.to(dtype)

    def extend(self, layer, k, v):
        """Add a layer's k, v (B, n_kv_head, T, hs) of the columns begun; all that it holds of them, (B, n_kv_head, S, hs) each."""
        if self.k is None:
            self.make(k)
        self.k[layer][:, :, self.slots], self.v[layer][:, :, self.slots] = k, v
        S = min(self.size, self.length)
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def make(self, k):
        """Take the memory, for keys like k (B, n_kv_head, T, hs)."""
        B, n_kv_head, _, hs = k.shape
        self.k, self.v = ([k.new_zeros(B, n_kv_head, self.size, hs) for _ in range(self.config.n_layer)] for _ in range(2))

    def repeat(self, n):
        """Each sequence n times."""
        if n > 1:
            self.k, self.v = ([kept.repeat_interleave(n, 0) for kept in each] for each in (self.k, self.v))
            self.pad = self.pad.repeat_interleave(n)


class StaticCache(KVCache):
    """
    A KVCache whose every step looks the same, so that it can be compiled once and recorded as a CUDA graph: its length is a
    tensor, and attention goes over the whole of it, what is empty masked.
    """

    def __init__(self, config, size, pad):
        super().__init__(config, size, pad)
        self.end = torch.zeros(1, dtype=torch.int64, device=pad.device) # the length; `length` itself is for stream() to keep
        self.mark(self.end, self.pad)

    def mark(self, *tensors):
        """Promise that these keep their place in memory; else a CUDA graph would have them copied for each step."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)

    def begin(self, T, dtype):
        at = self.end + torch.arange(T, device=self.end.device)
        self.slots = at % self.size
        self.end += T
        return at, self.bias(at, self.end - 1 - (self.end - 1 - torch.arange(self.size, device=at.device)) % self.size, dtype)

    def extend(self, layer, k, v):
        if self.k is None:
            self.make(k)
            self.mark(*self.k, *self.v)
        return self.k[layer].index_copy_(2, self.slots, k), self.v[layer].index_copy_(2, self.slots, v)

    def repeat(self, n):
        super().repeat(n)
        self.mark(*self.k, *self.v, self.pad)


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, samples=range(1), temperature=1.0, top_k=None, top_p=1.0, min_p=0.0,
           repetition_penalty=1.0, seed=None, vocab_size=None, stop=None, stride=1, cache=None, compiled=None):
    """
    Continue each of `prompts`, lists of token ids of any lengths, once for each number in `samples`, all in one batch: yields
    one tensor (B,) a step, the next token of each sequence, those of the first prompt first, and -1 for those that have ended.

    temperature, top_k, top_p, min_p, repetition_penalty: see pick()
    seed: it, the prompt and the number of the sample decide a text, whatever else is in the batch; None: torch's generator does
    vocab_size: ids from here on are padding of the embedding and never sampled
    stop: called with a sequence's number and its new tokens (a list) after each step, tells whether it ends there
    cache: a KVCache of one sequence with the beginning of the prompt, from an earlier call; the rest is added to it
    compiled: torch.compile(model), to take the steps after the prompt; its mode='reduce-overhead' records them as a CUDA graph
    Prompts see their last block_size tokens. Beyond block_size learned positions recompute that window for every token, as
    nanoGPT does, or of one with stride - 1 tokens less every stride tokens; the others slide: what is kept of the last
    block_size tokens has itself seen tokens further back.
    """
    block_size, device, B = model.config.block_size, model.lm_head.weight.device, len(prompts) * len(samples)
    prompts = prompts if cache else [prompt[-block_size:] for prompt in prompts]
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    pad = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    Cache = KVCache if compiled is None else StaticCache
    if cache is None:
        cache = Cache(model.config, block_size if compiled is not None else min(block_size, T + max_new_tokens), pad)

    def forward(ids):
        """The logits of what follows ids (B, T), which are put into the cache."""
        run = model
        if compiled is not None:
            cache.length += ids.size(1)
            run = compiled if ids.size(1) == 1 and cache.k is not None else model # prompts differ in length and would recompile
        ids = ids.clone(memory_format=torch.contiguous_format) # of the same strides each time: no recompilation
        return run(ids, cache=cache)[0][:, -1, :vocab_size].float()

    if cache.length < min(T, cache.size):
        logits = forward(ids[:, cache.length:cache.size]) # all prompts at once, each once
    while cache.length < T: # a text that goes on may be longer than the cache: the rest one by one
        logits = forward(ids[:, cache.length:cache.length + 1])
    cache.repeat(len(samples))
    ids, logits, pad = (x.repeat_interleave(len(samples), 0) for x in (ids, logits, pad))
    draws = torch.rand(B, max_new_tokens)
    if seed is not None: # a generator for each sample, the same for every prompt
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in samples]
        draws = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).repeat(len(prompts), 1) # (B, steps)
    draws = draws.to(device)
    new, ended = [[] for _ in range(B)], [False] * B
    for step in range(max_new_tokens):
        before = ids if repetition_penalty != 1.0 else None
        token = pick(logits, draws[:, step], temperature, top_k, top_p, min_p, repetition_penalty, before, pad) # (B,)
        yield token.masked_fill(torch.tensor(ended, device=device), -1) if any(ended) else token
        if stop:
            for b, t in enumerate(token.tolist()):
                if not ended[b]:
                    new[b].append(t)
                    ended[b] = bool(stop(b, new[b]))
            if all(ended):
                return
        ids = torch.cat((ids, token[:, None]), dim=1)
        if step < max_new_tokens - 1:
            window = token[:, None]
            if model.config.pos == 'learned' and cache.length == block_size: # no position is left for another token
                window = ids[:, -max(1, block_size - stride + 1):]
                cache = Cache(model.config, block_size, (pad - ids.size(1) + window.size(1)).clamp_min(0))
            logits = forward(window)


def pick(logits, draw, temperature, top_k, top_p, min_p, repetition_penalty, before, pad):
    """
    One token each (B,) for logits (B, V), by uniform random numbers `draw` (B,) in [0, 1).

    temperature: divides the logits; 0 takes the most likely token
    top_k: of so many most likely tokens only (None: all); top_p: of the fewest that together have this probability (Holtzman
    et al. 2019); min_p: of those that have this share of the most likely one's probability (Nguyen et al. 2024)
    repetition_penalty: divides positive logits of the tokens in `before` (B, T), from column pad (B,) on, and multiplies negative
    ones (Keskar et al. 2019)
    """
    if before is not None:
        there = torch.zeros(logits.size(0), logits.size(1) + 1, dtype=torch.bool, device=logits.device) # the last one: nothing
        empty = torch.arange(before.size(1), device=before.device) < pad[:, None]
        there.scatter_(1, before.masked_fill(empty, logits.size(1)), True)
        logits = torch.where(there[:, :-1], torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    k, ids = logits.size(1) if top_k is None else min(top_k, logits.size(1)), None
    if k < logits.size(1) or top_p < 1.0:
        logits, ids = logits.topk(k) # the most likely first (B, k)
    probs = torch.softmax(logits / temperature, dim=-1)
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    if top_p < 1.0:
        likelier = probs.cumsum(-1) - probs # probability of those before it
        probs = probs.masked_fill(likelier >= top_p * probs.sum(-1, keepdim=True), 0.0)
    total = probs.cumsum(dim=-1)
    token = ((total > draw[:, None] * total[:, -1:]) & (probs > 0)).int().argmax(dim=-1) # the first one: the draw falls into its share
    return token if ids is None else ids.gather(1, token[:, None])[:, 0]
