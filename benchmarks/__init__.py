"""Speed and memory beside what a user would run today; each module is a command.

`python -m benchmarks.step`, `python -m benchmarks.probes`, `python -m benchmarks.memory`,
`python -m benchmarks.sweep`, `python -m benchmarks.scaling`.

`python -m benchmarks.same_bits` times nothing: it shows that two revisions give the same losses and adapters.
"""
