"""The page at `/`: what a browser is sent. Nothing here is Python."""
