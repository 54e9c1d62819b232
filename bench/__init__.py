"""The benchmark suite, installed as `rnnfast.bench`: `rnnfast bench` runs it.

Knows the public API, the reference and, if they are installed, other libraries. Times nothing that
it has not checked first.
"""
