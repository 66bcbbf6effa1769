"""Endurance: hours of audio, many streams, damaged files."""
