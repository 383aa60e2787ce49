"""The chaos suite: a web site at work while what it depends on is killed, paused and cut off.

``python -m tests.chaos`` runs it at length and prints a table for this engine and one for Django's
own; ``tests/test_chaos.py`` runs each scenario once, and holds what must hold:

* no write is lost and none is doubled, whatever happens;
* no read fails, and no atomic block whose loss struck before its second statement;
* a write fails only if it was in flight when the fault struck: at most one a thread and fault.

``load`` is what the site does and what it sees, ``sites`` what it runs on, ``scenarios`` what
happens to
that, ``judgement`` whether it was endured, ``own_writes`` a measurement on Galera.
"""
