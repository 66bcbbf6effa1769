"""The server of `u2moe serve`: one scheduler, one file per protocol, and a web page. It needs the extra `[server]`."""
