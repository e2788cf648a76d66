"""The model as the lm-evaluation-harness (package lm_eval) calls it, for eval.py --tasks."""

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from generate import stream
from support.errors import UserError

LOGITS = 2**27  # maximum number in a batch: half a GB in float32


class Harness(TemplateLM):
    """
    A GPT and its data.tokenizer.Tokenizer as the harness's LM. Texts longer than block_size lose
    their beginning, as with the harness's own backend for transformers.

    ctx: an autocast context
    batch_size: sequences per batch, fewer if their logits would need too much memory
    """

    def __init__(self, model, tokenizer, ctx, batch_size):
        super().__init__()
        self.model, self.tok, self.ctx, self.batch_size = model, tokenizer, ctx, batch_size
        self.max_length, self.max_gen_toks = model.config.block_size, 256
        self._device = model.lm_head.weight.device

    @property
    def eot_token_id(self):
        """The token before a text: <|endoftext|>, or a newline if the vocabulary has none."""
        return self.tok.eot if self.tok.eot is not None else self.tok.encode('\n')[0]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tok.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """
        (log-probability, whether it is the greedy one) of each continuation. A request is (texts,
        ids of the context, ids of the continuation).
        """
        results = [None] * len(requests)
        tokens = [(context + new)[-self.max_length - 1 :] for _, context, new in requests]
        # the longest first: if memory runs out, it does so at once
        order = sorted(range(len(requests)), key=lambda i: -len(tokens[i]))
        bar = tqdm(total=len(requests), desc='log-likelihoods', disable=disable_tqdm or None)
        while order:
            longest = len(tokens[order[0]]) - 1
            count = max(1, min(self.batch_size, LOGITS // (longest * self.model.config.vocab_size)))
            batch, order = order[:count], order[count:]
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            targets = torch.full_like(ids, -1)
            for b, i in enumerate(batch):
                last = len(tokens[i]) - 1
                first = last - min(len(requests[i][2]), last)
                ids[b, :last] = torch.tensor(tokens[i][:-1])
                targets[b, first:last] = torch.tensor(tokens[i][first + 1 :])
            ids, targets = ids.to(self._device), targets.to(self._device)
            with self.ctx:
                logits = self.model(ids, targets)[0]
            for b, i in enumerate(batch):
                counted = targets[b] >= 0
                results[i] = score(logits[b, counted], targets[b, counted])
            bar.update(len(batch))
        bar.close()
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of each text, in windows of block_size that do not overlap."""
        counts, windows = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = utils.get_rolling_token_windows(
                ids, self.eot_token_id, self.max_length, context_len=1
            )
            parts = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += parts
            counts.append(len(parts))
        results = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(results)[0] for _ in range(count)) for count in counts]

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm=False):
        """The text after each context, up to one of the strings in `until` or <|endoftext|>."""
        results = [None] * len(requests)
        args = [request.args for request in requests]  # (context, options)
        order = sorted(range(len(args)), key=lambda i: (str(args[i][1]), len(args[i][0])))
        bar = tqdm(total=len(requests), desc='answers', disable=disable_tqdm or None)
        while order:
            options = args[order[0]][1]
            batch = [i for i in order[: self.batch_size] if args[i][1] == options]
            order = order[len(batch) :]
            for i, text in zip(batch, self.generate([args[i][0] for i in batch], options)):
                results[i] = text
            bar.update(len(batch))
        bar.close()
        return results

    def generate(self, contexts, options):
        """The text after each of these contexts. options: the harness's, the same for all"""
        until = options.get('until') or []
        until = [until] if isinstance(until, str) else list(until)
        new = options.get('max_gen_toks', self.max_gen_toks)
        if new >= self.max_length:
            room = f'more than block_size={self.max_length} leaves room for'
            raise UserError(f'the task asks for {new} tokens, {room}')
        prompts = [self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        prompts = [prompt[new - self.max_length :] for prompt in prompts]

        def ends(b, ids):
            return ids[-1] == self.tok.eot or any(s in self.tok.decode(ids) for s in until)

        temperature = options.get('temperature', 1.0) if options.get('do_sample') else 0
        how = dict(temperature=temperature, top_k=options.get('top_k') or None)
        how.update(top_p=options.get('top_p', 1.0), vocab_size=self.tok.vocab_size)
        with self.ctx:
            steps = list(stream(self.model, prompts, new, stop=ends, **how))
        texts = []
        for ids in torch.stack(steps, dim=1).tolist():
            text = self.tok.decode([t for t in ids if t >= 0 and t != self.tok.eot])
            texts.append(text[: min((text.find(s) for s in until if s in text), default=None)])
        return texts


def score(logits, targets):
    """(log-probability of all targets (T,), whether each is the most likely) by logits (T, V)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    total = logprobs.gather(1, targets[:, None]).sum().item()
    return total, bool((logprobs.argmax(-1) == targets).all())
