"""The benchmark suite, installed as `rnnfast.bench`.

Knows the public API and the reference. Times nothing that it has not checked first.
"""
