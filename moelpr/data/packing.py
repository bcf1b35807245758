"""Packing of conversations into sequences: whole ones, so that none is cut and few tokens are wasted."""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def windows_of(
    lengths: NDArray[np.integer], size: int, shares_windows: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put conversations into windows of `size` tokens: the longest first, each into the fullest that has room for it.

    Args:
        lengths: Tokens of each conversation [conversations], at most `size`.
        shares_windows: Whether a window may have several, which requires that they don't attend to each other.

    Returns:
        The conversations by window [conversations], and where in that order the windows start, with its end
        [windows + 1].
    """
    if not shares_windows:
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # tokens left -> windows
    rooms: list[int] = []  # the numbers of tokens left that a window has, ascending
    for index in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[index])
        place, room = bisect_left(rooms, length), size
        if place == len(rooms):
            windows.append([])
            window = len(windows) - 1
        else:
            room = rooms[place]
            window = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        windows[window].append(index)
        if room := room - length:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(window)
    starts = np.cumsum([0, *map(len, windows)], dtype=np.int64)
    return np.array([index for window in windows for index in window], np.int64), starts
