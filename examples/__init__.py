"""Programs that show how the package is used: `python -m examples.demo`."""
