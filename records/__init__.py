"""Records, the tools around them, and the commands of train_q0.py that do not train."""
