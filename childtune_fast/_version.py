"""The version, written once: packaging, the build's fingerprint and `__version__` all read it here."""

__version__ = "0.1.0"
