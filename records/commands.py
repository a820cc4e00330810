"""Commands of train_q0.py that do not train, by name."""
from records import plan, runs, use

COMMANDS = {
    "plan": plan.plan,
    "select": use.select,
    "evaluate": use.evaluate,
    "sample": use.sample,
    "average": runs.average,
    "pool": runs.pool,
}
