"""Numbers on a command line that must lie in a range."""

import argparse
import math


def positive(kind, most=math.inf, or_zero=False):
    """Returns a function that converts text to a number of the type `kind`, above 0 and at most `most`.

    Args:
        kind: int or float.
        most: the greatest number.
        or_zero: whether 0 is one, too.
    """

    def convert(text):
        number = kind(text)
        if not (0 < number <= most or (or_zero and number == 0)):
            least = "at least 0" if or_zero else "above 0"
            raise argparse.ArgumentTypeError(f"must be {least} and at most {most}, but is {text}")
        return number

    convert.__name__ = kind.__name__
    return convert
