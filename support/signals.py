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
    True after this process was asked to end: by Ctrl-C, a scheduler's SIGTERM, SLURM's warning
    SIGUSR1, or a lost terminal.

    After a first signal the run saves and ends when its iteration is done. While nothing_to_lose,
    and at a second signal, the process exits at once, with code 128 + the signal's number. SIGUSR2
    prints the stack of every thread.
    """

    def __init__(self):
        self.number, self.since, self.nothing_to_lose = None, 0.0, True
        # Python runs a handler only after the main thread returns from C code, which may be a
        # hanging compiler or NCCL. So the handlers do nothing, and a thread reads the numbers that
        # Python writes into a socket at once.
        self.socket, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        self.handled = set()
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows does not have all of them
            # ignored signals stay ignored (nohup)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
                self.handled.add(number)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        if sys.stderr:
            faulthandler.enable()
            if hasattr(signal, 'SIGUSR2'):
                faulthandler.register(signal.SIGUSR2)

    def watch(self):
        while True:
            number = self.socket.recv(1)[0]
            if number in self.handled:  # other Python handlers write here too
                self.receive(number, time.monotonic())

    def receive(self, number, now):
        """Handle signal `number` at `now` (seconds)."""
        second = self.number is not None
        if second and now - self.since < 1:
            return  # one request often sends two: timeout(1) and a closed terminal do
        at_once = second or self.nothing_to_lose
        if number == signal.SIGINT and os.environ.get('RANK', '0') == '0':
            self.answer(at_once)
        if at_once:
            os._exit(128 + number)
        self.number, self.since = number, now

    def answer(self, at_once):
        """Tell the user at the terminal what Ctrl-C does."""
        if sys.stderr and sys.stderr.isatty():
            text = '\nstopping after this iteration; Ctrl-C again ends at once\n'
            os.write(2, b'\ninterrupted\n' if at_once else text.encode())

    def __bool__(self):
        return self.number is not None
