"""Tables in Markdown."""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table padded to align in a terminal too: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, rule, *rows]]
    for line in lines:
        line[0] = line[0].strip().ljust(widths[0])
    lines[1][0] = "-" * widths[0]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
