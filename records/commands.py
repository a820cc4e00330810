"""Commands of train_q0.py that do not train, by name."""
import functools
import io
import os
import signal
import sys

import train_q0 as q
from records import export, hub, overview, plan, plot, runs, use

SIGPIPE = 128 + 13  # what a shell makes of it


def for_terminals(command):
    """`command` as a terminal or a pipe bears it: characters that its encoding lacks are written as
    ?; after Ctrl-C, or where the reader is gone, as after `| head`, it ends without a traceback."""
    @functools.wraps(command)
    def run(argv):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        try:
            command(argv)
            if sys.stdout:
                sys.stdout.flush()
        except KeyboardInterrupt:
            q.say("interrupted", "stderr")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # Python flushes once more as it ends
            return SIGPIPE
    return run


COMMANDS = {
    "plan": for_terminals(plan.plan),
    "select": for_terminals(use.select),
    "evaluate": for_terminals(use.evaluate),
    "sample": for_terminals(use.sample),
    "average": for_terminals(runs.average),
    "count": for_terminals(runs.count),
    "pool": for_terminals(runs.pool),
    "push": for_terminals(hub.push),
    "runs": for_terminals(overview.runs),
    "compare": for_terminals(plot.compare),
    "export": for_terminals(export.export),
}


def find(name):
    """A command. Raises UserError where there is none of that name."""
    if name not in COMMANDS:
        near = q.suggestion(name, COMMANDS)
        raise q.UserError(f"unknown command {name}: {near}give flags to train, or one of "
                          f"{', '.join(COMMANDS)}")
    return COMMANDS[name]
