"""`--track tensorboard|wandb|trackio`: the numbers of a run's log as curves in a tracker.

A trajectory is a curve; its name follows from run.json, so that a resumed run goes on with it.
TensorBoard's files lie in the run's folder (`tensorboard --logdir logs`), wandb's too until they
are sent, trackio's in its own. Steps never go back: what a resumed run repeats is not sent again.
"""
import importlib
import json
import os

import train_q0 as q

MODULES = {
    "tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
GROUPS = ("train", "member", "uniform", "learned", "final")  # as they come at a step
PLACES = ("traj", "member", "cycle", "distilled", "members", "k")  # they say what a number is of


def group_of(kind, pairs):
    """The group of curves that an event's numbers go to."""
    if kind.startswith("final_"):
        return "final"
    return {"step": "train", "ensemble": pairs.get("prior")}.get(kind, kind)


class TensorBoard:
    """A curve in TensorBoard, with the methods of one in wandb."""
    def __init__(self, module, folder):
        self.writer = module.SummaryWriter(folder)

    def log(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # what a kill takes is not sent again

    def finish(self):
        self.writer.close()


class Tracker:
    """Sends the numbers of a run's events. Raises UserError where its library is not there."""
    def __init__(self, kind):
        self.name = f"--track {kind}"
        self.kind = kind
        self.curve = None  # under way
        self.trajectory = 0  # that it is of
        self.file = None  # that remembers it for a resumed run
        self.sent = None  # before this launch, at last: step, group, the tracker's step
        self.step = 0  # of the newest event
        os.environ.setdefault("WANDB_CONSOLE", "off")  # log.txt has what is printed
        try:
            self.module = importlib.import_module(MODULES[kind])
        except ImportError as e:
            raise q.UserError(f"{self.name} needs its library: pip install {kind} "
                              f"({q.one_line(e)})") from None

    def start(self, trainer):
        self.run = trainer.run

    def event(self, *flags, **pairs):
        kind = flags[0] if flags else next(iter(pairs))
        group = group_of(kind, pairs)
        if group not in GROUPS:
            return
        trajectory = pairs.get("traj", self.trajectory)
        if self.curve is None or trajectory != self.trajectory:
            self.close()
            self.open_curve(trajectory)
        if group == "train":
            self.step, _ = pairs["step"]
        elif group == "member":  # the first event of a run that was stopped at a cycle's end
            cycle = self.run.cycles[pairs["member"]]
            self.step = cycle.steps_before + cycle.steps
        place = [self.step, GROUPS.index(group)]
        if place <= self.sent[:2]:
            return
        values = {f"{group}/{name.removeprefix('final_')}": value for name, value in pairs.items()
                  if type(value) in (int, float) and name not in PLACES}
        step = max(self.step, self.sent[2] + 1)
        self.curve.log(values, step=step)
        self.file.write_text(json.dumps([*place, step]))

    def open_curve(self, trajectory):
        """Begin a trajectory's curve, or go on with it."""
        folder = self.run.folder
        self.trajectory = trajectory
        self.file = self.run.state / f"{self.kind}-{trajectory}.txt"
        self.sent = [0, 0, -1]
        if self.file.exists():
            self.sent = q.load_json(self.file)
        self.step = self.sent[0]
        if self.kind == "tensorboard":
            self.curve = TensorBoard(self.module, folder / f"tensorboard/{trajectory}")
            return
        unique = q.digest([q.sha256_of(folder / "run.json"), trajectory])[:16]
        options = {"id": unique, "name": f"{folder.name} {trajectory}", "dir": folder}
        if self.kind == "trackio":  # which knows a run by its name
            options = {"name": f"{folder.name} {trajectory} {unique}"}
        about = q.load_json(folder / "run.json")
        self.curve = self.module.init(project="q0", group=folder.name, resume="allow",
                                      config=about["config"], **options)

    def close(self):
        if self.curve:
            self.curve.finish()
        self.curve = None
