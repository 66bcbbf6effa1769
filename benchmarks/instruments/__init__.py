"""Measuring instruments: a probe around the recogniser, operator counts, rates of the machine, statistics."""
