"""Experts in each number format; `runtime.graph.dispatch` dispatches tokens to them and combines the results.

A new format is a file here, a line in `passes.experts.EXPERT_FORMATS`, and its function's name in
`bundle.mixture.FUNCTIONS`.
"""
