"""A confusion matrix as a picture: shares of each row as depth of colour, counts as numbers."""
import numpy as np

from minidamage.visualize.canvas import GREY, GRID, INK, SERIES, Figure, lighter, text_width

CELL, TEXT, TITLE = (74, 34), 13, 18           # width and height of a cell, font sizes, pixels


def matrix_plot(matrix, row_names, column_names, title="", row_label="what is there", column_label="what it was taken for"):
    """Returns a picture uint8 [H, W, 3].

    matrix: [R, C] counts; a negative entry is left blank. A cell's colour is its share of the row; entries off the diagonal are orange, so
    that what is wrong shows.
    """
    matrix = np.asarray(matrix)
    width = max([CELL[0], *(text_width(name, TEXT) + 14 for name in column_names)])
    left = max(text_width(name, TEXT) for name in row_names) + 46
    top = 26 * bool(title) + 62
    across = max(left + width * len(column_names), 16 + text_width(title, TITLE)) + 20          # of few classes the title is the wider one
    figure = Figure(round(across), round(top + CELL[1] * len(row_names) + 18))
    if title:
        figure.text(16, 22, title, TITLE, INK, "lm")
    figure.text(left + width * len(column_names) / 2, top - 44, column_label, TEXT, INK, "mm")
    figure.text(14, top + CELL[1] * len(row_names) / 2, row_label, TEXT, INK, "mm", angle=90)
    sums = np.maximum(np.where(matrix > 0, matrix, 0).sum(1, keepdims=True), 1)
    for r, row_name in enumerate(row_names):
        y = top + CELL[1] * r
        figure.text(left - 8, y + CELL[1] / 2, row_name, TEXT, GREY, "rm")
        for c, column_name in enumerate(column_names):
            x = left + width * c
            if r == 0:
                figure.text(x + width / 2, top - 14, column_name, TEXT, GREY, "mm")
            if matrix[r, c] < 0:
                continue
            share = matrix[r, c] / sums[r, 0]
            colour = lighter(SERIES[0] if r == c else SERIES[1], 1 - 0.85 * share)
            figure.rectangle(x + 1, y + 1, x + width - 1, y + CELL[1] - 1, colour, GRID)
            figure.text(x + width / 2, y + CELL[1] / 2, str(int(matrix[r, c])), TEXT, (255, 255, 255) if share > 0.6 else INK, "mm")
    return figure.picture()
