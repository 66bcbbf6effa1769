"""Static files of the server's web page, at `/`."""
