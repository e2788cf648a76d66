"""
Start many short runs of scripts without paying for the import of torch each time: a process that has
imported it forks one child per line of JSON on its standard input, {"argv", "cwd", "stdout", "stderr",
"env"}, tells its pid, and later how it ended. Each child is a process of its own that runs the script as
python would, and can be killed for good.
"""

import json
import os
import runpy
import signal
import sys
import threading

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401


def child(order):
    os.setpgrp()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # who started the tests in the background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and with nohup this one
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for handle, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    os.chdir(order['cwd'])
    os.environ.update(order['env'])
    sys.argv = order['argv']
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[1:1] = filter(None, order['env'].get('PYTHONPATH', '').split(os.pathsep))
    try:
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except Exception:
            sys.excepthook(*sys.exc_info())
            code = 1
        else:
            code = 0
    except SystemExit as e:
        code = e.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch down in order costs a second


def wait(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps({'ended': pid, 'code': code}), flush=True)


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(json.dumps({'started': pid}), flush=True)
    threading.Thread(target=wait, args=(pid,)).start()
