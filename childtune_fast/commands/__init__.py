"""The commands of `childtune`, one file each; no other folder of the package imports this one.

Each file has a `main` that takes the arguments after the command's name, and returns the exit status.
"""
