"""What worker processes call: they import it, which test modules do not allow however pytest is started."""


def fail(kind, arguments):
    raise kind(*arguments)
