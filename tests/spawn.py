"""
Start many short runs of train.py without paying for the import of torch each time: a process that has
imported it forks one child per line of JSON on its standard input, {"argv": [...], "log": path}, tells
its pid, and later how it ended. Every child is a process of its own that can be killed for good.
"""

import json
import os
import runpy
import sys
import threading

import matplotlib.pyplot # noqa: imported here once, for all children
import torch._dynamo # noqa: optimizers import it at their first step

sys.path.insert(0, os.getcwd())
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        log = os.open(order['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.setpgrp()
        sys.argv = order['argv']
        try:
            try:
                runpy.run_path(sys.argv[0], run_name='__main__')
            except Exception:
                sys.excepthook(*sys.exc_info())
        except SystemExit as e:
            code = e.code or 0
        else:
            code = 0
        sys.stdout.flush()
        os._exit(code) # taking torch down in order costs a second

    def wait(pid=pid):
        print(json.dumps({'ended': pid, 'status': os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)
    print(json.dumps({'started': pid}), flush=True)
    threading.Thread(target=wait).start()
