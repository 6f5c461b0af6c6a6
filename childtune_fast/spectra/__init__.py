"""Spectra of a model's layers: was it trained on enough, layer by layer, without data; and what did fine-tuning do?"""

from .analysis import analyze
from .comparison import Change, Comparison, compare
from .pictures import plot_alpha
from .row import Row
from .table import Spectra

__all__ = ["Change", "Comparison", "Row", "Spectra", "analyze", "compare", "plot_alpha"]
