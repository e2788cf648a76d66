"""Text from a model: the cache of keys and values, the loop over tokens, how one is picked."""

import sys
from functools import partial

import torch

from model import alibi
from support.errors import UserError
from support.graphs import Recorder


class KVCache:
    """
    The keys and values of the last `size` tokens of B sequences, in fixed slots: column i is in
    slot i % size, so a new token overwrites the oldest. Sequences of unequal length are
    left-padded: the first pad[b] columns of sequence b are empty. With token_shift, also what the
    blocks need of the last column.

    Attention reads the first `span` slots: the filled ones, or, if static, 256, 512, 1024, ...
    with empty ones masked, so that all steps of a span can be one compiled or recorded function.
    """

    def __init__(self, config, size, pad, static=False):
        self.config, self.size, self.static = config, size, static
        self.tensors, self.step = {}, None  # step: the Step of stream()'s last call
        self.pad = pad.clone()
        self.end = torch.zeros(1, dtype=torch.int64, device=pad.device)  # `length` as a tensor
        self.restart(pad)

    def restart(self, pad):
        """Forget everything; from now on the first pad[b] columns of sequence b are empty."""
        self.length = self.span = 0
        self.end.zero_()  # in place, since recordings read them
        self.pad.copy_(pad)
        self.always_masked = self.static or self.config.pos == 'alibi' or bool(pad.any())

    def reserve(self, T):
        """Make room for T more columns. Call this before the model adds them."""
        assert T == 1 or self.length + T <= self.size, f'{T} columns do not fit {self.size}'
        self.length += T
        self.span = min(self.size, span_of(self.length) if self.static else self.length)

    def advance(self, T, dtype):
        """
        Begin the T columns that were reserved: returns their numbers (T,) and what to add to their
        attention scores (B or 1, nh or 1, T, span), None if they see everything.
        """
        at = self.end + torch.arange(T, device=self.end.device)
        self.slots = at % self.size
        if self.config.token_shift:
            self.is_first = (at <= self.pad[:, None])[:, None, :, None]  # (B, 1, T, 1)
        self.end += T
        if T == 1 and not self.always_masked:
            return at, None
        last = self.end - 1
        # the column in each slot (span,)
        held = last - (last - torch.arange(self.span, device=at.device)) % self.size
        distance = at[:, None] - held  # (T, span)
        # an empty column sees itself: a row of -inf alone would give nan
        allowed = (distance >= 0) | self.config.prefix_lm  # whose prompts see all of themselves
        seen = allowed & (held >= self.pad[:, None, None]) | (distance == 0)  # (B, T, span)
        bias = torch.zeros(seen.shape, device=at.device).masked_fill(~seen, float('-inf'))[:, None]
        if self.config.pos == 'alibi':
            bias = bias + alibi(distance, self.config.n_head)
        return at, bias.to(dtype)

    def update(self, layer, k, v):
        """Add k, v (B, n_kv_head, T, hs) of a layer; returns all, (B, n_kv_head, span, hs) each."""
        all_k, all_v = self.tensor(layer, 'k', k), self.tensor(layer, 'v', v)
        all_k.index_copy_(2, self.slots, k)
        all_v.index_copy_(2, self.slots, v)
        return all_k[:, :, : self.span], all_v[:, :, : self.span]

    def shift(self, layer, reader, x):
        """
        x (B, 1, T, D) one column to the right, after the last column of the previous call. A text
        begins with zeros. reader: 'attn' or 'mlp'
        """
        last = self.tensor(layer, reader, x)
        shifted = torch.cat((last, x[:, :, :-1]), dim=2).masked_fill(self.is_first, 0.0)
        last.copy_(x[:, :, -1:])
        return shifted

    def tensor(self, layer, name, like):
        """The tensor of this name: 'k' and 'v' (B, H, size, D), others (B, H, 1, D)."""
        if (layer, name) not in self.tensors:
            columns = self.size if name in ('k', 'v') else 1
            shape = len(self.pad), like.size(1), columns, like.size(3)
            self.tensors[layer, name] = like.new_zeros(shape)
        return self.tensors[layer, name]

    def load(self, other, n):
        """Replace the contents by those of another cache, each sequence n times."""
        self.restart(other.pad.repeat_interleave(n))
        self.reserve(other.length)
        self.end.fill_(other.length)
        for (layer, name), theirs in other.tensors.items():
            mine = self.tensor(layer, name, theirs)
            mine[:, :, : other.length] = theirs.repeat_interleave(n, dim=0)


def span_of(length):
    """The number of slots that a static cache reads for a text of this length."""
    return max(256, 2 ** (length - 1).bit_length())


def new_cache(model, static):
    """An empty KVCache of a single sequence, for several calls of stream()."""
    pad = torch.zeros(1, dtype=torch.int64, device=model.lm_head.weight.device)
    return KVCache(model.config, model.config.block_size, pad, static)


