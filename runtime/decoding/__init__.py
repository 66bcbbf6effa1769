"""From samples to hypotheses to words: searches, context, second pass, times, confidences and endpoints."""
