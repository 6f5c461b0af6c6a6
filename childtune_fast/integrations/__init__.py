"""Child-Tuning inside the training loops of other libraries; no other folder of the package imports this one."""