class Step:
    """
    The step from one token to the next. What changes between steps is in tensors that are written
    in place, so that it can be recorded as a CUDA graph.

    run: the model, or torch.compile(model), for one token; options: those of pick()
    """

    def __init__(self, model, run, cache, max_new_tokens, vocab_size, cuda_graph, options):
        self.model, self.run, self.cache, self.options = model, run, cache, options
        record = cuda_graph and cache.static
        self.recorder = Recorder(record, report=partial(print, file=sys.stderr))
        self.recorded = {}  # by span of the cache
        self.config, self.vocab_size = cache.config, vocab_size
        B, zeros = len(cache.pad), partial(torch.zeros, device=cache.pad.device)
        self.new = zeros(B, max_new_tokens, dtype=torch.int64)
        self.draws = zeros(B, max_new_tokens)
        self.number = zeros(1, dtype=torch.int64)  # of tokens drawn
        self.finite = zeros(1, dtype=torch.int64)  # of these, drawn from finite logits
        self.seen = None  # the tokens in each sequence, if repetition is penalized
        if options.get('repetition_penalty', 1) != 1:
            self.seen = zeros(B, vocab_size, dtype=torch.bool)

    def start(self, ids, pad, logits, draws, stride):
        """Prepare to continue ids (B, T), left-padded by pad (B,), which have the last logits."""
        self.ids, self.pad, self.logits, self.stride = ids, pad, logits, stride
        self.made = 0  # as `number`, without waiting for the device
        self.number.zero_()
        self.finite.zero_()
        self.draws.copy_(draws)
        if self.seen is not None:
            self.seen.copy_(seen_in(ids, pad, self.vocab_size))

    def make(self, count):
        """Make the next `count` tokens, or as many as there are left."""
        for _ in range(min(count, self.new.size(1) - self.made)):
            if self.made == 0:
                self.draw(self.logits)
            elif self.config.pos == 'learned' and self.cache.length == self.config.block_size:
                self.recompute()
            else:
                self.replay()
            self.made += 1

    def replay(self):
        """Make a token from the latest one and the cache."""
        self.cache.reserve(1)
        if self.cache.span not in self.recorded:
            self.recorded[self.cache.span] = self.recorder(self.forward_and_draw)
        self.recorded[self.cache.span]()

    def forward_and_draw(self):
        logits, _ = self.run(self.new.index_select(1, self.number - 1), cache=self.cache)
        self.draw(logits[:, -1, : self.vocab_size].float())

    def recompute(self):
        """Make a token from the last ones, which get the first learned positions."""
        so_far = torch.cat((self.ids, self.new[:, : self.made]), dim=1)
        window = so_far[:, self.stride - 1 - self.config.block_size :]
        self.cache.restart((self.pad - so_far.size(1) + window.size(1)).clamp_min(0))
        self.draw(read(self.model, window, self.cache, self.vocab_size))

    def draw(self, logits):
        """Draw a token from logits (B, V)."""
        self.finite.add_(logits.amax(dim=-1).isfinite().all())
        draws = self.draws.index_select(1, self.number)[:, 0]
        token = pick(logits, draws, seen=self.seen, **self.options)[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        self.new.index_copy_(1, self.number, token)
        self.number.add_(1)


@torch.inference_mode()
def stream(
    model,
    prompts,
    max_new_tokens,
    samples=range(1),
    seed=None,
    vocab_size=None,
    stop=None,
    stride=1,
    cache=None,
    compiled=None,
    cuda_graph=True,
    kept=None,
    **options,
):
    """
    Continue each of `prompts`, lists of token ids, once for each number in `samples`, all in one
    batch. Yields a tensor (B,) on the CPU for each step: the next token of each sequence, those of
    the first prompt first, and -1 for sequences that have ended.

    seed: if given, a text depends only on it, the prompt and the sample's number
    vocab_size: ids from here on are padding of the embedding and are never sampled
    stop(b, new): called after each step, returns whether sequence b ends with the new tokens
    stride: past block_size, learned positions recompute the window every `stride` tokens
    cache: of a single sequence (new_cache()); the prompt's beginning is in it already
    compiled: torch.compile(model), for the steps after the prompt
    cuda_graph: whether to record the step as a CUDA graph, on a CUDA device
    kept: a dict that keeps a cache and its recordings for later calls with as many sequences
    options: those of pick()

    A prompt is cut to its last block_size tokens. Learned positions recompute this window for
    every further token, as nanoGPT does. Others slide: what is kept has itself seen earlier ones.
    Raises FloatingPointError for logits that are not finite, UserError for too large a stride.
    """
    config, device = model.config, model.lm_head.weight.device
    vocab_size = vocab_size or config.vocab_size
    if stride > 1 and stride >= config.block_size:
        raise UserError(f'stride={stride} must be less than block_size={config.block_size}')
    cuda_graph = cuda_graph and can_record(device)
    own = cache is None
    if own:
        prompts = [prompt[-config.block_size :] for prompt in prompts]
    T, B = max(map(len, prompts)), len(prompts) * len(samples)
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    pad = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    if own:
        prompt_cache = KVCache(config, T, pad)  # each prompt once
        logits = read(model, ids, prompt_cache, vocab_size)
        ids, logits, pad = (x.repeat_interleave(len(samples), dim=0) for x in (ids, logits, pad))
        static = cuda_graph or compiled is not None
        size = span_of(T + max_new_tokens) if static else T + max_new_tokens
        cache = kept_cache({} if kept is None else kept, config, size, pad, static)
        cache.load(prompt_cache, len(samples))
    else:
        logits = read(model, ids, cache, vocab_size)

    step = cache.step
    run = model if compiled is None else compiled
    if step is None or step.options != options or step.new.size(1) != max_new_tokens:
        step = Step(model, run, cache, max_new_tokens, vocab_size, cuda_graph, options)
        cache.step = step
    draws = random_numbers(seed, len(prompts), samples, max_new_tokens)
    step.start(ids, pad, logits, draws, stride)
    block = 16 if step.recorder.on and own else 1  # tokens to fetch at once
    new, ended = [[] for _ in range(B)], [False] * B
    step.make(block)
    for first in range(0, max_new_tokens, block):
        tokens = step.new[:, first : first + block].clone().cpu()  # waits for the device
        if step.finite != step.number:
            raise FloatingPointError(
                'the logits are not finite: the weights are damaged, or too large for this dtype'
            )
        if block > 1:
            step.make(block)  # the device computes while these are read
        for token in tokens.unbind(1):
            yield token.masked_fill(torch.tensor(ended), -1) if any(ended) else token
            for b in range(B):
                if stop and not ended[b]:
                    new[b].append(int(token[b]))
                    ended[b] = bool(stop(b, new[b]))
            if all(ended):
                return
        if block == 1:  # no sooner: a caller's cache must not hold tokens that are dropped
            step.make(1)


def read(model, ids, cache, vocab_size):
    """Add the columns of ids (B, T) that the cache lacks: the logits of the last one (B, V)."""
    lacking = ids[:, cache.length :]
    fits = max(0, cache.size - cache.length)  # the others overwrite old ones, one at a time
    for piece in (lacking[:, :fits], *lacking[:, fits:].split(1, dim=1)):
        if piece.size(1):
            cache.reserve(piece.size(1))
            logits, _ = model(piece.contiguous(), cache=cache)
    return logits[:, -1, :vocab_size].float()


def kept_cache(kept, config, size, pad, static):
    """The cache in `kept` if it fits; otherwise a new one, which is kept."""
    key = len(pad), min(size, config.block_size), static
    if key not in kept:
        kept.clear()
        kept[key] = KVCache(config, key[1], pad, static)
    return kept[key]


def random_numbers(seed, num_prompts, samples, steps):
    """Uniform, (num_prompts * len(samples), steps); with a seed, the same for every prompt."""
    if seed is None:
        return torch.rand(num_prompts * len(samples), steps)
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in samples]
    return torch.stack([torch.rand(steps, generator=g) for g in generators]).repeat(num_prompts, 1)


