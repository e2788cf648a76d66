"""
Starts short runs of scripts without the seconds that importing torch takes: a process that has
imported it forks a child for each line of JSON on its standard input, {"argv", "cwd", "env",
"stdin", "stdout", "stderr"}. It prints the child's pid, and later its exit code. The child runs
the script as python would, in a process of its own that can be killed.
"""

import json
import os
import runpy
import signal
import sys
import threading

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401


def child(order):
    os.setpgrp()
    # the tests may run in the background, or under nohup, which ignore these
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.dup2(os.open(order['stdin'], os.O_RDONLY), 0)
    sys.stdin = open(0, encoding='utf-8')  # without what the parent has read ahead
    for handle, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    os.chdir(order['cwd'])
    os.environ.update(order['env'])
    sys.argv = order['argv']
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[1:1] = filter(None, order['env'].get('PYTHONPATH', '').split(os.pathsep))
    try:
        code = run(sys.argv[0])
    except SystemExit as error:
        code = error.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly exit of torch takes a second


def run(script):
    try:
        runpy.run_path(script, run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def wait(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    report(ended=pid, code=code)


def report(**message):
    os.write(1, f'{json.dumps(message)}\n'.encode())  # at once: several threads report


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    report(started=pid)
    threading.Thread(target=wait, args=(pid,)).start()
