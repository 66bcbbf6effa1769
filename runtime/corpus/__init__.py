"""Lists of recordings with what is said in them, and scoring of recognised text against that."""
