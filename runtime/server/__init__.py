"""`u2moe serve`: the recogniser as a server. One session type, one scheduler, one file for each protocol, and a page.

Needs the packages of the extra `[server]`; nothing else of the runtime imports it.
"""
