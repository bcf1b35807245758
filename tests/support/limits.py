"""The time that a test may wait for a process of its own."""

# Less than `timeout` in pyproject.toml, so that pytest shows what the process printed. With two processes of pytest on
# two slow cores, what takes two minutes alone has taken five.
PROCESS_S = 870
