"""Measuring instruments: a probe on the recogniser, operators, rates of the machine, statistics."""
