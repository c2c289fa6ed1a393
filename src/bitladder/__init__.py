"""One sensitivity measurement of a model, a ladder of mixed-precision checkpoints from it, and the evidence for each.

The steps are functions that meet only through the records in `bitladder.records`:
`measure -> plan -> export -> verify -> evaluate -> report`; `bitladder.steps.run` does them all.
"""

__version__ = "0.1.0"
