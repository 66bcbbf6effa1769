"""`u2moe serve` under load: how many live speakers it holds, what it does past that, and whether it lasts."""
