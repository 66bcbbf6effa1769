"""The same recordings in Python, in one graph, in Node, in a browser and in C++."""
