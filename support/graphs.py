"""Functions recorded as CUDA graphs."""

import functools

import torch


def can_record(cuda_graph, device, dtype, torchrun, redraws):
    """
    cuda_graph with 'auto' replaced: True where train.py's step can be recorded as CUDA graphs.

    torchrun: do several processes share the work? redraws: does backward draw dropout masks again?
    Raises ValueError for a value that is none of 'auto', True, False, and for True where it is not supported.
    """
    if cuda_graph not in ('auto', True, False):
        raise ValueError(f"cuda_graph={cuda_graph!r} is none of 'auto', True, False")
    not_supported = (
        'on a CUDA device'
        if 'cuda' not in device
        else 'without torchrun'
        if torchrun
        else 'with float32 or bfloat16'
        if dtype == 'float16'
        else 'without dropout beside gradient_checkpointing'
        if redraws
        else ''
    )
    if not_supported and cuda_graph is True:
        raise ValueError(
            f'cuda_graph=True is supported only {not_supported}; leave --cuda_graph out'
        )
    return not not_supported and cuda_graph is not False


class Recorder:
    """
    Records functions as CUDA graphs. A small network's step is hundreds of launches that take longer than the work they
    start; a graph replays them all by one launch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

        recorded = Recorder(on=True)
        step = recorded(step)

    The first calls run the function as it is, the next one records it, and the rest replay the recording. So the function must
    do the same work on the same memory each time:
    - its arguments are tensors that keep their shape and type; their values are copied in
    - all else that changes between calls stands in tensors on the device, which are written in place
    - it does not wait for the device, as .item() or an `if` on a tensor would
    What it returns is written over by the next call. With on=False functions stay as they are. If a recording fails, `report`
    gets one line that says so, and from then on all functions run as they are.
    """

    FIRST_CALLS = 3  # in which libraries allocate their workspaces, and torch.compile compiles

    def __init__(self, on, report=print):
        self.on, self.report, self.stream, self.pool = on, report, None, None

    def __call__(self, function):
        if not self.on:
            return function
        calls, inputs, outputs, replay = 0, (), None, None

        @functools.wraps(function)
        def run(*args):
            nonlocal calls, inputs, outputs, replay
            calls += 1
            if not self.on:
                return function(*args)
            if calls <= self.FIRST_CALLS:
                return self.warm_up(function, args)
            if replay is None:
                inputs = [x.clone() for x in args]
                try:
                    replay, outputs = self.record(function, inputs)
                except RuntimeError as e:  # too little memory is one too
                    self.on, reason = False, (str(e).splitlines() or [type(e).__name__])[0]
                    self.report(
                        f'{function.__name__} could not be recorded as a CUDA graph and runs without: {reason}'
                    )
                    return function(*args)
            for kept, new in zip(inputs, args, strict=True):
                assert kept.shape == new.shape and kept.dtype == new.dtype, (
                    f'{function.__name__} was recorded for a tensor of {tuple(kept.shape)}, {kept.dtype} and got one of '
                    f'{tuple(new.shape)}, {new.dtype}'
                )
                kept.copy_(new)
            replay()
            return outputs

        return run

    def warm_up(self, function, args):
        """function(*args) on the stream that is recorded later."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = function(*args)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, function, inputs):
        """(replay, outputs) of a recording, which takes its memory from one pool for all functions."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:  # thread_local: the loader's thread pins memory meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode='thread_local'):
                outputs = function(*inputs)
        except RuntimeError:
            generator = torch.cuda.default_generators[current.device_index]
            if hasattr(
                generator, 'graphsafe_set_state'
            ):  # else it could still take itself for recorded (torch 2.11)
                generator.graphsafe_set_state(
                    torch.Generator(generator.device).graphsafe_get_state()
                )
            raise
        finally:
            torch.cuda.set_stream(current)
        return graph.replay, outputs
