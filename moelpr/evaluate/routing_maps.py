"""Heat maps of routing. Every cell carries its number, so colour is never alone."""

from collections.abc import Collection, Mapping, Sequence

from moelpr.evaluate.routing import Routing
from moelpr.languages import language_name
from moelpr.report.svg import INK, MUTED, Drawing, sequential_colour

CELL_WIDTH, CELL_HEIGHT = 58, 22
SMALL_WIDTH, SMALL_HEIGHT = 30, 18
LEFT, TOP = 56, 44


def language_map(
    values: Mapping[str, Sequence[float]],
    layers: Sequence[int],
    original: Collection[str],
    outlined: Collection[tuple[str, int]],
    largest: float,
) -> Drawing:
    """A number per layer (rows) and language (columns), original languages first.

    values: language -> one number per layer. outlined: (language, layer) of cells with a frame. largest: the number
    that is drawn darkest; 0 is drawn lightest.
    """
    columns = sorted(values, key=lambda language: language not in original)
    drawing = Drawing(LEFT + CELL_WIDTH * len(columns) + 4, TOP + CELL_HEIGHT * len(layers) + 6)
    drawing.text(LEFT - 8, TOP - 8, "layer", fill=MUTED, anchor="end")
    if original and any(language not in original for language in columns):
        num_original = sum(language in original for language in columns)
        _group(drawing, "original", 0, num_original)
        _group(drawing, "expanded", num_original, len(columns))
    for column, language in enumerate(columns):
        x = LEFT + CELL_WIDTH * column
        drawing.text(x + CELL_WIDTH / 2, TOP - 8, language, anchor="middle", bold=True)
        for row, (layer, value) in enumerate(zip(layers, values[language], strict=True)):
            _cell(
                drawing, x, TOP + CELL_HEIGHT * row, CELL_WIDTH, CELL_HEIGHT, value, value / largest if largest else 0,
                f"{language_name(language)}, layer {layer}: {value:.3f}",
            )  # fmt: skip
    for row, layer in enumerate(layers):
        drawing.text(LEFT - 8, TOP + CELL_HEIGHT * row + 15, str(layer), fill=MUTED, anchor="end")
    for language, layer in outlined:  # last, or a neighbour would cover the frame
        x, y = LEFT + CELL_WIDTH * columns.index(language), TOP + CELL_HEIGHT * list(layers).index(layer)
        _frame(drawing, x, y, CELL_WIDTH, CELL_HEIGHT)
    return drawing


def expert_maps(statistics: Mapping[str, Routing], per_row: int = 3) -> Drawing:
    """Share of first choices: a map of layers (rows) and experts (columns) for each language.

    Columns of original experts end at a thick line.
    """
    routing = next(iter(statistics.values()))
    width = LEFT + SMALL_WIDTH * routing.num_experts + 16
    height = TOP + SMALL_HEIGHT * len(routing.layers) + 12
    num_rows = -(-len(statistics) // per_row)
    drawing = Drawing(width * min(per_row, len(statistics)), height * num_rows)
    for number, (language, routing) in enumerate(statistics.items()):
        drawing.place(
            _expert_map(language, routing, width, height), width * (number % per_row), height * (number // per_row)
        )
    return drawing


def _expert_map(language: str, routing: Routing, width: float, height: float) -> Drawing:
    drawing = Drawing(width, height)
    drawing.text(LEFT, 14, language_name(language), size=13, bold=True)
    drawing.text(LEFT - 8, TOP - 6, "layer", fill=MUTED, anchor="end", size=11)
    for expert in range(routing.num_experts):
        x = LEFT + SMALL_WIDTH * expert
        drawing.text(x + SMALL_WIDTH / 2, TOP - 6, str(expert), fill=MUTED, anchor="middle", size=11)
    for row, (layer, shares) in enumerate(zip(routing.layers, routing.first_choice_share, strict=True)):
        y = TOP + SMALL_HEIGHT * row
        drawing.text(LEFT - 8, y + 13, str(layer), fill=MUTED, anchor="end", size=11)
        for expert, share in enumerate(shares):
            _cell(
                drawing, LEFT + SMALL_WIDTH * expert, y, SMALL_WIDTH, SMALL_HEIGHT, share, share,
                f"{language_name(language)}, layer {layer}, expert {expert}: {share:.3f}", size=10,
            )  # fmt: skip
    x = LEFT + SMALL_WIDTH * routing.num_original_experts
    drawing.line(x, TOP - 2, x, TOP + SMALL_HEIGHT * len(routing.layers) + 2, INK, 2)
    return drawing


def _cell(
    drawing: Drawing, x: float, y: float, width: float, height: float, value: float, share: float, tip: str,
    size: float = 12,
) -> None:  # fmt: skip
    """share: how dark, 0 to 1."""
    fill, ink = sequential_colour(share)
    drawing.rect(x, y, width, height, fill, tip=tip)
    drawing.text(x + width / 2, y + height / 2 + 0.35 * size, f"{value:.2f}", size=size, fill=ink, anchor="middle")


def _frame(drawing: Drawing, x: float, y: float, width: float, height: float) -> None:
    corners = [(x + 1, y + 1), (x + width - 1, y + 1), (x + width - 1, y + height - 1), (x + 1, y + height - 1)]
    drawing.path([*corners, corners[0]], "#9a3412", width=2.5)


def _group(drawing: Drawing, name: str, first: int, last: int) -> None:
    """The name of a group of columns, with a line under it."""
    if last > first:
        x, end = LEFT + CELL_WIDTH * first, LEFT + CELL_WIDTH * last
        drawing.text((x + end) / 2, 14, name, fill=MUTED, anchor="middle")
        drawing.line(x + 3, 20, end - 3, 20, MUTED)
