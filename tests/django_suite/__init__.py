"""Django's own test suite as the judge: ``python -m tests.django_suite``.

The suite comes in Django's sdist. It is run twice, with every alias on the peer engine and with
every alias on the load balancer's engine, and compared test by test: what passes on the one must
pass on the other.
"""
