"""Lists of recordings with transcripts, and scoring of recognised text against them."""
