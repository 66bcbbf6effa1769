"""`u2moe serve`: the recogniser as a server. One session type, one scheduler, one file per protocol, and a web page.

Needs the packages of the extra `[server]`; nothing else in the runtime imports it.
"""
