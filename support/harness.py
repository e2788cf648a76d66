"""
What the benchmarks of the lm-evaluation-harness (package lm_eval) ask of a model, answered by ours; eval.py --tasks uses it.
"""

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from generate import stream

LOGITS = 2**27  # how many a batch may take at once: half a GB in float32


class Harness(TemplateLM):
    """
    A GPT and its data.tokenizer.Tokenizer as the harness's LM. Texts longer than the model's block_size lose their beginning, as
    with the harness's own backend for transformers.

    ctx: an autocast context; batch_size: sequences at once, fewer where their logits would take too much memory
    """

    def __init__(self, model, tokenizer, ctx, batch_size):
        super().__init__()
        self.model, self.tok, self.ctx, self.batch_size = model, tokenizer, ctx, batch_size
        self.max_length, self.max_gen_toks, self._device = (
            model.config.block_size,
            256,
            model.lm_head.weight.device,
        )

    @property
    def eot_token_id(self):
        """What texts begin after: <|endoftext|>, or a newline where the vocabulary has none."""
        return self.tok.eot if self.tok.eot is not None else self.tok.encode('\n')[0]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tok.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """(log-probability, whether greedy decoding would say it) of each continuation: requests are (texts, context ids, continuation ids)."""
        found = [None] * len(requests)
        tokens = [
            (context + continuation)[-self.max_length - 1 :]
            for _, context, continuation in requests
        ]
        order = sorted(
            range(len(requests)), key=lambda i: -len(tokens[i])
        )  # long ones first: what runs out of memory does so at once
        bar = tqdm(total=len(requests), desc='log-likelihoods', disable=disable_tqdm or None)
        while order:
            longest = len(tokens[order[0]]) - 1
            count = max(1, min(self.batch_size, LOGITS // (longest * self.model.config.vocab_size)))
            batch, order = order[:count], order[count:]
            ids = torch.zeros(len(batch), longest + 1, dtype=torch.int64)
            for row, i in zip(ids, batch):
                row[: len(tokens[i])] = torch.tensor(tokens[i])
            ids = ids.to(self._device)
            with self.ctx:
                logits = self.model(ids[:, :-1], ids[:, 1:])[0]
            for b, i in enumerate(batch):
                length = min(len(requests[i][2]), len(tokens[i]) - 1)
                where = slice(len(tokens[i]) - 1 - length, len(tokens[i]) - 1)
                logprobs, said = (
                    torch.log_softmax(logits[b, where].float(), dim=-1),
                    ids[b, where.start + 1 : where.stop + 1],
                )  # (length, V), (length,)
                found[i] = (
                    logprobs.gather(1, said[:, None]).sum().item(),
                    bool((logprobs.argmax(-1) == said).all()),
                )
            bar.update(len(batch))
        bar.close()
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of each text, in windows of block_size that overlap nowhere."""
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    self.eot_token_id,
                    self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(
            self._loglikelihood_tokens(
                [window for text in windows for window in text], disable_tqdm
            )
        )
        return [sum(next(found)[0] for _ in text) for text in windows]

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm=False):
        """What the model says after each context, up to one of the strings in its options' `until`, or <|endoftext|>."""
        said = [None] * len(requests)
        order = sorted(
            range(len(requests)), key=lambda i: (str(requests[i].args[1]), len(requests[i].args[0]))
        )  # alike ones together
        bar = tqdm(total=len(requests), desc='answers', disable=disable_tqdm or None)
        while order:
            options = requests[order[0]].args[1]
            batch = [i for i in order[: self.batch_size] if requests[i].args[1] == options]
            order = order[len(batch) :]
            until = options.get('until') or []
            until = [until] if isinstance(until, str) else list(until)
            new = options.get('max_gen_toks', self.max_gen_toks)
            if new >= self.max_length:
                raise ValueError(
                    f'the task asks for {new} tokens, more than block_size={self.max_length} leaves room for'
                )
            prompts = [
                (self.tok_encode(requests[i].args[0]) or [self.eot_token_id])[
                    new - self.max_length :
                ]
                for i in batch
            ]
            ends = lambda b, ids: (
                ids[-1] == self.tok.eot or any(s in self.tok.decode(ids) for s in until)
            )
            temperature = options.get('temperature', 1.0) if options.get('do_sample') else 0
            with self.ctx:
                rows = list(
                    stream(
                        self.model,
                        prompts,
                        new,
                        temperature=temperature,
                        top_k=options.get('top_k') or None,
                        top_p=options.get('top_p', 1.0),
                        vocab_size=self.tok.vocab_size,
                        stop=ends,
                    )
                )
            for i, ids in zip(batch, torch.stack(rows, dim=1).tolist()):
                text = self.tok.decode([t for t in ids if t >= 0 and t != self.tok.eot])
                said[i] = text[: min((text.find(s) for s in until if s in text), default=None)]
            bar.update(len(batch))
        bar.close()
        return said
