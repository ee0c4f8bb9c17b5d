"""Benchmarks of speed and memory against common alternatives. Each module is a command.

`python -m benchmarks.step`, `python -m benchmarks.probes`, `python -m benchmarks.memory`,
`python -m benchmarks.sweep`, `python -m benchmarks.scaling`.

`python -m benchmarks.same_bits` measures no time. It checks that two revisions give the same losses and adapters.
"""
