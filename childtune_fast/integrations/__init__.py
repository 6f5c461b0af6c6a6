"""Child-Tuning inside other libraries' training loops. Leaves: the rest of the package imports none of them."""
