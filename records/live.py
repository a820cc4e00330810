"""What a launch does beside training. Its listeners hear when its run is open (`open`), before the
first step (`start`), of each event of its log (`event`, as the log itself), after the last step
(`finish`) and when it ends in any way (`close`); each has the methods that it needs. One writes the
result (records/launch.py). The others show a run under way: a status line on a terminal, curve.png
at every member, curves in a tracker (--track), the cost of its operations (--profile). None of
these ends a run: after a fault it is off."""
import contextlib
import functools
import os
import sys
import time

import torch

import train_q0 as q
from records import plot
from records.launch import Report, fetch_default_corpus
from records.track import Tracker


def begin(cfg, why, args):
    """The listeners of a launch, whose default corpus is there then; `why` has the reasons of its
    settings. Raises UserError where a listener lacks its library."""
    found = [Curve()]
    if args.track:
        found.append(Tracker(args.track))
    if args.profile:
        found.append(Profile())
    if sys.stdout and sys.stdout.isatty():
        found.append(Status())
    fetch_default_corpus(cfg)
    return Listener(Report(cfg, why)), *map(Guarded, found)


class Listener:
    """Calls the methods that `listener` has; others do nothing."""
    def __init__(self, listener):
        self.listener = listener
        for method in ("open", "start", "event", "finish", "close"):
            setattr(self, method, functools.partial(self.call, method))

    def call(self, method, *args, **pairs):
        if hasattr(self.listener, method):
            getattr(self.listener, method)(*args, **pairs)


class Guarded(Listener):
    """One that hears no more after its first fault."""
    def call(self, method, *args, **pairs):
        listener = self.listener
        try:
            super().call(method, *args, **pairs)
        except Exception as e:  # libraries, networks and disks fail in any way
            self.listener = None
            with contextlib.suppress(Exception):
                listener.close()
            q.say(f"notice: {listener.name} is off: {q.one_line(e)}", "stderr")


# Curve ------------------------------------------------------------------------------------------

class Curve:
    """Draws curve.png anew at a member, where that takes less than 1% of the time since."""
    name = "curve.png"

    def start(self, trainer):
        self.folder = trainer.run.folder
        self.split = trainer.cfg.report
        self.drawn = time.perf_counter()
        self.seconds = 1.0  # that drawing takes: at first matplotlib is loaded

    def event(self, *flags, **pairs):
        last_of_a_member = flags == ("ensemble",) and pairs["prior"] == "learned"
        started = time.perf_counter()
        if last_of_a_member and started - self.drawn > 100 * self.seconds:
            with contextlib.suppress(ImportError):  # the end of a run tells
                entries = plot.entries_of(self.folder)
                plot.draw_curve(self.folder / "curve.png", entries, self.split)
            self.drawn = time.perf_counter()
            self.seconds = self.drawn - started


# Status line ------------------------------------------------------------------------------------

class Terminal:
    """An output to a terminal whose last line is a status: what is written takes its place. Lines
    of steps are in the status, and not written."""
    def __init__(self, stream, clear):
        self.stream = stream
        self.clear = clear
        self.in_status = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        ends_one = self.in_status and text == "\n"  # print writes the end of a line by itself
        self.in_status = text.startswith("step:")
        if self.in_status or ends_one:
            return len(text)
        self.clear()
        return self.stream.write(text)


class Status:
    """The newest step in the terminal's last line. It is tqdm's, which comes with huggingface-hub
    and knows the width, what a terminal can show, and Windows."""
    name = "the status line"
    SHOWN = ("step", "loss", "eta", "traj", "cycle", "tok/s")  # cut on the right where it is narrow

    def __init__(self):
        self.bar = None
        self.shown = False
        self.outputs = {}

    def start(self, trainer):
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream and stream.isatty():
                self.outputs[name] = Terminal(stream, self.clear)
                setattr(sys, name, self.outputs[name])

    def clear(self):
        if self.shown:
            self.shown = False
            self.bar.clear()
            self.bar.fp.flush()

    def event(self, *flags, **pairs):
        if "step" in pairs:
            step, total = pairs["step"]
            self.bar = self.bar or self.made(total)
            self.bar.n = step
            self.bar.desc = " ".join(f"{k}:{q.shown(k, pairs[k])}" for k in self.SHOWN)
        if self.bar:
            self.bar.refresh()
            self.shown = True

    def made(self, total):
        from tqdm import tqdm
        tqdm.monitor_interval = 0  # no thread
        return tqdm(total=total, file=self.outputs["stdout"].stream, dynamic_ncols=True,
                    leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}|")

    def close(self):
        if self.bar:
            self.bar.close()
        for name, output in self.outputs.items():
            if getattr(sys, name) is output:
                setattr(sys, name, output.stream)


# Profile ----------------------------------------------------------------------------------------

class Profile:
    """Times every operation of a few steps, after the first ones; the run goes on without."""
    name = "--profile"
    FIRST = 3  # steps before, in which kernels are loaded and caches fill
    STEPS = 2

    def __init__(self):
        self.profiler = None
        self.begun = 0  # steps

    def start(self, trainer):
        guarded = Guarded(self)
        forward_backward = trainer.forward_backward  # which a step begins with

        def step(cycle):
            guarded.call("step")
            forward_backward(cycle)

        self.path = trainer.run.folder / "trace.json"
        self.on_gpu = trainer.world.device.type == "cuda"
        trainer.forward_backward = step

    def step(self):
        if self.begun == self.FIRST:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints that it starts and stops
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.on_gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
        elif self.begun == self.FIRST + self.STEPS:
            self.close()
        self.begun += 1

    def close(self):
        """Stop, write the trace and show the table, if they are not there yet."""
        if self.profiler is None:
            return
        profiler = self.profiler
        self.profiler = None
        profiler.stop()
        q.write_atomically(self.path, lambda tmp: profiler.export_chrome_trace(str(tmp)))
        q.say("\n".join(heaviest(profiler.key_averages(), self.on_gpu)))
        q.say(f"profile of {self.begun - self.FIRST} steps: {self.path}, for ui.perfetto.dev")


def heaviest(averages, on_gpu, count=15):
    """Lines of a table of what took the most time, without what it called: on a GPU kernels, else
    operations."""
    rows = []
    for row in averages:
        on_device = row.device_type.name == "CUDA"
        if on_device == on_gpu and not row.is_user_annotation:
            spent = row.self_device_time_total if on_gpu else row.self_cpu_time_total
            rows.append((spent / 1e6, row.count, row.key))
    total = sum(seconds for seconds, _, _ in rows)
    yield f"{'seconds':>9} {'share':>6} {'calls':>7}  operation"
    for seconds, calls, name in sorted(rows, reverse=True)[:count]:
        yield f"{seconds:9.4f} {seconds / total:6.1%} {calls:7}  {name[:70]}"
