"""
Generation: keys and values that are kept, the loop around model.py's forward, and how a token is picked from the logits.
"""

import sys
from functools import partial

import torch

from support.cpu import alibi_slopes
from support.graphs import Recorder


class KVCache:
    """
    The keys and values of B sequences' last `size` tokens, so that each is computed once. Memory is taken once; a token
    beyond it overwrites the oldest. Sequences of unequal length stand flush right: the first pad[b] columns of sequence b are empty.
    """

    span = step = None  # StaticCache has spans; step: of stream(), for its next call

    def __init__(self, config, size, pad):
        self.config, self.size, self.k, self.v = config, size, None, None
        self.restart(pad)

    def restart(self, pad):
        """Forget everything; from now on the first pad[b] columns of sequence b are empty."""
        self.length, self.pad, self.ragged = 0, pad, bool(pad.any())

    def reserve(self, T):
        """Called before the model adds T columns."""

    def begin(self, T, dtype):
        """
        Room for T more columns: their numbers (T,), and what is to be added to their attention scores, (B or 1, nh or 1, T, S)
        in this dtype, or None. Columns that overwrite others come one at a time.
        """
        assert T == 1 or self.length + T <= self.size, (
            f'{T} columns at once after {self.length} do not fit {self.size}'
        )
        at = torch.arange(self.length, self.length + T, device=self.pad.device)
        self.slots = slice(self.length % self.size, (self.length + T - 1) % self.size + 1)
        self.length += T
        if T == 1 and not self.ragged and self.config.pos != 'alibi':
            return at, None  # all that is held is seen
        S = min(self.size, self.length)
        return at, self.bias(
            at,
            self.length - 1 - (self.length - 1 - torch.arange(S, device=at.device)) % self.size,
            dtype,
        )

    def bias(self, at, held, dtype):
        """What is added to the attention scores of columns `at` (T,) for the columns `held` in the slots (S,)."""
        distance = at[:, None] - held  # (T, S)
        # an empty column sees itself: a row of -inf alone would give nan
        seen = (distance >= 0) & (held >= self.pad[:, None, None]) | (distance == 0)  # (B, T, S)
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
        self.k, self.v = (
            [k.new_zeros(B, n_kv_head, self.size, hs) for _ in range(self.config.n_layer)]
            for _ in range(2)
        )

    def repeat(self, n):
        """Each sequence n times."""
        if n > 1:
            self.k, self.v = (
                [kept.repeat_interleave(n, 0) for kept in each] for each in (self.k, self.v)
            )
            self.pad = self.pad.repeat_interleave(n)


class StaticCache(KVCache):
    """
    A KVCache whose every step does the same work on the same memory, so that it can be compiled, and recorded as a CUDA graph:
    its length is a tensor, and attention reads the first `span` columns, what is empty masked. The span grows in steps, so that
    a short text does not pay for a long one: 256, 512, 1024, ... columns.
    """

    def __init__(self, config, size, pad):
        self.end = torch.zeros(
            1, dtype=torch.int64, device=pad.device
        )  # the length, as the model reads it
        self.pad = torch.zeros_like(pad)
        super().__init__(config, size, pad)

    def restart(self, pad):
        self.length = 0
        self.end.zero_()
        self.pad.copy_(pad)

    def take_over(self, other):
        """Hold what another cache of as many sequences holds, and nothing else."""
        self.restart(other.pad)
        self.reserve(other.length)
        self.end.fill_(other.length)
        if self.k is None:
            self.make(other.k[0])
        for mine, theirs in zip(self.k + self.v, other.k + other.v):
            mine[:, :, : other.length] = theirs[:, :, : other.length]

    def reserve(self, T):
        self.length += T
        self.span = min(self.size, span_of(self.length))

    def begin(self, T, dtype):
        at = self.end + torch.arange(T, device=self.end.device)
        self.slots = at % self.size
        self.end += T
        last = self.end - 1
        return at, self.bias(
            at, last - (last - torch.arange(self.span, device=at.device)) % self.size, dtype
        )

    def extend(self, layer, k, v):
        if self.k is None:
            self.make(k)
        k, v = (
            self.k[layer].index_copy_(2, self.slots, k),
            self.v[layer].index_copy_(2, self.slots, v),
        )
        return k[:, :, : self.span], v[:, :, : self.span]


def span_of(length):
    """The step of a StaticCache that holds `length` columns."""
    return max(256, 2 ** (length - 1).bit_length())


