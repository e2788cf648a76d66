"""Functions recorded as CUDA graphs."""

import torch

from support.errors import UserError


def can_record(cuda_graph, device, dtype, torchrun, redraws):
    """
    cuda_graph with 'auto' replaced: True if train.py's step can be recorded as CUDA graphs.

    torchrun: are there several processes? redraws: does backward draw dropout masks again?
    Raises UserError for an unknown value, and for True if it is not supported here.
    """
    if cuda_graph not in ('auto', True, False):
        raise UserError(f"cuda_graph={cuda_graph!r} is none of 'auto', True, False")
    conditions = {
        'on a CUDA device': 'cuda' in device,
        'without torchrun': not torchrun,
        'with float32 or bfloat16': dtype != 'float16',
        'without dropout beside gradient_checkpointing': not redraws,
    }
    unmet = [words for words, met in conditions.items() if not met]
    if unmet and cuda_graph is True:
        raise UserError(f'cuda_graph=True is supported only {unmet[0]}; leave --cuda_graph out')
    return cuda_graph is not False and not unmet


def set_value(group, name, value):
    """Set group[name] of an optimizer; on CUDA a tensor, written in place, as graphs need."""
    if not group['capturable'] or not group['params']:
        group[name] = value
    elif torch.is_tensor(group[name]):
        group[name].fill_(value)
    else:
        group[name] = torch.tensor(value, device=group['params'][0].device)


class Recorder:
    """
    Records functions as CUDA graphs. A small network's step is hundreds of kernel launches, which
    take longer than the kernels; a graph replays them all with one launch
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

        recorded = Recorder(on=True)
        step = recorded(step)

    The first calls run the function itself, the next call records it, and later calls replay the
    recording. So every call must do the same work on the same memory:
    - its arguments are tensors of the same shape and type each time; their values are copied in
    - everything else that changes between calls is a tensor on the device, written in place
    - it does not wait for the device, as .item() or an `if` on a tensor would
    The next call overwrites what the function returned. With on=False functions stay as they are.
    If a recording fails, `report` gets a line about it and all functions run unrecorded from then.
    """

    FIRST_CALLS = 3  # libraries allocate their workspaces, and torch.compile compiles

    def __init__(self, on, report=print):
        self.on, self.report = on, report
        self.stream = self.pool = None  # shared by all recordings

    def __call__(self, function):
        return Recorded(self, function) if self.on else function

    def warm_up(self, function, args):
        """function(*args) on the stream that is recorded later."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = function(*args)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, function, inputs):
        """Record function(*inputs): (a function that replays it, its outputs)."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:  # thread_local: the loader's thread pins memory meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode='thread_local'):
                outputs = function(*inputs)
        except RuntimeError:
            # otherwise the generator may believe it is still being recorded (torch 2.11)
            generator = torch.cuda.default_generators[current.device_index]
            state = torch.Generator(generator.device).graphsafe_get_state()
            generator.graphsafe_set_state(state)
            raise
        finally:
            torch.cuda.set_stream(current)
        return graph.replay, outputs


class Recorded:
    """A function, and its recording once there is one."""

    def __init__(self, recorder, function):
        self.recorder, self.function, self.calls = recorder, function, 0
        self.replay = self.inputs = self.outputs = None

    def __call__(self, *args):
        self.calls += 1
        if self.recorder.on and self.calls <= Recorder.FIRST_CALLS:
            return self.recorder.warm_up(self.function, args)
        if self.recorder.on and self.replay is None:
            self.record(args)
        if not self.recorder.on:
            return self.function(*args)
        self.copy_in(args)
        self.replay()
        return self.outputs

    def record(self, args):
        """Record the function; if that fails, turn the recorder off."""
        self.inputs = [x.clone() for x in args]
        try:
            self.replay, self.outputs = self.recorder.record(self.function, self.inputs)
        except RuntimeError as e:  # too little memory is a RuntimeError too
            self.recorder.on = False
            name, reason = self.function.__name__, (str(e).splitlines() or [type(e).__name__])[0]
            self.recorder.report(
                f'{name} could not be recorded as a CUDA graph and runs without: {reason}'
            )

    def copy_in(self, args):
        for kept, new in zip(self.inputs, args, strict=True):
            assert kept.shape == new.shape and kept.dtype == new.dtype, (
                f'{self.function.__name__} was recorded for a tensor of {tuple(kept.shape)}, '
                f'{kept.dtype} and got one of {tuple(new.shape)}, {new.dtype}'
            )
            kept.copy_(new)
