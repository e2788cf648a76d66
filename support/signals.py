"""Signals that ask a run to stop."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time


class StopSignals:
    """
    True once this process was asked to end: Ctrl-C, a scheduler's SIGTERM, SLURM's warning SIGUSR1, a lost terminal.

    A first signal leaves it to the run to end after its iteration, with a save. While nothing_to_lose, and at a second signal,
    the process ends at once, with 128 + the signal's number as its exit code. SIGUSR2 prints the stack of every thread.
    """

    def __init__(self):
        self.number, self.since, self.nothing_to_lose, self.handled = None, 0.0, True, set()
        # Python runs a handler only once the main thread is back from C code, which may be a hanging compiler or NCCL.
        # So the handlers do nothing, and a thread reads the numbers that Python writes into a socket right away.
        self.socket, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        self.wakeup = wakeup  # kept open
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            # Windows does not have all of them; ignored signals stay ignored (nohup)
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), lambda number, frame: None)
                self.handled.add(getattr(signal, name))
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        if sys.stderr:
            faulthandler.enable()
            if hasattr(signal, 'SIGUSR2'):
                faulthandler.register(signal.SIGUSR2)

    def watch(self):
        while True:
            number = self.socket.recv(1)[0]
            if number in self.handled:  # other handlers of Python's may be there too
                self.receive(number, time.monotonic())

    def receive(self, number, now):
        """Handle signal `number` at `now` (seconds)."""
        second = self.number is not None
        if (
            second and now - self.since < 1
        ):  # one request often comes twice: timeout(1) and a closed terminal send two
            return
        at_once = second or self.nothing_to_lose
        if (
            number == signal.SIGINT
            and os.environ.get('RANK', '0') == '0'
            and sys.stderr
            and sys.stderr.isatty()
        ):
            os.write(
                2,
                b'\ninterrupted\n'
                if at_once
                else b'\nstopping after this iteration; Ctrl-C again ends at once\n',
            )
        if at_once:
            os._exit(128 + number)
        self.number, self.since = number, now

    def __bool__(self):
        return self.number is not None
