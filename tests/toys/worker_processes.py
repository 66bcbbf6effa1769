"""Functions for worker processes, which cannot always import test modules."""


def fail(kind, arguments):
    raise kind(*arguments)