class Step:
    """
    From a token to the next: the model continues `cache`, and a token is drawn from its logits. What changes from step to step
    stands in tensors that are written in place, so that a step can be recorded as a CUDA graph.

    run: the model, or torch.compile(model); options: those of pick()
    """

    def __init__(self, run, cache, max_new_tokens, vocab_size, recorder, options):
        zeros = lambda *shape, dtype=torch.int64: torch.zeros(
            shape, dtype=dtype, device=cache.pad.device
        )
        B = len(cache.pad)
        self.run, self.cache, self.vocab_size, self.options = run, cache, vocab_size, options
        self.recorder, self.recorded = recorder, {}  # the latter by span of the cache
        self.token, self.number = zeros(B, 1), zeros(1)  # the latest token; how many were drawn
        self.new = zeros(B, max_new_tokens)
        self.draws = zeros(B, max_new_tokens, dtype=torch.float32)
        self.finite = zeros()  # how many tokens were drawn from logits without nan and infinities
        self.seen = (
            zeros(B, vocab_size, dtype=torch.bool) if options['repetition_penalty'] != 1.0 else None
        )

    def start(self, ids, pad, draws):
        """Get ready to continue ids (B, T), each from its column pad (B,) on, by uniform random numbers (B, max_new_tokens)."""
        self.number.zero_()
        self.finite.zero_()
        self.draws.copy_(draws)
        if self.seen is not None:
            self.seen.copy_(seen_in(ids, pad, self.vocab_size))

    def __call__(self):
        """Make the next token."""
        self.cache.reserve(1)
        if self.cache.span not in self.recorded:
            self.recorded[self.cache.span] = self.recorder(self.forward_and_draw)
        self.recorded[self.cache.span]()

    def forward_and_draw(self):
        self.draw(self.logits(self.token, self.run))

    def logits(self, ids, run):
        """Those of what follows ids (B, T), which join the cache: (B, V)."""
        return run(ids, cache=self.cache)[0][:, -1, : self.vocab_size].float()

    def draw(self, logits):
        """Draw a token from logits (B, V)."""
        self.finite.add_(logits.amax(dim=-1).isfinite().all())
        draws = self.draws.index_select(1, self.number)[:, 0]
        token = pick(logits, draws, seen=self.seen, **self.options)[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        self.new.index_copy_(1, self.number, token)
        self.token.copy_(token)
        self.number.add_(1)


@torch.inference_mode()
def stream(
    model,
    prompts,
    max_new_tokens,
    samples=range(1),
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=None,
    vocab_size=None,
    stop=None,
    stride=1,
    cache=None,
    compiled=None,
    cuda_graph=True,
    kept=None,
):
    """
    Continue each of `prompts`, lists of token ids of any lengths, once for each number in `samples`, all in one batch: yields
    one tensor (B,) a step, on the CPU, the next token of each sequence, those of the first prompt first, and -1 for those
    that have ended.

    temperature, top_k, top_p, min_p, repetition_penalty: see pick()
    seed: it, the prompt and the number of the sample decide a text, whatever else is in the batch; None: torch's generator does
    vocab_size: ids from here on are padding of the embedding and never sampled
    stop: called with a sequence's number and its new tokens (a list) after each step, tells whether it ends there
    cache: new_cache(model) or what earlier calls have made of it, for a single sequence: it holds the beginning of the prompt,
        and the rest is added to it
    compiled: torch.compile(model), to take the steps after the prompt
    cuda_graph: False: on CUDA, do not record the step as a CUDA graph
    kept: a dict in which a cache and its recordings are kept from call to call, for calls of as many sequences
    Raises FloatingPointError where logits are not finite, ValueError where stride leaves no context.
    Prompts see their last block_size tokens. Beyond block_size learned positions recompute that window for every token, as
    nanoGPT does, or of one with stride - 1 tokens less every stride tokens; the others slide: what is kept of the last
    block_size tokens has itself seen tokens further back.
    """
    block_size, device, B = (
        model.config.block_size,
        model.lm_head.weight.device,
        len(prompts) * len(samples),
    )
    vocab_size = vocab_size or model.config.vocab_size
    if stride > 1 and stride >= block_size:
        raise ValueError(f'stride={stride} must be less than block_size={block_size}')
    cuda_graph = cuda_graph and can_record(device)
    options = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )

    # the prompts, all at once, each once
    own = cache is None
    prompts = prompts if not own else [prompt[-block_size:] for prompt in prompts]
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    pad = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    static = cuda_graph or compiled is not None
    if own:
        cache = KVCache(model.config, T if static else min(block_size, T + max_new_tokens), pad)
    pieces = [
        ids[:, cache.length : cache.size],
        *ids[:, max(cache.length, cache.size) :].split(1, dim=1),
    ]  # what is beyond its size: one by one
    for piece in pieces:
        if piece.size(1):
            cache.reserve(piece.size(1))
            logits = model(piece.contiguous(), cache=cache)[0][:, -1, :vocab_size].float()
    cache.repeat(len(samples))
    ids, logits, pad = (x.repeat_interleave(len(samples), 0) for x in (ids, logits, pad))
    if static and own:
        kept, size = {} if kept is None else kept, min(block_size, span_of(T + max_new_tokens))
        if (B, size) not in kept:
            kept.clear()
            kept[B, size] = StaticCache(model.config, size, pad)
        kept[B, size].take_over(cache)
        cache = kept[B, size]

    # the steps
    step = cache.step  # of an earlier call
    if step is None or step.options != options or step.new.size(1) != max_new_tokens:
        recorder = Recorder(
            cuda_graph and isinstance(cache, StaticCache), report=partial(print, file=sys.stderr)
        )
        step = cache.step = Step(
            model if compiled is None else compiled,
            cache,
            max_new_tokens,
            vocab_size,
            recorder,
            options,
        )
    draws = torch.rand(B, max_new_tokens)
    if seed is not None:  # a generator for each sample, the same for every prompt
        generators = [
            torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in samples
        ]
        draws = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).repeat(
            len(prompts), 1
        )  # (B, steps)
    step.start(ids, pad, draws)

    def make(numbers):
        for number in numbers:
            if number == 0:
                step.draw(logits)
            elif (
                model.config.pos == 'learned' and cache.length == block_size
            ):  # no position is left for another token
                so_far = torch.cat((ids, step.new[:, :number]), dim=1)
                window = so_far[:, stride - 1 - block_size :].contiguous()
                cache.restart((pad - so_far.size(1) + window.size(1)).clamp_min(0))
                cache.reserve(window.size(1))
                step.draw(step.logits(window, model))
            else:
                step()

    new, ended, numbers = [[] for _ in range(B)], [False] * B, range(max_new_tokens)
    # tokens that are fetched at a time; a cache of the caller's must hold none that are thrown away
    block = 16 if step.recorder.on and own else 1
    make(numbers[:block])
    for first in numbers[::block]:
        tokens = step.new[:, first : first + block].clone().cpu()  # waits for the device
        if step.finite != step.number:
            raise FloatingPointError(
                'the logits are not finite: the weights are damaged, or too large for this dtype'
            )
        if block > 1:
            make(numbers[first + block :][:block])  # the device goes on while these are read
        for token in tokens.unbind(1):
            yield token.masked_fill(torch.tensor(ended), -1) if any(ended) else token
            for b, t in enumerate(token.tolist() if stop else ()):
                if not ended[b]:
                    new[b].append(t)
                    ended[b] = bool(stop(b, new[b]))
            if all(ended):
                return
        if block == 1:
            make(numbers[first + 1 :][:1])


