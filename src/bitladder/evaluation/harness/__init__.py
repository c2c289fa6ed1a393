"""Tasks of lm-evaluation-harness whose questions lie in this folder: nothing is fetched.

They are multiple choice: an answer is the choice with the largest log-probability after the question (the harness's
`acc`). Every answer is kept, so that a checkpoint's can be paired with the original's. The harness is an extra,
`bitladder[tasks]`; nothing but `models` imports it.
"""
