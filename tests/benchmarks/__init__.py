"""What the engine costs and what it keeps, in figures: ``python -m tests.benchmarks``.

Each module has one benchmark: a function ``run()`` that returns figures. Nothing here is a test:
how long something takes depends on the machine. What can be counted is also asserted, in
``tests/test_benchmarks.py``.
"""
