import moelpr  # noqa: F401  # prepares the process before torch is imported