def can_record(device):
    """Can steps on this device be recorded? Under autocast a graph would read copies of weights that are gone by then."""
    return device.type == 'cuda' and not torch.is_autocast_enabled('cuda')


def new_cache(model, static):
    """
    An empty cache of a single sequence, for stream(). static: every step does the same work on the same memory, as
    torch.compile and CUDA graphs want it.
    """
    pad = torch.zeros(1, dtype=torch.int64, device=model.lm_head.weight.device)
    return (StaticCache if static else KVCache)(model.config, model.config.block_size, pad)


def seen_in(ids, pad, vocab_size):
    """Which tokens stand in ids (B, T), from column pad (B,) on: (B, vocab_size) of bool."""
    there = torch.arange(ids.size(1), device=ids.device) >= pad[:, None]
    count = torch.zeros(len(ids), vocab_size, dtype=torch.int32, device=ids.device)
    return count.scatter_add_(1, ids, there.int()) > 0


def pick(logits, draw, temperature, top_k, top_p, min_p, repetition_penalty, seen=None):
    """
    One token each (B,) for logits (B, V), by uniform random numbers `draw` (B,) in [0, 1).

    temperature: divides the logits; 0 takes the most likely token
    top_k: of so many most likely tokens only (None: all); top_p: of the fewest that together have this probability (Holtzman
    et al. 2019); min_p: of those that have this share of the most likely one's probability (Nguyen et al. 2024)
    repetition_penalty: divides positive logits of the tokens in `seen` (B, V) of bool and multiplies negative ones (Keskar et al.
    2019)
    """
    if seen is not None:
        logits = torch.where(
            seen,
            torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty),
            logits,
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(
        dim=-1, keepdim=True
    )  # divided by a tiny temperature the largest would be infinite
    temperature = max(temperature, 1e-30)
    k, ids = logits.size(1) if top_k is None else min(top_k, logits.size(1)), None
    if k < logits.size(1) or top_p < 1.0:
        logits, ids = logits.topk(k)  # the most likely first (B, k)
    probs = torch.softmax(logits / temperature, dim=-1)
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    if top_p < 1.0:
        likelier = probs.cumsum(-1) - probs  # probability of those before it
        probs = probs.masked_fill(likelier >= top_p * probs.sum(-1, keepdim=True), 0.0)
    total = probs.cumsum(dim=-1)
    token = (
        ((total > draw[:, None] * total[:, -1:]) & (probs > 0)).int().argmax(dim=-1)
    )  # the first one: the draw falls into its share
    return token if ids is None else ids.gather(1, token[:, None])[:, 0]