def can_record(device):
    """Whether CUDA graphs work: under autocast one would read copies of weights that are gone."""
    return device.type == 'cuda' and not torch.is_autocast_enabled('cuda')


def seen_in(ids, pad, vocab_size):
    """Which tokens are in ids (B, T), from columns pad (B,) on: (B, vocab_size) bool."""
    there = torch.arange(ids.size(1), device=ids.device) >= pad[:, None]
    count = torch.zeros(len(ids), vocab_size, dtype=torch.int32, device=ids.device)
    return count.scatter_add_(1, ids, there.int()) > 0


def pick(
    logits, draw, temperature=1, top_k=None, top_p=1, min_p=0, repetition_penalty=1, seen=None
):
    """
    Pick a token (B,) from logits (B, V) with uniform random numbers `draw` (B,) in [0, 1).

    temperature: divides the logits; 0 picks the most likely token
    top_k: keep this many most likely tokens, None: all
    top_p: keep the fewest tokens with this total probability (Holtzman et al. 2019)
    min_p: keep tokens with this share of the highest probability (Nguyen et al. 2024)
    repetition_penalty: makes tokens in `seen` (B, V) bool less likely (Keskar et al. 2019)
    """
    if seen is not None:
        less = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, less, logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    # the largest becomes 0: divided by a tiny temperature it would be infinite
    logits = logits - logits.amax(dim=-1, keepdim=True)
    V, ids = logits.size(1), None
    k = V if top_k is None else min(top_k, V)
    if k < V or top_p < 1.0:
        logits, ids = logits.topk(k)  # the most likely first (B, k)
    probs = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    if top_p < 1.0:
        before = probs.cumsum(-1) - probs  # the probability of more likely tokens
        probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0.0)
    total = probs.cumsum(dim=-1)
    hit = (total > draw[:, None] * total[:, -1:]) & (probs > 0)
    token = hit.int().argmax(dim=-1)  # the first: the draw is within its share
    return token if ids is None else ids.gather(1, token[:, None])[:, 0]
