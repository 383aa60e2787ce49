"""A small Django site on real peers, to watch the load balancer at work.

==============  ====================================================================
``command.py``  ``python -m django_proxysql demo``: the time line, signals, exit codes
``peers.py``    three SQLite or MariaDB peers that can be failed and restored
``site.py``     Django, set up in this process and served on loopback
``shop.py``     the pages that the site serves
``load.py``     clients that ask for the page, and count
``tally.py``    what happened to each peer, counted from the balancer's events
``screen.py``   the live table, the lines that stay, the summary
==============  ====================================================================

``processes.py`` and ``servers.py`` run throwaway servers, for the tests too.
"""
