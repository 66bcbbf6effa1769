"""What was measured, as JSON, and what makes pages of it. Measures nothing."""
